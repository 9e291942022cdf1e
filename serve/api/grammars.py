"""Grammars for requests: asked of the process aside that compiles them (grammar_check.py), and remembered."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.aside import Aside, Ended
from serve.engine.messages import Grammar
from serve.errors import InvalidRequest

MAX_CHARACTERS = 1 << 20  # of what a request gives for a grammar
KEPT = 64  # grammars, and sentences about what is none


class Grammars:
    """What answers of one model can be held to. The process starts with the first that is asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        def opening() -> bytes:
            told = {"tokenizer": tokenizer.inner.to_str(), "vocab_size": vocab_size, "eos": list(eos)}
            return json.dumps(told).encode() + b"\n"

        self.aside = Aside("serve.api.grammar_check", "grammars are waiting to be compiled", opening)
        self._known: OrderedDict[bytes, Grammar | str] = OrderedDict()

    async def grammar(self, kind: str, value: Any, options: Mapping[str, Any], param: str) -> Grammar:
        """As grammar_check.grammar; `param` is the field at fault. Raises InvalidRequest or Overloaded."""
        try:
            line = json.dumps({"kind": kind, "value": value, **options}, ensure_ascii=False).encode() + b"\n"
        except RecursionError:
            raise InvalidRequest(f"{param} is nested too deeply.", param) from None
        except UnicodeEncodeError:
            raise InvalidRequest(f"{param} has half of a surrogate pair.", param) from None
        if len(line) > MAX_CHARACTERS:
            raise InvalidRequest(f"{param} has more than {MAX_CHARACTERS} characters, too many for a grammar.", param)
        key = hashlib.sha256(line).digest()
        if key not in self._known:
            self._known[key] = await self._compile(line, key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        found = self._known[key]
        self._known.move_to_end(key)
        if isinstance(found, str):
            raise InvalidRequest(found, param)
        return found

    async def close(self) -> None:
        """Ends the processes."""
        await self.aside.close()

    async def _compile(self, line: bytes, key: bytes) -> Grammar | str:
        """The grammar, or why there is none."""
        try:
            answer = json.loads(await self.aside.ask(line))
        except Ended as end:
            return "Grammar error: it takes too much " + ("time" if end.slow else "memory") + " to compile."
        if "text" in answer:
            return Grammar(key.hex(), answer["text"])
        said = answer["error"]
        return said if said.startswith("Invalid grammar") else f"Grammar error: {said}"
