"""How a chat's answer is read: thoughts, content and calls of tools, in one machine for streams and bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.api.reasoning import Reasoning
from serve.api.tool_parsers import CallDelta, calls_of
from serve.api.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is looked for in the answers of a request, and what of it is shown."""

    reasoning: Reasoning | None = None
    over: bool = False  # thinking has ended before the answer begins
    shows_thoughts: bool = True
    tools: ToolUse | None = None

    @property
    def thinks(self) -> bool:
        """Whether answers begin with thoughts."""
        return self.reasoning is not None and not self.over

    def reader(self) -> Reader:
        """For one answer."""
        return Reader(self)


@dataclass
class Read:
    """What a piece of text has brought."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class Reader:
    """Reads one answer."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._thoughts = None if reading.reasoning is None else reading.reasoning.reader(over=reading.over)
        self._tools = None if reading.tools is None else reading.tools.parser()
        self.calls = 0  # that have been shown
        self.thought = 0  # tokens of thoughts, the tags not counted
        self._thinking = reading.thinks  # still

    def feed(self, text: str, tokens: Sequence[int], *, last: bool) -> Read:
        """What is settled with this text; everything, with the last. `tokens` are those that have come with it."""
        made = Read()
        self._count(tokens)
        if self._thoughts is None:
            content = text
        else:
            thought = self._thoughts.feed(text)
            made.reasoning, content = thought
            if last:
                thought = self._thoughts.finish()
                made.reasoning, content = made.reasoning + thought.reasoning, content + thought.content
            if not self._reading.shows_thoughts:
                made.reasoning = ""
        if self._tools is None:
            made.content = content
            return made
        for piece in [self._tools.feed(content)] + ([self._tools.finish()] if last else []):
            made.content += piece.content
            made.calls += piece.calls
        use = self._reading.tools
        assert use is not None
        if use.single:
            made.calls = [call for call in made.calls if call.index == 0]
        self.calls += sum(call.id is not None for call in made.calls)
        return made

    def _count(self, tokens: Sequence[int]) -> None:
        reasoning = self._reading.reasoning
        if not self._thinking or reasoning is None:
            return
        for token in tokens:
            if token == reasoning.end:
                self._thinking = False
                break
            self.thought += token != reasoning.start


def message_calls(calls: list[CallDelta]) -> list[dict[str, Any]]:
    """The tool_calls of a message."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls_of(calls)
    ]


def delta_calls(calls: list[CallDelta]) -> list[dict[str, Any]]:
    """The tool_calls of a delta: id, type and name once a call."""
    made = []
    for call in calls:
        if call.id is None:
            made.append({"index": call.index, "function": {"arguments": call.arguments}})
        else:
            function = {"name": call.name, "arguments": call.arguments}
            made.append({"id": call.id, "type": "function", "index": call.index, "function": function})
    return made
