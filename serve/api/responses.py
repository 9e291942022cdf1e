"""OpenAI's Responses API, as vLLM serves it: /v1/responses answers a chat in other words.

Nothing is kept between requests, as in vLLM without its store: `store` is passed over, and every id is unknown.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from lm.params import SamplingParams
from serve.api import validation
from serve.api.answers import Answer
from serve.api.chat import ChatAnswer
from serve.api.client import Group
from serve.api.gate import clean_id
from serve.api.model import Model
from serve.api.protocol import Body, ChatRequest
from serve.api.responses_chat import RENAMED, chat_of, unknown
from serve.api.responses_events import OutputItems, silence
from serve.api.responses_protocol import Format, ResponsesRequest
from serve.api.service import Service, only_json
from serve.errors import InvalidRequest, InvalidResponsesRequest

# What the object shows of a function, where the request has not said it.
FUNCTION = {
    "name": "",
    "parameters": None,
    "strict": None,
    "type": "function",
    "allowed_callers": None,
    "async": None,
    "defer_loading": None,
    "description": None,
    "output_schema": None,
}
STATUS = {"length": "incomplete", "abort": "cancelled"}  # of a response by its finish_reason; else completed


def install(app: FastAPI, service: Service) -> None:
    """Puts the routes on the app."""
    config = service.client.config
    flags = service.model.flags
    parsed = flags.reasoning is not None or flags.tool_parser is not None
    block = config.block_size if config.enable_prefix_caching and not service.model.ready.source else 0

    @app.post("/v1/responses", dependencies=[Depends(only_json)])
    async def responses(body: ResponsesRequest, request: Request) -> Any:
        service.model.check_name(body.model)

        def shape(id: str, chat: ChatRequest, *given: Any, **settings: Any) -> ResponsesAnswer:
            return ResponsesAnswer(body, ChatAnswer(id, chat, *given, **settings), block, parsed=parsed)

        chat = chat_of(body)
        return await service.answer(chat, request, _validate, shape, named_events=True)

    @app.get("/v1/responses/{response_id}")
    async def kept(response_id: str, starting_after: int | None = None, stream: bool | None = False) -> Response:
        raise unknown(response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        raise unknown(response_id)


async def _validate(chat: ChatRequest, model: Model) -> validation.Job:
    """As every chat, with complaints that name what the client has sent."""
    try:
        return await validation.chat(chat, model)
    except InvalidRequest as error:
        if error.param == "max_tokens" and (chat.max_tokens is None or 1 <= chat.max_tokens <= model.max_model_len):
            raise InvalidResponsesRequest(
                f"The prompt fills the model's context of {model.max_model_len} tokens and leaves no room for an "
                "answer; please reduce the prompt.",
                "input",
            ) from None
        param = RENAMED.get(error.param or "", error.param)
        sentence = error.message if param == error.param else re.sub(rf"\b{error.param}\b", str(param), error.message)
        raise InvalidRequest(sentence, param) from None


class ResponsesAnswer:
    """A chat's answer as a response: output items in place of choices. `block`: how many tokens of a prompt are kept
    together in the prefix cache; 0 without one. `parsed`: whether thoughts or calls are looked for; as in vLLM, silence
    is no message then.
    """

    def __init__(self, request: ResponsesRequest, chat: Answer, block: int, *, parsed: bool = False) -> None:
        self._request, self._chat, self._block, self._parsed = request, chat, block, parsed
        self.id = clean_id(request.request_id or "") or f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())

    def usage(self) -> dict[str, Any]:
        return self._chat.usage()

    async def whole(self, group: Group) -> dict[str, Any]:
        """The response, complete. Raises GenerationFailed or EngineDead."""
        body = await self._chat.whole(group)
        (choice,) = body["choices"]
        items, message = OutputItems(), choice["message"]
        for _ in items.feed(message, (choice["logprobs"] or {}).get("content")):
            pass
        for _ in items.close():
            pass
        output = items.done
        for item in output:
            if item["type"] == "reasoning":
                item["status"] = None  # only a stream says it
        messages = self._messages(
            body["prompt_text"], body["prompt_token_ids"], message["content"], choice["token_ids"]
        )
        if not output and not self._parsed:
            output = [silence()]
        return self._response(choice["finish_reason"], output, **messages)

    async def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """The events. An error is one, too: the status has been sent by now."""
        number = 0

        def numbered(event: dict[str, Any]) -> dict[str, Any]:
            nonlocal number
            number += 1
            return event | {"sequence_number": number - 1}

        begun = self._response(None, [])
        yield numbered({"type": "response.created", "response": begun})
        yield numbered({"type": "response.in_progress", "response": begun})
        items, finish_reason = OutputItems(), None
        text, ids = "", list[int]()
        prompt: dict[str, Any] = {}
        async for chunk in self._chat.chunks(group):
            if "error" in chunk:
                error = chunk["error"]
                shown = {"code": str(error["code"]), "message": error["message"], "param": error["param"]}
                yield numbered({"type": "error", **shown, "error": error})
                return
            prompt = prompt or chunk
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                text += choice["delta"].get("content") or ""
                ids += choice.get("token_ids") or []
                for event in items.feed(choice["delta"], (choice["logprobs"] or {}).get("content")):
                    yield numbered(event)
        for event in items.close():
            yield numbered(event)
        messages = self._messages(prompt.get("prompt_text"), prompt.get("prompt_token_ids"), text, ids)
        response = self._response(finish_reason, items.done, **messages)
        yield numbered({"type": "response.completed", "response": response})

    def _messages(
        self, prompt: str | None, prompt_ids: list[int] | None, text: str | None, ids: list[int] | None
    ) -> dict[str, Any]:
        """What went into the model and came out of it, where that was asked for."""
        if not self._request.enable_response_messages:
            return {}
        return {"input_messages": [_raw(prompt, prompt_ids)], "output_messages": [_raw(text, ids)]}

    def _response(self, finish_reason: str | None, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The response object; in progress where there is no finish_reason yet."""
        request, params = self._request, self._chat.job.params[0]
        assert isinstance(params, SamplingParams)
        status = STATUS.get(finish_reason, "completed") if finish_reason else "in_progress"
        return {
            "id": self.id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "metadata": request.metadata,
            "model": self._chat.model_name,
            "object": "response",
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "temperature": params.temperature,
            "tool_choice": request.tool_choice if request.tools else "none",
            "tools": [FUNCTION | tool for tool in request.tools],
            "top_p": 1.0 if params.greedy else params.top_p,
            "background": False,
            "max_output_tokens": params.max_tokens,
            "max_tool_calls": request.max_tool_calls,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": request.reasoning and _known(request.reasoning),
            "service_tier": request.service_tier,
            "status": status,
            "text": request.text and {**_known(request.text), "format": _format(request.text.format)},
            "top_logprobs": params.logprobs,
            "truncation": request.truncation or "disabled",
            "usage": self._counts() if finish_reason else None,
            "user": request.user,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
            **more,
        }

    def _counts(self) -> dict[str, Any]:
        """Tokens. A prompt leaves its whole blocks in the cache; of several turns (which tools that a server runs would
        make) there are none.
        """
        usage = self._chat.usage()
        prompt, cached = usage["prompt_tokens"], self._chat.choices[0].cached
        details = usage.get("completion_tokens_details") or {}
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": max(0, prompt // self._block * self._block - cached) if self._block else 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": details.get("reasoning_tokens") or 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": usage["total_tokens"],
        }


def _raw(text: str | None, ids: list[int] | None) -> dict[str, Any]:
    return {"message": text or "", "tokens": ids or [], "type": "raw_message_tokens"}


def _format(format: Format | None) -> dict[str, Any] | None:
    if format is None or format.type != "json_schema":
        return None if format is None else {"type": format.type}
    return {name.rstrip("_"): value for name, value in _known(format).items()}


def _known(body: Body) -> dict[str, Any]:
    """The fields that we know, without what else was sent."""
    return {name: getattr(body, name) for name in type(body).model_fields}
