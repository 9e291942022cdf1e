"""What is particular to chats: messages as templates read them, tools, and the chat form of log-probabilities."""

from __future__ import annotations

import json
from typing import Any

from serve.api.model import Model
from serve.api.protocol import ChatRequest, Conversation, Message
from serve.errors import InvalidRequest

# Parts that are text, under any of the names that clients send: the field that holds it.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
UNTRUSTED = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)


async def render(body: Conversation, model: Model) -> str:
    """The prompt's text. Raises InvalidRequest or Overloaded."""
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    asked = {**model.flags.template_kwargs, **(body.chat_template_kwargs or {})}
    template = asked.pop("chat_template", None) if body.chat_template is None else body.chat_template
    if template is not None and not model.renderer.trust_requests:
        raise InvalidRequest(UNTRUSTED, "chat_template")
    if template is not None and not isinstance(template, str):
        raise InvalidRequest("chat_template must be a text.", "chat_template")
    if not body.messages:
        raise InvalidRequest("messages is empty; a chat has at least one message.", "messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    variables: dict[str, Any] = {
        **asked,
        "tools": None if body.tools is None else [tool.shown() for tool in body.tools],
        "documents": body.documents,
        "add_generation_prompt": body.add_generation_prompt,
    }
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    return await model.renderer.render(
        messages,
        variables,
        template=template,
        tools=bool(body.tools),
        continue_final=body.continue_final_message,
    )


def role(body: Conversation, model: Model) -> str:
    """Whose turn the answer is."""
    return model.flags.role if body.add_generation_prompt else body.messages[-1].role


def opening(body: Conversation, role: str) -> str:
    """The last message, where it is of the one who answers."""
    last = body.messages[-1]
    return "\n".join(_texts(last, f"messages[{len(body.messages) - 1}]")) if last.role == role else ""


# ---------------------------------------------------------------- messages


def _message(message: Message, where: str) -> dict[str, Any]:
    extra = message.model_extra or {}
    texts = _texts(message, where)
    content: Any = message.content
    if not isinstance(content, str):
        content = [{"type": "text", "text": text} for text in texts]
    made: dict[str, Any] = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id"):
        if isinstance(extra.get(name), str):
            made[name] = extra[name]
    reasoning = extra.get("reasoning") or extra.get("reasoning_content")
    if message.role == "assistant" and isinstance(reasoning, str):
        made["reasoning"] = made["reasoning_content"] = reasoning  # templates use either name
    if message.role == "assistant" and extra.get("tool_calls"):
        made["tool_calls"] = _tool_calls(extra["tool_calls"], where)
    return made


def _texts(message: Message, where: str) -> list[str]:
    content = message.content
    if content is None:
        return []
    return [content] if isinstance(content, str) else [_text(part, where) for part in content]


def _text(part: str | dict[str, Any], where: str) -> str:
    if isinstance(part, str):
        raise InvalidRequest(f"{where}.content has a text in place of a part, which is an object.", "messages")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise InvalidRequest(
            f"{where}.content has a part of type {str(kind)[:50]!r}; this server takes 'text' alone.",
            "messages",
        )
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.content has a part of type {kind!r} without a text.", "messages")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of earlier turns, their arguments as the objects that templates expect and not as JSON in a text."""
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InvalidRequest(f"{where}.tool_calls must be a list of calls.", "messages")
    made = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict):
            raise InvalidRequest(f"{where}.tool_calls has a call without a function.", "messages")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {}  # the chat's past cannot be mended: refused, it could never go on
        if not isinstance(arguments, dict):
            arguments = {}
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made


# ---------------------------------------------------------------- fields of a chat request


def logprobs(body: ChatRequest) -> int | None:
    """How many alternatives to show beside each token; None for no log-probabilities. Raises InvalidRequest."""
    top = body.top_logprobs
    if top is not None and top < -1:
        raise InvalidRequest("`top_logprobs` must be a positive value or -1.", "top_logprobs")
    if top and not body.logprobs:
        raise InvalidRequest("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    return (top or 0) if body.logprobs else None
