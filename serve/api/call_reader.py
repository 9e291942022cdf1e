"""One call of a tool as a model writes it, {"name": "f", "arguments": {...}}, read as it comes.

Every character is looked at once. The arguments are passed on as they are written, as soon as the name is known; only
where they begin and end is looked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum, auto

SPACE = " \t\r\n"
DEEPEST = 512  # levels of brackets in a value


class State(Enum):
    BEFORE = auto()  # the object's brace
    KEY = auto()  # or the closing brace, where none has come yet
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    AFTER = auto()  # a value: a comma or the closing brace
    CLOSED = auto()
    BROKEN = auto()  # no call, or none any more


class CallReader:
    """`arguments` are the keys under which a parser's models have them. When the object is closed, `state` says whether
    it was a call; `name` is there as soon as the call can be announced; `raw` is all that was read.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._keys = tuple(arguments)
        self.state = State.BEFORE
        self.name: str | None = None
        self._named: str | None = None
        self._began = False  # the arguments, which are the value of the first such key
        self._inside = False  # of them
        self._raw: list[str] = []
        self._fresh: list[str] = []  # of the arguments, what has not been taken
        self._key = ""
        self._part: list[str] = []  # of a key or a name
        self._closers: list[str] = []  # of what a value has opened
        self._string = self._escaped = False
        self._scalar = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    @property
    def over(self) -> bool:
        return self.state in (State.CLOSED, State.BROKEN)

    def feed(self, text: str) -> int:
        """Reads on, up to the object's end; how many characters those were."""
        for at, sign in enumerate(text):
            if self.over:
                self._raw.append(text[:at])
                return at
            self._read(sign)
        self._raw.append(text)
        return len(text)

    def take(self) -> str:
        """The arguments that have come since the last time, once the call is announced."""
        if self.name is None:
            return ""
        fresh, self._fresh = "".join(self._fresh), []
        return fresh

    def _read(self, sign: str) -> None:
        if self.state is State.IN_VALUE:
            self._value(sign)
        elif self.state is State.IN_KEY:
            self._part.append(sign)
            if self._ends_string(sign):
                self._key = self._text()
                self.state = State.COLON
        elif sign in SPACE:
            return
        elif self.state is State.VALUE:
            self._begin(sign)
        elif self.state is State.KEY and sign == '"':
            self._part, self._escaped, self.state = [sign], False, State.IN_KEY
        elif sign == "}" and self.state in (State.KEY, State.AFTER):
            self.state = State.BROKEN if self.name is None else State.CLOSED
        else:
            expected = {State.BEFORE: ("{", State.KEY), State.COLON: (":", State.VALUE), State.AFTER: (",", State.KEY)}
            right, following = expected.get(self.state, ("", State.BROKEN))
            self.state = following if sign == right else State.BROKEN

    # ---------------------------------------------------------------- values

    def _begin(self, sign: str) -> None:
        if sign in "}],:":
            self.state = State.BROKEN
            return
        self.state = State.IN_VALUE
        self._string, self._escaped, self._scalar, self._closers, self._part = False, False, False, [], []
        self._inside = self._key in self._keys and not self._began
        if self._inside:
            self._began = True
            self._announce()
        if sign == '"':
            self._string = True
        elif sign in "{[":
            self._open(sign)
        else:
            self._scalar = True
        self._keep(sign)

    def _value(self, sign: str) -> None:
        if self._string:
            self._keep(sign)
            if self._ends_string(sign):
                self._string = False
                if not self._closers:
                    self._end()
        elif self._scalar:
            if sign in SPACE or sign in ",}":
                self._end()
                if self.state is State.AFTER:
                    self._read(sign)
            else:
                self._keep(sign)
        else:
            self._keep(sign)
            if sign == '"':
                self._string, self._escaped = True, False
            elif sign in "{[":
                self._open(sign)
            elif sign in "}]":
                if self._closers.pop() != sign:
                    self.state = State.BROKEN
                elif not self._closers:
                    self._end()

    def _open(self, sign: str) -> None:
        self._closers.append("}" if sign == "{" else "]")
        if len(self._closers) > DEEPEST:
            self.state = State.BROKEN

    def _end(self) -> None:
        self.state = State.AFTER
        if self._key == "name" and self._named is None:
            self._named = self._text()
            if not self._named:
                self.state = State.BROKEN
            self._announce()

    def _announce(self) -> None:
        if self._named and self._began:
            self.name = self._named

    def _keep(self, sign: str) -> None:
        if self._inside:
            self._fresh.append(sign)
        elif self._key == "name":
            self._part.append(sign)

    def _ends_string(self, sign: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif sign == "\\":
            self._escaped = True
        else:
            return sign == '"'
        return False

    def _text(self) -> str:
        """A key or a name that has been read; empty where it is no text."""
        try:
            text = json.loads("".join(self._part))
            text.encode()
        except (ValueError, AttributeError):
            return ""
        return text
