"""Calls of tools in what a model writes: where they begin and end, by the models' own conventions.

One machine reads the text as it comes, whether it is shown in pieces or whole, so that both show the same. Text before
the first call is content; between and after calls there is none. What looks like a call and is none is content as it
stands.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from serve.api.call_reader import SPACE, CallReader, State
from serve.api.markup import begun


@dataclass
class CallDelta:
    """What a call has gained: its id and name once, its arguments in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Piece:
    """What a piece of text has brought."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolParser(ABC):
    """Reads one answer. A grammar writes a call as `begin`, then an object with "name" and the first of `keys`, then
    `end`.
    """

    keys: ClassVar[tuple[str, ...]] = ("arguments",)
    begin: ClassVar[str] = ""
    end: ClassVar[str] = ""
    separator: ClassVar[str] = ""
    shows_special: ClassVar[bool] = False  # whether calls are marked by what may be special tokens

    def __init__(self) -> None:
        self._held = ""  # what may still become a mark
        self._space: list[str] = []  # what is content, unless a call follows
        self._reader: CallReader | None = None  # of the call that is open
        self._opened = ""  # what stood before it, and is content as it is if it is none
        self._calls = 0

    def feed(self, text: str) -> Piece:
        """What is settled with this text."""
        piece = Piece()
        rest, self._held = self._held + text, ""
        while rest:
            left = self._outside(rest, piece) if self._reader is None else self._call(rest, self._reader, piece)
            if len(left) == len(rest):  # it waits for more
                self._held = left
                break
            rest = left
        return piece

    def finish(self) -> Piece:
        """What was held back, at the end of the text."""
        piece = Piece()
        if self._reader is not None:
            if self._reader.name is None:
                piece.content = self._opened + self._reader.raw
        elif not self._calls:
            piece.content = "".join(self._space) + self._held
        self._held = ""
        return piece

    @abstractmethod
    def _outside(self, text: str, piece: Piece) -> str:
        """Reads on where no call is open. What is left to read; all of it to wait for more."""

    @abstractmethod
    def _ended(self, good: bool) -> None:
        """A call has ended, or has turned out to be none."""

    def _open(self, mark: str) -> CallReader:
        self._opened, self._space = "".join(self._space) + mark, []
        self._reader = CallReader(self.keys)
        return self._reader

    def _call(self, text: str, reader: CallReader, piece: Piece) -> str:
        known = reader.name is not None
        read = reader.feed(text)
        if reader.name is not None:
            if known:
                delta = CallDelta(self._calls - 1, arguments=reader.take())
            else:
                delta = CallDelta(self._calls, call_id(), reader.name, reader.take())
                self._calls += 1
            if delta.name or delta.arguments:
                piece.calls.append(delta)
        if reader.over:
            self._reader = None
            if reader.name is None:
                piece.content += self._opened + reader.raw
            self._ended(reader.state is State.CLOSED)
        return text[read:]


class Hermes(ToolParser):
    """<tool_call>{"name": ..., "arguments": ...}</tool_call>, as of Hermes 2 Pro and Qwen."""

    begin, end = "<tool_call>\n", "\n</tool_call>"
    separator = "\n"
    shows_special = True
    tag = "<tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._begun = False  # something but space has come

    def _outside(self, text: str, piece: Piece) -> str:
        at = text.find(self.tag)
        settled = len(text) - begun(text, (self.tag,)) if at < 0 else at
        if self._calls:
            pass
        elif self._begun or text[:settled].strip(SPACE):
            piece.content += "".join(self._space) + text[:settled]
            self._begun, self._space = True, []
        else:
            self._space.append(text[:settled])
        if at < 0:
            return text[settled:]
        self._open(self.tag)
        return text[at + len(self.tag) :]

    def _ended(self, good: bool) -> None:
        self._begun = True


class Llama3Json(ToolParser):
    """{"name": ..., "parameters": ...}, several with semicolons between them, perhaps after <|python_tag|>, in an
    answer that is nothing else.
    """

    keys = ("parameters", "arguments")
    separator = "; "
    tag = "<|python_tag|>"

    def __init__(self) -> None:
        super().__init__()
        self._plain = False  # no call can come any more

    def _outside(self, text: str, piece: Piece) -> str:
        if self._plain:
            if not self._calls:
                piece.content += text
            return ""
        inner = text.lstrip(SPACE + ";" if self._calls else SPACE)
        self._space.append(text[: len(text) - len(inner)])
        if not inner:
            return ""
        if inner[0] == "{":
            return self._call(inner, self._open(""), piece)
        if not self._calls and inner.startswith(self.tag):
            self._space.append(self.tag)
            return inner[len(self.tag) :]
        if self._calls or not self.tag.startswith(inner):
            self._plain = True
            if not self._calls:
                piece.content += "".join(self._space)
            self._space = []
            return self._outside(inner, piece)
        return inner

    def _ended(self, good: bool) -> None:
        self._plain = self._plain or not good


PARSERS: dict[str, type[ToolParser]] = {"hermes": Hermes, "llama3_json": Llama3Json}


def call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"


def calls_of(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """Each call as a whole, of what came of them."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        whole = calls.setdefault(delta.index, CallDelta(delta.index, delta.id, delta.name))
        whole.arguments += delta.arguments
    return list(calls.values())
