"""The routes. Each reads as: validate, give to the engine, shape the answer. What goes wrong is one of serve/errors."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from lm import __version__
from serve.api import conversation, errors, validation
from serve.api.answers import Answer
from serve.api.chat import ChatAnswer
from serve.api.client import EngineClient, Group
from serve.api.completions import CompletionAnswer
from serve.api.errors import json_response, log
from serve.api.http import EventStream, Gate, while_connected
from serve.api.metrics import Metrics
from serve.api.model import Model
from serve.api.prompts import check_ids, encode
from serve.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeEither,
    TokenizeRequest,
)
from serve.errors import InvalidRequest, NotBuilt, Overloaded

# Routes of the contract that are not there yet: 501 with a sentence, not a 404 that looks like a misspelt URL.
NOT_BUILT = ("/v1/responses", "/v1/messages", "/v1/embeddings", "/invocations")

Validate = Callable[[Any, Model], Awaitable[validation.Job]]


async def only_json(request: Request) -> None:
    """Raises InvalidRequest unless the body says that it is JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("Unsupported Media Type: Only 'application/json' is allowed")


def create_app(
    model: Model,
    client: EngineClient,
    *,
    keys: Sequence[str] = (),
    max_body_bytes: int = 8 << 20,
    prompt_details: bool = False,
    log_requests: bool = False,
) -> FastAPI:
    """The ASGI application over an engine that is ready."""
    app = FastAPI(title="Heed", version=__version__)
    app.add_middleware(Gate, keys=keys, max_body_bytes=max_body_bytes)
    errors.install(app)
    started = int(time.time())
    metrics = Metrics(model.names[0], client, model.ready)
    fingerprint = f"heed-{__version__}"

    # ---------------------------------------------------------------- life

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """Readiness: 503 as soon as the engine is dead or the server drains."""
        return Response(status_code=200 if client.healthy else 503)

    @app.get("/live")
    async def live() -> Response:
        """Liveness: 200 as long as the process answers, draining or not; 503 when the engine is dead."""
        return Response(status_code=503 if client.dead.is_set() else 200)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        return json_response({"server_load": client.in_flight})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---------------------------------------------------------------- models

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_card(name, model, started) for name in model.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        model.check_name(name)
        return json_response(_card(name, model, started))

    # ---------------------------------------------------------------- completions and chats

    async def answered(body: GenerationRequest, request: Request, validate: Validate, shape: type[Answer]) -> Any:
        """What both generating routes do: validate, run, and answer in one body or as a stream."""
        try:
            client.admit(validation.sequences(body))  # before any work is done for it
            job = await validate(body, model)
            group = client.submit(
                job.work(), generate=job.generate, priority=_priority(body, request), cache_salt=_salt(body, request)
            )
        except Overloaded:
            metrics.rejected.inc()
            raise
        metrics.request(job.n, job.params[0].max_tokens)
        answer = shape(_request_id(body, request), body, job, model, fingerprint, prompt_details=prompt_details)

        def leave() -> None:
            group.close()
            if log_requests:
                log.info("%s", _line(answer, group))

        if body.stream:
            return EventStream(answer.chunks(group), leave)
        try:
            content = await while_connected(request, answer.whole(group))
        finally:
            leave()
        return Response(status_code=499) if content is None else json_response(content)

    @app.post("/v1/completions", dependencies=[Depends(only_json)])
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await answered(body, request, validation.completion, CompletionAnswer)

    @app.post("/v1/chat/completions", dependencies=[Depends(only_json)])
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        return await answered(body, request, validation.chat, ChatAnswer)

    # ---------------------------------------------------------------- tokens

    @app.post("/tokenize", dependencies=[Depends(only_json)])
    async def tokenize(body: TokenizeEither) -> Response:
        model.check_name(body.model)
        text = body.prompt if isinstance(body, TokenizeRequest) else await conversation.render(body, model)
        ids = await encode(text, model.tokenizer, add_special_tokens=body.add_special_tokens)
        strings = [model.tokenizer.inner.id_to_token(id) for id in ids] if body.return_token_strs else None
        return json_response(
            {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings}
        )

    @app.post("/detokenize", dependencies=[Depends(only_json)])
    async def detokenize(body: DetokenizeRequest) -> Response:
        model.check_name(body.model)
        check_ids(body.tokens, model, "tokens")
        return json_response({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def not_built(request: Request) -> Response:
        raise NotBuilt(f"{request.url.path} is not built into this server; completions and chats are.")

    for path in NOT_BUILT:
        app.add_api_route(path, not_built, methods=["POST"], include_in_schema=False)
    return app


def _request_id(body: GenerationRequest, request: Request) -> str:
    """The client's own id (header before field), as far as it is fit to be one; else a new one."""
    wanted = request.headers.get("x-request-id") or body.request_id or ""
    return re.sub(r"[^\w.:-]", "", wanted, flags=re.ASCII)[:128] or uuid.uuid4().hex


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


def _card(name: str, model: Model, created: int) -> dict[str, Any]:
    allowed = {
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
    }
    permission = {"id": f"modelperm-{name}", "object": "model_permission", "created": created, **allowed}
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "heed",
        "root": model.folder,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [permission | {"organization": "*", "group": None, "is_blocking": False}],
    }


def _line(answer: Answer, group: Group) -> str:
    """One line of log for a request: no prompt and no text."""
    usage = answer.usage()
    prompt, generated = usage["prompt_tokens"], sum(member.generated for member in group.members)
    seconds = time.monotonic() - group.members[0].arrival
    reasons = ",".join(sorted({member.finish_reason or "aborted" for member in group.members}))
    return f"{answer.id}: {prompt} prompt tokens, {generated} generated in {seconds:.3f} s, {reasons}"
