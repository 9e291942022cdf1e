"""Tags in a text that comes in pieces. What may still become one is held back; every character is looked at a bounded
number of times.
"""

from __future__ import annotations

from collections.abc import Sequence


def find(text: str, tags: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of the tags begins, and which one it is."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=None)


def begun(text: str, tags: Sequence[str]) -> int:
    """The length of the longest end of the text that is the beginning of a tag, and not all of it."""
    longest = min(max(map(len, tags), default=1) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0
