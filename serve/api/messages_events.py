"""From the deltas of a chat's answer to the content blocks of Anthropic's Messages API, and to their events.

Blocks follow one another: each is started, given its deltas, and stopped. A body that is not streamed is the same with
one delta.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class Blocks:
    """The content of one message, as it comes. `done` has the blocks that are complete."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._call: int | None = None  # which of the calls is open
        self._arguments = ""
        self._later = ""  # text that came amid a call: a block cannot be gone on with once it is stopped

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return any(block["type"] == "tool_use" for block in self.done)

    @property
    def complete(self) -> bool:
        """Whether a tool was called, and the last call is all there."""
        calls = [block for block in self.done if block["type"] == "tool_use"]
        return bool(calls) and INVALID not in calls[-1]["input"]

    def feed(self, delta: dict[str, Any]) -> Iterator[Event]:
        """`delta`: a chat's, with `reasoning`, `content` and `tool_calls` where it has them."""
        if delta.get("reasoning"):
            yield from self._say("thinking", delta["reasoning"])
        if delta.get("content"):
            if self._open is not None and self._open["type"] == "tool_use":
                self._later += delta["content"]
            else:
                yield from self._say("text", delta["content"])
        for position, call in enumerate(delta.get("tool_calls") or []):
            yield from self._called(call.get("index", position), call)

    def close(self) -> Iterator[Event]:
        """Stops the block that is open."""
        if self._open is None:
            return
        block, index = self._open, len(self.done)
        if block["type"] == "thinking":
            block["signature"] = uuid.uuid4().hex  # which this server gives no meaning
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        if block["type"] == "tool_use":
            block["input"] = _parsed(self._arguments)
        yield {"type": "content_block_stop", "index": index}
        self.done.append(block)
        self._open, self._call, self._arguments = None, None, ""
        later, self._later = self._later, ""
        if later:
            yield from self._say("text", later)
            yield from self.close()

    def _say(self, kind: str, text: str) -> Iterator[Event]:
        name, field = DELTAS[kind]
        if self._open is None or self._open["type"] != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            yield from self._start({"type": kind, field: "", **more})
        assert self._open is not None
        self._open[field] += text
        yield {"type": "content_block_delta", "index": len(self.done), "delta": {"type": name, field: text}}

    def _called(self, index: int, call: dict[str, Any]) -> Iterator[Event]:
        function = call.get("function") or {}
        if self._call != index:
            id = call.get("id") or f"call_{uuid.uuid4().hex}"
            yield from self._start({"type": "tool_use", "id": id, "name": function.get("name") or "", "input": {}})
            self._call = index
        arguments = function.get("arguments")
        if arguments:
            self._arguments += arguments
            delta = {"type": "input_json_delta", "partial_json": arguments}
            yield {"type": "content_block_delta", "index": len(self.done), "delta": delta}

    def _start(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self._open = block
        yield {"type": "content_block_start", "index": len(self.done), "content_block": dict(block)}


INVALID = "invalid_arguments"


def _parsed(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments spell; what spells none (cut short, say) as it is, under a name of its own."""
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {INVALID: arguments}
