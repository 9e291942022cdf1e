"""Token ids to text as they come: no half character is shown, no stop string or part of one gets out.

Two stages, a request each: `Detokenizer` turns ids into text that will not change any more; `StopStrings` holds back
what may still become a stop string. Whatever the tokenizer does, the deltas joined are what decoding everything at
once gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

REPLACEMENT = "�"
CONTEXT = 6  # tokens before the text that are decoded with it, since a decoder may treat the first token differently
UNFINISHED = 3  # bytes, at most, of a UTF-8 character that is not complete
WINDOW = 24  # tokens after which the start of the window is moved even if the text never settles


class Detokenizer:
    """Decodes a window of the last few tokens again with each new one and gives out what is settled.

    `inner` is a tokenizers.Tokenizer; `prompt` the ids that came before (their text is not given out).
    """

    def __init__(self, inner: Any, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._inner = inner
        self._skip = skip_special_tokens
        for length in range(CONTEXT, CONTEXT + UNFINISHED + 1):
            self._window = list(prompt[-length:])
            self._shown = self._decode(self._window)  # text of the window that has been given out, or is the prompt's
            if not self._shown.startswith(REPLACEMENT):  # else it begins inside a character: begin earlier
                break
        self._prompt = True  # nothing has been given out yet: the window's text is the prompt's

    def _decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=self._skip) if ids else ""

    def feed(self, token: int) -> str:
        """The text that this token settles; often that of the token, and "" in the middle of a character."""
        previous = len(self._window)
        self._window.append(token)
        text = self._decode(self._window)
        if self._prompt and self._shown.endswith(REPLACEMENT) and not text.startswith(self._shown):
            # The prompt ended inside a character, which this token changes: give out from the first sign that differs.
            same = next((i for i, (a, b) in enumerate(zip(self._shown, text, strict=False)) if a != b), len(text))
            self._shown = text[:same]
        settled = len(text.rstrip(REPLACEMENT))
        if len(self._window) > WINDOW:  # no character is that long: only the last of it can still become one
            settled = max(settled, len(text) - UNFINISHED)
        delta = text[len(self._shown) : settled]
        if delta:
            self._shown = text[:settled]
            self._prompt = False
        self._slide(text, settled, previous)
        return delta

    def finish(self) -> str:
        """The rest: signs of a character that never got finished."""
        text = self._decode(self._window)
        rest = text[len(self._shown) :]
        self._shown = text
        return rest

    def _slide(self, text: str, settled: int, previous: int) -> None:
        """Lets go of the tokens that later ones cannot change any more."""
        if settled == len(text):
            # All of it is shown. What is kept has to decode to the end of what it did: it may lose a space in front,
            # which some decoders strip there, but must not begin inside a character.
            for length in range(CONTEXT, CONTEXT + UNFINISHED + 1) if previous > 2 * CONTEXT else ():
                kept = self._window[-length:]
                tail = self._decode(kept)
                if tail and text.endswith(tail):
                    self._window, self._shown = kept, tail
                    break
        elif len(self._window) > WINDOW:
            # It goes on being no valid text: cut wherever both parts decode to what they are together.
            for cut in range(len(self._window) - CONTEXT, 0, -1):
                head, tail = self._decode(self._window[:cut]), self._decode(self._window[cut:])
                if head + tail == text and len(head) <= len(self._shown):
                    self._window, self._shown = self._window[cut:], self._shown[len(head) :]
                    break


class Match(NamedTuple):
    text: str
    stop: str


class StopStrings:
    """Passes text on, except its longest end that is the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, delta: str) -> str | Match:
        """Text that can be shown; or, where a stop string is complete, the last text to show and which string it was.

        Of several, the one that is complete first counts, and of those the longest.
        """
        if not self._stops:
            return delta
        text = self._held + delta
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found:
            end, start, stop = found
            self._held = ""
            return Match(text[: end if self._include else start], stop)
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (less than all of it)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
