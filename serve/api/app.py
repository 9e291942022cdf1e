"""The routes. Each reads as: validate, give to the engine, shape the answer. What goes wrong is one of serve/errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lm import __version__
from serve.api import batch, conversation, errors, further, messages, openapi, responses, sampling, validation
from serve.api.chat import ChatAnswer
from serve.api.client import EngineClient
from serve.api.completions import CompletionAnswer
from serve.api.errors import json_response
from serve.api.gate import Gate
from serve.api.metrics import Metrics
from serve.api.model import Model
from serve.api.prompts import check_ids, encode
from serve.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeEither, TokenizeRequest
from serve.api.service import Service, only_json
from serve.api.traffic import Observed, Traffic


def create_app(
    model: Model,
    client: EngineClient,
    *,
    keys: Sequence[str] = (),
    max_body_bytes: int = 8 << 20,
    hosts: frozenset[str] | None = None,
    origins: Sequence[str] = (),
    origin_methods: Sequence[str] = ("*",),
    origin_headers: Sequence[str] = ("*",),
    origin_credentials: bool = False,
    request_ids: bool = False,
    keep_alive: float = 0,
    fingerprint: str | None = None,
    root_path: str = "",
    docs: bool = True,
    tokenizer_info: bool = False,
    prompt_details: bool = False,
    log_requests: bool = False,
    max_log_len: int = 0,
) -> FastAPI:
    """The ASGI application over an engine that is ready. `hosts`, `request_ids`: as Gate has them; `origins`: whose
    pages may read answers; `keep_alive`: as EventStream has it; `fingerprint`: of all answers;
    `root_path`: where a proxy shows this server; `docs`: whether there is /openapi.json, and the pages that show it;
    `tokenizer_info`: whether there is /tokenizer_info.
    """
    app = FastAPI(title="Heed", version=__version__, root_path=root_path, openapi_url="/openapi.json" if docs else None)
    metrics = Metrics(model.names[0], client, model.ready)
    traffic = Traffic(metrics.registry)
    app.add_middleware(Gate, keys=keys, max_body_bytes=max_body_bytes, hosts=hosts, request_ids=request_ids)
    app.add_middleware(Observed, traffic=traffic)
    app.add_middleware(  # before the gate: a browser's question whether it may ask has no key
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=origin_methods,
        allow_headers=origin_headers,
        allow_credentials=origin_credentials,
    )
    errors.install(app)
    started = int(time.time())
    service = Service(
        model,
        client,
        metrics,
        fingerprint=fingerprint,
        prompt_details=prompt_details,
        log_requests=log_requests,
        max_log_len=max_log_len,
        keep_alive=keep_alive,
    )

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
        return json_response({"server_load": traffic.load})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    # ---------------------------------------------------------------- models

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_card(name, model, started) for name in model.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        if not name:
            return RedirectResponse(request.url_for("models"))
        model.check_name(name)
        return json_response(_card(name, model, started))

    # ---------------------------------------------------------------- completions and chats

    @app.post("/v1/completions", dependencies=[Depends(only_json)])
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await service.answer(body, request, validation.completion, CompletionAnswer)

    @app.post("/v1/chat/completions", dependencies=[Depends(only_json)])
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        return await service.answer(body, request, validation.chat, ChatAnswer)

    for routes in (responses, messages, batch, further):
        routes.install(app, service)

    # ---------------------------------------------------------------- tokens

    @app.post("/tokenize", dependencies=[Depends(only_json)])
    async def tokenize(body: TokenizeEither) -> Response:
        model.check_name(body.model)
        sampling.refuse_fields(body)
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

    if tokenizer_info:

        @app.get("/tokenizer_info")
        async def info() -> Response:
            """What tokenizer_config.json says; of chat templates, those that are in use."""
            named = dict(model.renderer.templates.named)
            template: Any = named["default"] if list(named) == ["default"] else named or None
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | model.tokenizer.settings
            return json_response(settings | ({"chat_template": template} if template else {}))

    openapi.install(app)
    return app


def _card(name: str, model: Model, created: int) -> dict[str, Any]:
    allowed = {
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
    }
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        **allowed,
    }
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
