"""Tools of a chat: which are offered, whether one has to be called, and the grammar of what has to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.form_protocol import Function
from serve.api.model import Model
from serve.api.protocol import ChatRequest
from serve.api.tool_parsers import PARSERS, ToolParser
from serve.engine.messages import Grammar
from serve.errors import InvalidRequest

USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
ANYTHING = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """How a chat's answer is read for calls: `choice` is "auto", "required" or "named"."""

    parser: type[ToolParser]
    choice: str
    single: bool  # calls after the first are not shown

    def reason(self, reason: str | None, calls: int) -> str | None:
        """The finish_reason of an answer with so many calls; that of one to a named tool is "stop", as in vLLM."""
        return "tool_calls" if reason == "stop" and calls and self.choice != "named" else reason


def check(body: ChatRequest, model: Model) -> ToolUse | None:
    """None where calls are not looked for. Raises InvalidRequest."""
    if body.tools is not None and not body.tools:
        raise InvalidRequest(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools"
        )
    choice: Any = body.tool_choice
    if "tool_choice" not in body.model_fields_set:
        choice = "auto" if body.tools else "none"
    asked = body.structured_outputs
    if (
        isinstance(choice, dict)
        and asked
        and any(one is not None for one in (asked.schema_, asked.regex, asked.choice))
    ):
        raise InvalidRequest(
            "You can only either use constraints for structured outputs or tools, not both.", "structured_outputs"
        )
    if choice in (None, "none"):
        return None
    if body.tools is None:
        raise InvalidRequest("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, str) and choice not in ("auto", "required"):
        raise InvalidRequest(
            f"Invalid value for `tool_choice`: {choice[:50]}! "
            'Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )
    name = _named(body, choice) if isinstance(choice, dict) else None
    flags = model.flags
    if flags.tool_parser is None or not flags.auto_tools:
        if choice == "auto":
            raise InvalidRequest(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', None
            )
        wanted = '"required"' if name is None else f'function "{name[:50]}"'
        raise InvalidRequest(f"tool_choice={wanted} requires --tool-call-parser to be set", None)
    if body.use_beam_search:
        raise InvalidRequest("Calls of tools are not looked for in a beam search; leave use_beam_search out.", "tools")
    kind = choice if name is None else "named"
    return ToolUse(PARSERS[flags.tool_parser], kind, body.parallel_tool_calls is False or name is not None)


async def grammar(body: ChatRequest, use: ToolUse, model: Model) -> Grammar | None:
    """What an answer has to obey in which a tool has to be called. Raises InvalidRequest or Overloaded."""
    if use.choice == "auto":
        return None
    tools = [tool.function for tool in body.tools or []]
    if isinstance(body.tool_choice, dict):
        wanted = body.tool_choice["function"]["name"]
        tools = [next(tool for tool in tools if tool.name == wanted)]
    return await model.grammars.grammar("lark", lark(tools, use), {}, "tools")


def lark(tools: Sequence[Function], use: ToolUse) -> str:
    """The grammar of calls as the parser reads them, in llguidance's Lark."""
    parser = use.parser
    more = "" if use.single else f" ({_quoted(parser.separator)} call)*"
    rules = [f"start: call{more}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        begin = f'{parser.begin}{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{parser.keys[0]}": '
        rules.append(f"call_{i}: {_quoted(begin)} arguments_{i} {_quoted('}' + parser.end)}")
        rules.append(f"arguments_{i}: %json {json.dumps(tool.parameters or ANYTHING)}")
    return "\n".join(rules)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _named(body: ChatRequest, choice: dict[str, Any]) -> str:
    """The name that a tool_choice names. Raises InvalidRequest."""
    function = choice.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(
            f"Invalid value for `function`: `{str(function)[:50]}` in `tool_choice`! {USAGE}", "tool_choice.function"
        )
    if "name" not in function:
        raise InvalidRequest(
            f"Expected field `name` in `function` in `tool_choice`! {USAGE}", "tool_choice.function.name"
        )
    name = function["name"]
    if not isinstance(name, str) or not name:
        raise InvalidRequest(
            f"Invalid `name` in `function`: `{str(name)[:50]}` in `tool_choice`! {USAGE}", "tool_choice.function.name"
        )
    if all(tool.function.name != name for tool in body.tools or []):
        raise InvalidRequest(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )
    return name
