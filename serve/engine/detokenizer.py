"""Token ids to text as they come: no half character is shown, no stop string or part of one gets out.

Two stages, a request each: a detokenizer turns ids into text that will not change any more; `StopStrings` holds back
what may still become a stop string. Whatever the tokenizer does, the deltas joined are what decoding everything at
once gives. Where a token is some bytes, whatever stands beside it, which most tokenizers' are, `OfBytes` puts the bytes
together; `Detokenizer` works for all.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from tokenizers import decoders

REPLACEMENT = "�"
CONTEXT = 6  # tokens before the text that are decoded with it, since a decoder may treat the first token differently
UNFINISHED = 3  # bytes, at most, of a UTF-8 character that is not complete
WINDOW = 24  # tokens after which the start of the window is moved even if the text never settles


class Detokenizing(Protocol):
    def feed(self, token: int) -> str:
        """The text that this token settles; often that of the token, and "" in the middle of a character."""

    def finish(self) -> str:
        """The rest: signs of a character that never got finished."""


class Detokenizers:
    """Makes the detokenizers of requests, which share what is known of the tokenizer (a tokenizers.Tokenizer)."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._pieces = None
        if isinstance(inner.decoder, decoders.ByteLevel):
            self._pieces = {skip: Pieces(inner, skip_special_tokens=skip) for skip in (True, False)}

    def after(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizing:
        """For what follows the prompt, whose own text is not given out."""
        if self._pieces is None:
            return Detokenizer(self._inner, prompt, skip_special_tokens=skip_special_tokens)
        return OfBytes(self._pieces[skip_special_tokens], prompt)


class Silent:
    """Gives out no text, for who wants ids alone."""

    def feed(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Pieces(dict[int, bytes]):
    """The bytes that each token of a byte-level tokenizer stands for, found when they are first asked for."""

    def __init__(self, inner: Any, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._inner = inner
        added = inner.get_added_tokens_decoder().items()
        self._skipped = {id for id, token in added if token.special} if skip_special_tokens else set()
        # Bytes that are no printable sign of Latin-1 are written as the signs from 256 on (GPT-2's vocabulary).
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def __missing__(self, id: int) -> bytes:
        token = None if id in self._skipped else self._inner.id_to_token(id)
        if token is None:
            piece = b""
        elif all(sign in self._bytes for sign in token):
            piece = bytes(self._bytes[sign] for sign in token)
        else:  # an added token, written as it is
            piece = token.encode()
        self[id] = piece
        return piece


class OfBytes:
    """A detokenizer that puts the bytes of tokens together."""

    def __init__(self, pieces: Pieces, prompt: Iterable[int]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        end = b""
        for token in reversed(list(prompt)):
            end = pieces[token] + end
            if len(end) > UNFINISHED:
                break
        self._decoder.decode(end)
        # The prompt ended inside a character: its sign for that has been shown, unless the character gets finished.
        self._torn = bool(self._decoder.getstate()[0])

    def feed(self, token: int) -> str:
        return self._new(self._decoder.decode(self._pieces[token]))

    def finish(self) -> str:
        return self._new(self._decoder.decode(b"", final=True))

    def _new(self, text: str) -> str:
        if self._torn and text:
            self._torn = False
            return text.removeprefix(REPLACEMENT)
        return text


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
