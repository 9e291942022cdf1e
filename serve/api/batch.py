"""/v1/chat/completions/batch: many conversations in one request, under the same settings, and one choice for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import Field, ValidationError

from serve.api import validation
from serve.api.answers import Answer, gather
from serve.api.chat import ChatAnswer
from serve.api.client import Group
from serve.api.model import Model
from serve.api.prompts import MAX_PROMPTS
from serve.api.protocol import Body, ChatRequest, Message
from serve.api.service import Service, only_json
from serve.errors import InvalidRequest

# What a chat may ask and a batch may not, with what is said of it.
REFUSED = {
    "use_beam_search": "Batch chat completions do not support beam search. Please set `use_beam_search` to False.",
    "stream": "Batch chat completions do not support streaming. Please set `stream` to False.",
    "tools": "Batch chat completions do not support tools. Please leave `tools` out.",
}


class BatchRequest(Body):
    """All other fields are those of a chat, and each conversation's."""

    messages: Annotated[
        list[Annotated[list[Message], Field(min_length=1, fail_fast=True)]], Field(min_length=1, fail_fast=True)
    ]

    def chats(self) -> list[ChatRequest]:
        """Raises InvalidRequest, or RequestValidationError where a field has the wrong type."""
        settings = self.model_extra or {}
        if len(self.messages) > MAX_PROMPTS:
            raise InvalidRequest(f"messages has {len(self.messages)} chats; it may have {MAX_PROMPTS}.", "messages")
        for name, sentence in REFUSED.items():
            if settings.get(name):
                raise InvalidRequest(sentence, name)
        if settings.get("n") not in (None, 1):
            raise InvalidRequest("Batch chat completions do not support `n > 1`. Please set `n` to 1.", "n")
        try:
            return [ChatRequest.model_validate(settings | {"messages": messages}) for messages in self.messages]
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def install(app: FastAPI, service: Service) -> None:
    """Puts the route on the app."""

    @app.post("/v1/chat/completions/batch", dependencies=[Depends(only_json)])
    async def batch(body: BatchRequest, request: Request) -> Response:
        chats = body.chats()
        jobs: list[validation.Job] = []

        async def validate(first: ChatRequest, model: Model) -> validation.Job:
            """All conversations as the prompts of one job."""
            for chat in chats:
                jobs.append(await validation.chat(chat, model))
            prompts = [prompt for job in jobs for prompt in job.prompts]
            params = [params for job in jobs for params in job.params]
            return replace(jobs[0], prompts=prompts, params=params, forms=[one for job in jobs for one in job.forms])

        def shape(id: str, first: ChatRequest, job: validation.Job, *given: Any, **settings: Any) -> BatchAnswer:
            pairs = zip(chats, jobs, strict=True)
            return BatchAnswer([ChatAnswer(id, chat, own, *given, **settings) for chat, own in pairs])

        return await service.answer(chats[0], request, validate, shape, sequences=len(chats))


class BatchAnswer:
    """The answers of several chats as the choices of one."""

    def __init__(self, chats: list[ChatAnswer]) -> None:
        self._chats: list[Answer] = [*chats]
        self.id = chats[0].id

    def usage(self) -> dict[str, Any]:
        """Of all together."""
        each = [chat.usage() for chat in self._chats]
        return {name: sum(one[name] for one in each) for name in ("prompt_tokens", "total_tokens", "completion_tokens")}

    async def whole(self, group: Group) -> dict[str, Any]:
        """A chat's body. What is of one prompt is not in it. Raises GenerationFailed or EngineDead."""
        outputs = await gather(group)
        bodies = [chat.body([output]) for chat, output in zip(self._chats, outputs, strict=True)]
        choices = [body["choices"][0] | {"index": index} for index, body in enumerate(bodies)]
        nothing = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return bodies[0] | {"choices": choices, "usage": self.usage() | details} | nothing

    async def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """A batch is not streamed, and says so where it is asked."""
        yield await self.whole(group)
