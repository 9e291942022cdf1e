"""The chat that a body of POST /v1/messages asks for."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from serve.api.messages_protocol import Block, Content, CountTokensRequest, MessagesRequest, Thinks, Turn
from serve.api.model import Model
from serve.api.protocol import ChatRequest
from serve.errors import InvalidRequest

# What a well-known client puts first into the system prompt: it differs in each request, says nothing to a model, and
# would keep the prefix from being found in the cache. vLLM leaves it out, too.
BILLING = "x-anthropic-billing-header"
# Where a chat's complaint is about what is called otherwise here.
RENAMED = {"stop": "stop_sequences", "response_format": "output_config", "reasoning_effort": "output_config"}
# Whether a template takes a system message that is not the first is seen by trying.
PROBE = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]


async def chat_of(body: CountTokensRequest, model: Model) -> ChatRequest:
    """The chat. Raises InvalidRequest, or Overloaded where a template has to be tried and none is free."""
    inline = any(turn.role == "system" for turn in body.messages)
    merged = inline and await _system_comes_first(model)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body, merged),
        "chat_template_kwargs": body.chat_template_kwargs,
        **_tools(body),
    }
    if body.thinking is not None and body.thinking.type == "disabled":
        fields["reasoning_effort"] = "none"
    elif body.output_config is not None and body.output_config.effort is not None:
        fields["reasoning_effort"] = body.output_config.effort
    if isinstance(body, MessagesRequest):
        fields |= _generation(body)
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        raise InvalidRequest(f"{RENAMED.get(where, where)}: {first['msg']}", RENAMED.get(where, where)) from None


def _generation(body: MessagesRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "cache_salt": body.cache_salt,
        "kv_transfer_params": body.kv_transfer_params,
        "vllm_xargs": body.vllm_xargs,
        "thinking_token_budget": body.thinking.budget_tokens if isinstance(body.thinking, Thinks) else None,
        "stream": body.stream,
    }
    if body.stream:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    format = body.output_config and body.output_config.format
    if format and format.schema_ is not None:
        schema = {"name": format.type, "schema": format.schema_}
        fields["response_format"] = {"type": format.type, "json_schema": schema}
    return fields


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    tools = []
    for tool in body.tools or []:
        schema = {"type": "object"} | tool.input_schema
        function = {"name": tool.name, "description": tool.description, "parameters": schema, "strict": tool.strict}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    if not tools and (choice is None or choice.type in ("auto", "none")):
        return {}
    if choice is None:
        return {"tools": tools, "tool_choice": "auto"}
    named = {"type": "function", "function": {"name": choice.name}}
    choices: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    return {
        "tools": tools or None,
        "tool_choice": choices[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


# ---------------------------------------------------------------- messages


async def _system_comes_first(model: Model) -> bool:
    try:
        await model.renderer.render(PROBE, {"add_generation_prompt": False})
    except InvalidRequest:
        return True
    return False


def _messages(body: CountTokensRequest, merged: bool) -> list[dict[str, Any]]:
    """`merged`: system messages from among the others stand with the first."""
    system = [_system(body.system)] if body.system else []
    made: list[dict[str, Any]] = []
    for index, turn in enumerate(body.messages):
        if turn.role != "system":
            made += _turn(turn, f"messages[{index}].content")
        elif merged:
            system.append(_system(turn.content))
        elif text := _system(turn.content):
            made.append({"role": "system", "content": text})
    first = "".join(system)
    return [{"role": "system", "content": first}, *made] if first else made


def _system(content: Content) -> str:
    texts = [content] if isinstance(content, str) else [block.text or "" for block in content if block.type == "text"]
    return "".join(text for text in texts if not text.startswith(BILLING))


def _turn(turn: Turn, where: str) -> list[dict[str, Any]]:
    """A user's turn: the results of tools, each a message, then what was said. An assistant's: one message."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    parts: list[str] = []
    message: dict[str, Any] = {"role": turn.role}
    for block in turn.content:
        if block.type == "text":
            parts += [block.text] if block.text else []
        elif block.type == "thinking":
            message["reasoning"] = message.get("reasoning", "") + (block.thinking or "")
        elif block.type == "tool_use":
            message.setdefault("tool_calls", []).append(_call(block))
        elif block.type == "tool_result" and turn.role == "user":
            results.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": _result(block, where)})
        elif block.type == "tool_result":
            parts.append(f"Tool result: {_result(block, where)}")
        elif block.type not in ("redacted_thinking", "tool_reference"):  # which a client sends back and none can read
            raise InvalidRequest(
                f"{where} has a block of type {block.type!r}; this server takes text, thinking, tool_use and "
                "tool_result.",
                "messages",
            )
    if parts:
        message["content"] = parts[0] if len(parts) == 1 else [{"type": "text", "text": text} for text in parts]
    silent = turn.role == "user" and not parts
    return results if silent else [*results, message]


def _call(block: Block) -> dict[str, Any]:
    function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
    return {"id": block.id or "call_0", "type": "function", "function": function}


def _result(block: Block, where: str) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    for part in block.content:
        if part.type != "text":
            raise InvalidRequest(
                f"{where} has a tool_result with a part of type {part.type[:50]!r}; this server takes 'text' alone.",
                "messages",
            )
    return "\n".join(part.text or "" for part in block.content)
