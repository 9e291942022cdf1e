"""From the deltas of a chat's answer to the output items of OpenAI's Responses API, and to the events of their making.

An item is opened (added), given its deltas, and closed (done); the next one opens when what comes belongs elsewhere:
reasoning, then text, then each call of a function. A body that is not streamed is the same with one delta.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

Event = dict[str, Any]


class OutputItems:
    """The items of one response, as they come. `done` has those that are complete."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._held: list[dict[str, Any]] = []  # log-probabilities of tokens whose text has not come yet

    def feed(self, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> Iterator[Event]:
        """`delta`: a chat's, with `reasoning`, `content` and `tool_calls` where it has them; `logprobs`: those of its
        tokens, in a chat's form.
        """
        self._held += logprobs or []
        if delta.get("reasoning"):
            yield from self._turn_to(_Reasoning)
            yield from self._emit(delta["reasoning"], [])
        if delta.get("content"):
            yield from self._turn_to(_Text)
            held, self._held = self._held, []
            yield from self._emit(delta["content"], held)
        for position, call in enumerate(delta.get("tool_calls") or []):
            function = call.get("function") or {}
            yield from self._turn_to(_Call, call.get("index", position), call.get("id"), function.get("name"))
            if function.get("arguments"):
                yield from self._emit(function["arguments"], [])

    def close(self) -> Iterator[Event]:
        """Ends the item that is open."""
        if self._open is None:
            return
        self._open.logprobs += self._held  # an end token, say, has one and no text
        closing, item = self._open.closing(), self._open.item("completed")
        yield from self._placed([*closing, {"type": "response.output_item.done", "item": item}])
        self.done.append(item)
        self._open = None

    def _turn_to(self, kind: type[_Open], index: int = 0, *of_call: str | None) -> Iterator[Event]:
        """Makes sure that the item which is open is of this kind and, of calls, the one with this index."""
        if isinstance(self._open, kind) and self._open.index == index:
            return
        yield from self.close()
        self._open = opened = kind(index, *of_call)
        added = {"type": "response.output_item.added", "item": opened.item("in_progress")}
        yield from self._placed([added, *opened.opening()])

    def _emit(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        assert self._open is not None
        self._open.text += text
        self._open.logprobs += logprobs
        yield from self._placed([self._open.delta(text, logprobs)])

    def _placed(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            yield event | {"output_index": len(self.done)}


class _Open(ABC):
    """An item that is being made. What it gives are events that lack their place."""

    prefix: ClassVar[str]  # of the id

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []

    @abstractmethod
    def item(self, status: str) -> dict[str, Any]:
        """As it stands in `output`, in progress or completed."""

    @abstractmethod
    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        """More of it."""

    @abstractmethod
    def opening(self) -> list[Event]:
        """What comes after it was added."""

    @abstractmethod
    def closing(self) -> list[Event]:
        """What comes before it is done."""


class _Text(_Open):
    prefix = "msg"

    def item(self, status: str) -> dict[str, Any]:
        return _message(self.id, [self._part()] if self.text else [], status)

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        shown = [
            {
                **_without_bytes(entry),
                "top_logprobs": [_without_bytes(other) for other in entry["top_logprobs"]],
            }
            for entry in logprobs
        ]
        return self._event("response.output_text.delta", delta=text, logprobs=shown)

    def opening(self) -> list[Event]:
        return [self._event("response.content_part.added", part=_output_text("", []))]

    def closing(self) -> list[Event]:
        return [
            self._event("response.output_text.done", text=self.text, logprobs=[]),
            self._event("response.content_part.done", part=self._part()),
        ]

    def _part(self) -> dict[str, Any]:
        return _output_text(self.text, self.logprobs or None)

    def _event(self, type: str, **fields: Any) -> Event:
        return {"type": type, "item_id": self.id, "content_index": 0, **fields}


class _Reasoning(_Open):
    prefix = "rs"

    def item(self, status: str) -> dict[str, Any]:
        content = [self._part()] if status == "completed" else None
        return {
            "id": self.id,
            "summary": [],
            "type": "reasoning",
            "content": content,
            "encrypted_content": None,
            "status": status,
        }

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        return self._event("response.reasoning_text.delta", delta=text)

    def opening(self) -> list[Event]:
        return [self._event("response.content_part.added", part=self._part())]

    def closing(self) -> list[Event]:
        return [
            self._event("response.reasoning_text.done", text=self.text),
            self._event("response.content_part.done", part=self._part()),
        ]

    def _part(self) -> dict[str, Any]:
        return {"text": self.text, "type": "reasoning_text"}

    def _event(self, type: str, **fields: Any) -> Event:
        return {"type": type, "item_id": self.id, "content_index": 0, **fields}


class _Call(_Open):
    prefix = "fc"

    def __init__(self, index: int, call_id: str | None = None, name: str | None = None) -> None:
        super().__init__(index)
        self._call_id = call_id or f"call_{uuid.uuid4().hex}"
        self._name = name or ""

    def item(self, status: str) -> dict[str, Any]:
        return {
            "arguments": self.text,
            "call_id": self._call_id,
            "name": self._name,
            "type": "function_call",
            "id": self.id,
            "async": None,
            "caller": None,
            "namespace": None,
            "status": status,
        }

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        return {"type": "response.function_call_arguments.delta", "item_id": self.id, "delta": text}

    def opening(self) -> list[Event]:
        return []

    def closing(self) -> list[Event]:
        done = {"type": "response.function_call_arguments.done", "item_id": self.id}
        return [done | {"arguments": self.text, "name": self._name}]


def silence() -> dict[str, Any]:
    """The message of an answer that has no text."""
    return _message(f"msg_{uuid.uuid4().hex}", [], "completed")


def _message(id: str, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {
        "id": id,
        "content": content,
        "role": "assistant",
        "status": status,
        "type": "message",
        "phase": None,
    }


def _output_text(text: str, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    """A part of a message."""
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"]}
