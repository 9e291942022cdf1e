"""Anthropic's Messages API, as vLLM serves it: /v1/messages answers a chat in other words; count_tokens its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from serve.api import conversation, errors, prompts, tools, validation
from serve.api.answers import Answer
from serve.api.chat import ChatAnswer
from serve.api.client import Group
from serve.api.errors import json_response
from serve.api.messages_chat import RENAMED, chat_of
from serve.api.messages_events import Blocks
from serve.api.messages_protocol import CountTokensRequest, MessagesRequest
from serve.api.model import Model
from serve.api.protocol import ChatRequest
from serve.api.service import Service, only_json
from serve.errors import InvalidRequest, ServeError


def install(app: FastAPI, service: Service) -> None:
    """Puts the routes on the app."""

    @app.post("/v1/messages", dependencies=[Depends(only_json)])
    async def messages(body: MessagesRequest, request: Request) -> Response:
        try:
            chat = await chat_of(body, service.model)
            return await service.answer(chat, request, _validate, _shape, named_events=True)
        except ServeError as error:
            return errors.response(error, errors.anthropic)

    @app.post("/v1/messages/count_tokens", dependencies=[Depends(only_json)])
    async def count_tokens(body: CountTokensRequest) -> Response:
        try:
            count = await _count(await chat_of(body, service.model), service.model)
        except ServeError as error:
            return errors.response(error, errors.anthropic)
        return json_response({"input_tokens": count, "context_management": {"original_input_tokens": count}})


def _shape(*given: Any, **settings: Any) -> MessagesAnswer:
    return MessagesAnswer(ChatAnswer(*given, **settings))


async def _validate(chat: ChatRequest, model: Model) -> validation.Job:
    """As every chat, with complaints that name what the client has sent."""
    try:
        return await validation.chat(chat, model)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, RENAMED.get(error.param or "", error.param)) from None


async def _count(chat: ChatRequest, model: Model) -> int:
    """Tokens of the prompt. Raises InvalidRequest, NotFound or Overloaded."""
    model.check_name(chat.model)
    tools.check(chat, model)
    text = await conversation.render(chat, model)
    prompt = await prompts.of_text(text, chat, model, special=chat.add_special_tokens, param="messages")
    return len(prompt.ids)


class MessagesAnswer:
    """A chat's answer as a message: content blocks in place of choices."""

    def __init__(self, chat: Answer) -> None:
        self._chat = chat
        self.id = chat.id

    def usage(self) -> dict[str, Any]:
        return self._chat.usage()

    async def whole(self, group: Group) -> dict[str, Any]:
        """The message, complete; what there is none of is left out. Raises GenerationFailed or EngineDead."""
        body = await self._chat.whole(group)
        (choice,) = body["choices"]
        blocks = Blocks()
        for _ in blocks.feed(choice["message"]):
            pass
        for _ in blocks.close():
            pass
        reason, sequence = _stop(choice["finish_reason"], choice["stop_reason"], blocks)
        message = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": blocks.done or [{"type": "text", "text": ""}],
            "model": self._chat.model_name,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(body["usage"]),
        }
        return {name: value for name, value in message.items() if value is not None}

    async def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """The events. An error is one, too: the status has been sent by now."""
        blocks, begun = Blocks(), False
        finish_reason = stop_reason = None
        async for chunk in self._chat.chunks(group):
            if "error" in chunk:
                yield errors.anthropic(chunk)
                return
            if not begun:
                begun = True
                yield {"type": "message_start", "message": self._begun(chunk["usage"])}
            for choice in chunk["choices"]:
                if choice["finish_reason"] is not None:
                    finish_reason, stop_reason = choice["finish_reason"], choice["stop_reason"]
                for event in blocks.feed(choice["delta"]):
                    yield event
            if not chunk["choices"]:  # the last, which has the usage
                for event in blocks.close():
                    yield event
                reason, sequence = _stop(finish_reason, stop_reason, blocks)
                delta = {"stop_reason": reason, "stop_sequence": sequence}
                yield {"type": "message_delta", "delta": delta, "usage": _usage(chunk["usage"])}
        yield {"type": "message_stop"}

    def _begun(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._chat.model_name,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    """Here a prompt's tokens are those that were not found in the cache, where that is told at all."""
    counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None:
        return counts
    return counts | {"input_tokens": counts["input_tokens"] - cached, "cache_read_input_tokens": cached}


def _stop(finish_reason: str | None, stop_reason: str | int | None, blocks: Blocks) -> tuple[str | None, str | None]:
    """Why the message ended, and the stop sequence if that was it: a call that one has cut short must not be made."""
    if finish_reason == "length":
        return "max_tokens", None
    if finish_reason not in ("stop", "tool_calls"):
        return None, None
    if blocks.complete:
        return "tool_use", None
    if isinstance(stop_reason, str):
        return "stop_sequence", stop_reason
    return ("tool_use" if blocks.called else "end_turn"), None
