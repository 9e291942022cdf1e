"""The chat that a body of POST /v1/responses asks for.

What OpenAI's API keeps between requests (responses, conversations, prompt templates) or runs itself (tools but
functions) is not here and is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import ValidationError

from serve.api.protocol import ChatRequest
from serve.api.responses_protocol import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
)
from serve.errors import InvalidRequest, InvalidResponsesRequest, UnknownResponse

TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
UNFINISHED = ("in_progress", "incomplete")  # statuses of a last message that the answer continues

# Fields that have the same name and meaning in a chat.
SHARED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logit_bias",
    "chat_template_kwargs",
    "cache_salt",
    "priority",
    "structured_outputs",
    "kv_transfer_params",
    "vllm_xargs",
    "include_reasoning",
    "parallel_tool_calls",
)
# Where a chat's complaint is about what is called otherwise here.
RENAMED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The chat that answers it. Raises InvalidRequest, InvalidResponsesRequest or UnknownResponse."""
    _refuse(body)
    continues = _continues(body)
    fields: dict[str, Any] = {name: getattr(body, name) for name in SHARED}
    fields |= {
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "logprobs": body.wants_logprobs,
        "top_logprobs": (body.top_logprobs or 0) if body.wants_logprobs else 0,
        "stream": body.stream,
        "response_format": _response_format(body),
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        "return_token_ids": body.enable_response_messages,
        "return_prompt_text": body.enable_response_messages,
        "truncate_prompt_tokens": None if body.truncation == "disabled" else -1,
    }
    for name, value in (("tools", [body.tools, body.tool_choice]), ("text", fields["response_format"])):
        _check_sendable(value, name)
    if body.tools:
        fields |= {"tools": [_tool(tool, i) for i, tool in enumerate(body.tools)], "tool_choice": _tool_choice(body)}
    elif body.tool_choice not in ("auto", "none"):
        raise InvalidRequest(_no_tool(body.tool_choice), "tool_choice")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        raise InvalidRequest(f"{RENAMED.get(where, where)}: {first['msg']}", RENAMED.get(where, where)) from None


def _refuse(body: ResponsesRequest) -> None:
    if body.background:
        if not body.store:
            raise InvalidRequest("background can only be used when `store` is true", "background")
        raise InvalidResponsesRequest(
            "This server does not support `store=True` and therefore does not support the background mode.",
            "background",
        )
    if body.prompt is not None:
        raise InvalidRequest("prompt template is not supported", "prompt")
    if body.previous_input_messages and body.previous_response_id:
        raise InvalidResponsesRequest(
            "Only one of `previous_input_messages` and `previous_response_id` can be set.", "previous_response_id"
        )
    if body.previous_response_id is not None:
        raise unknown(body.previous_response_id)
    for name in ("conversation", "previous_input_messages"):
        if getattr(body, name):
            raise InvalidRequest(f"{name} is not supported by this server; send what was said before as input.", name)
    if body.structured_outputs and body.text is not None and body.text.format is not None:
        raise InvalidRequest("Cannot specify both structured_outputs and text.format", "structured_outputs")


def _check_sendable(value: Any, name: str) -> None:
    """Raises InvalidRequest for what JSON lets in and does not let out: the response shows it again."""
    try:
        msgspec.json.encode(value)
    except (UnicodeEncodeError, RecursionError):
        raise InvalidRequest(f"{name} is nested too deeply, or has half of a surrogate pair.", name) from None


def unknown(response_id: str) -> UnknownResponse:
    """Every id is: responses are not kept."""
    return UnknownResponse(f"Response with id '{response_id[:200]}' not found.", "response_id")


def _continues(body: ResponsesRequest) -> bool:
    last = body.input[-1] if isinstance(body.input, list) and body.input else None
    begun = isinstance(last, ReasoningItem) or (isinstance(last, MessageItem) and last.role == "assistant")
    return begun and getattr(last, "status", None) in UNFINISHED


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    format = body.text and body.text.format
    if not format or format.type == "text":
        return None
    if format.type == "json_object":
        return {"type": "json_object"}
    if format.schema_ is None:
        raise InvalidRequest("text.format of type json_schema needs a schema.", "text")
    schema = {"name": format.name or "schema", "schema": format.schema_, "strict": format.strict}
    return {"type": "json_schema", "json_schema": schema}


# ---------------------------------------------------------------- tools


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    """A function in a chat's form. Raises InvalidRequest for tools that a server would have to run."""
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"tools[{index}] has the type {str(tool.get('type'))[:50]!r}; this server takes 'function' alone.", "tools"
        )
    if not isinstance(tool.get("name"), str):
        raise InvalidRequest(f"tools[{index}] has no name.", "tools")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(body: ResponsesRequest) -> str | dict[str, Any]:
    choice = body.tool_choice
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function":
        raise InvalidRequest(
            f"tool_choice has the type {str(choice.get('type'))[:50]!r}; this server takes 'function' alone.",
            "tool_choice",
        )
    if choice.get("name") not in [tool.get("name") for tool in body.tools]:
        raise InvalidRequest(_no_tool(choice), "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}


def _no_tool(choice: Any) -> str:
    if choice == "required":
        return "Tool choice 'required' must be specified with 'tools' parameter."
    return "Tool choice 'function' not found in 'tools' parameter."


# ---------------------------------------------------------------- messages


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """What an assistant thought, said and called in one turn are items here and one message of a chat."""
    made: list[dict[str, Any]] = []
    if body.instructions:
        made.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        message = _message(item, f"input[{index}]")
        before = made[-1] if made and made[-1]["role"] == message["role"] == "assistant" else None
        if before is not None and _joined(before, message):
            continue
        made.append(message)
    return made


def _message(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, MessageItem):
        parts = _texts(item.content, f"{where}.content")
        if item.role == "assistant":
            return {"role": "assistant", "content": "".join(parts)}
        content = parts[0] if isinstance(item.content, str) else [{"type": "text", "text": text} for text in parts]
        return {"role": item.role, "content": content}
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, FunctionCallOutputItem):
        content = "".join(_texts(item.output, f"{where}.output"))
        return {"role": "tool", "content": content, "tool_call_id": item.call_id}
    if isinstance(item, ReasoningItem):
        if item.encrypted_content:
            raise InvalidRequest("Encrypted content is not supported.", "input")
        return {"role": "assistant", "reasoning": "".join(_thoughts(item, where))}
    raise InvalidRequest(f"Unsupported input item type: {str(item.type)[:50]}", "input")


def _joined(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Puts into the assistant's message before it what that one does not have yet; whether that could be done."""
    if "tool_calls" in message:
        before.setdefault("tool_calls", []).extend(message["tool_calls"])
        return True
    (name,) = message.keys() - {"role"}
    if name in before:
        return False
    before[name] = message[name]
    return True


def _texts(content: str | list[Part], where: str) -> list[str]:
    return [content] if isinstance(content, str) else [_text(part, where) for part in content]


def _text(part: Part, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in TEXT_PARTS or text is None:
        raise InvalidRequest(
            f"{where} has a part of type {part.type[:50]!r}; this server takes texts alone: 'input_text' and "
            "'output_text', each with its text.",
            "input",
        )
    return text


def _thoughts(item: ReasoningItem, where: str) -> list[str]:
    parts = item.content or item.summary or []
    texts = [part if isinstance(part, str) else part.text for part in parts]
    if None in texts:
        raise InvalidRequest(f"{where} has a part without a text.", "input")
    return [text for text in texts if text is not None]
