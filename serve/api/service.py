"""What every generating route does: validate, give to the engine, and answer in one body or as a stream."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from serve.api import request_log, validation
from serve.api.client import EngineClient, Group
from serve.api.errors import json_response, log
from serve.api.gate import clean_id
from serve.api.http import EventStream, while_connected
from serve.api.load_header import ASKED, load_header
from serve.api.metrics import Metrics
from serve.api.model import Model
from serve.api.protocol import GenerationRequest
from serve.errors import InvalidRequest, Overloaded


class Reply(Protocol):
    """How a group's outputs are shown: answers.Answer, or what puts one into the words of another API."""

    id: str

    async def whole(self, group: Group) -> dict[str, Any]:
        """The non-streaming body. Raises GenerationFailed or EngineDead."""

    def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts of tokens, so far."""


Validate = Callable[[Any, Model], Awaitable[validation.Job]]
Shape = Callable[..., Reply]  # of id, body, job, model, fingerprint; prompt_details


async def only_json(request: Request) -> None:
    """Raises RequestValidationError, as vLLM does, unless the body says that it is JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestValidationError([{"loc": (), "msg": "Unsupported Media Type: Only 'application/json' is allowed"}])


class Service:
    """The model, the engine that runs it, and what the server says of both: all that a route needs."""

    def __init__(
        self,
        model: Model,
        client: EngineClient,
        metrics: Metrics,
        *,
        fingerprint: str | None,
        prompt_details: bool = False,
        log_requests: bool = False,
        max_log_len: int = 0,
        keep_alive: float = 0,
    ) -> None:
        self.model, self.client, self.metrics = model, client, metrics
        self._fingerprint, self._prompt_details, self._log_requests = fingerprint, prompt_details, log_requests
        self._max_log_len, self._keep_alive = max_log_len, keep_alive

    async def answer(
        self,
        body: GenerationRequest,
        request: Request,
        validate: Validate,
        shape: Shape,
        *,
        named_events: bool = False,
        sequences: int | None = None,
    ) -> Response:
        """Raises what `validate` and the engine's client raise; `named_events` as EventStream has it; `sequences`: how
        many there will be, where the body does not tell.
        """
        model, client = self.model, self.client
        try:
            client.admit(sequences or validation.sequences(body))  # before any work is done for it
            job = await validate(body, model)
            group = client.submit(
                job.work(),
                grammar=job.grammar,
                constraints=job.constraints(),
                n=job.n,
                stream=bool(body.stream),
                generate=job.generate,
                priority=_priority(body, request),
                cache_salt=_salt(body, request),
            )
        except Overloaded as error:
            if error.limit is not None:
                self.metrics.rejections[error.limit].inc()
            raise
        reply = shape(
            _request_id(body, request), body, job, model, self._fingerprint, prompt_details=self._prompt_details
        )

        def leave() -> None:
            group.close()
            if self._log_requests:
                prompts = [(prompt.text, prompt.ids) for prompt in job.prompts]
                log.info("%s", request_log.line(reply.id, group, prompts, self._max_log_len))

        if body.stream:
            return EventStream(reply.chunks(group), leave, named=named_events, keep_alive=self._keep_alive)
        try:
            content = await while_connected(request, reply.whole(group))
        finally:
            leave()
        if content is None:
            return Response(status_code=499)
        return json_response(content, headers=load_header(request.headers.get(ASKED), self.metrics.load))


def _request_id(body: GenerationRequest, request: Request) -> str:
    """The client's own id (header before field), as far as it is fit to be one; else a new one."""
    wanted = clean_id(request.headers.get("x-request-id") or body.request_id or "")
    return wanted or getattr(request.state, "request_id", None) or uuid.uuid4().hex


def _priority(body: GenerationRequest, request: Request) -> int:
    """The header's (a proxy's word) before the body's (the client's). Raises InvalidRequest."""
    wanted = request.headers.get("x-vllm-priority")
    if wanted is None:
        return body.priority
    match = re.fullmatch(r"\s*([+-]?\d{1,18})\s*", wanted, flags=re.ASCII)
    if match is None:
        raise InvalidRequest(f"The header X-Vllm-Priority is {wanted[:50]!r} and must be a whole number.", "priority")
    return int(match[1])


def _salt(body: GenerationRequest, request: Request) -> str | None:
    """Whose prefixes a request may find: those of its own key, and of its own cache_salt. The time to a first token
    tells what was cached, so that nobody may find what another has asked.
    """
    parts = [getattr(request.state, "key", None), body.cache_salt]
    return None if parts == [None, None] else "/".join(part or "" for part in parts)
