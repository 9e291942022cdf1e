"""Words that must not be written, as the tokens that they are written with. Without torch: the API counts them, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def spellings(words: Iterable[str], encode: Callable[[str], Sequence[int]]) -> list[tuple[int, ...]]:
    """The token sequences of each word, as vLLM finds them: as it is, and as it follows a space where that gives
    another first token and no more tokens. `encode` adds no special tokens.

    Raises ValueError with one sentence for a word that has none.
    """
    found = []
    for word in words:
        bare = tuple(encode(word.lstrip()))
        if not bare:
            raise ValueError(f"bad_words has {word[:50]!r}, which is no token.")
        found.append(bare)
        spaced = tuple(encode(" " + word.lstrip()))
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
    return found
