"""Routes of vLLM that need no more than a line or two here: by body, by flag, or to say that there is nothing."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from serve.api import validation
from serve.api.chat import ChatAnswer
from serve.api.completions import CompletionAnswer
from serve.api.errors import json_response
from serve.api.protocol import ChatRequest, CompletionRequest
from serve.api.service import Service, only_json
from serve.errors import Forbidden, NotBuilt

# Routes of the contract that are not there: 501 with a sentence, not a 404 that looks like a misspelt URL.
NOT_BUILT = ("/v1/embeddings", "/generative_scoring", "/v1/systemone", "/scale_elastic_ep")
# Of servers that only tokenize, or only compute: vLLM has them behind a flag, and says so without it.
SCALE_OUT = (
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
)


def _which(body: Any) -> str:
    chat = "messages" in body if isinstance(body, dict) else isinstance(body, ChatRequest)
    return "ChatRequest" if chat else "CompletionRequest"


Invocation = Annotated[
    Annotated[ChatRequest, Tag("ChatRequest")] | Annotated[CompletionRequest, Tag("CompletionRequest")],
    Discriminator(_which),
]


def install(app: FastAPI, service: Service) -> None:
    """Puts the routes on the app."""

    @app.post("/invocations", dependencies=[Depends(only_json)])
    async def invocations(body: Invocation, request: Request) -> Response:
        """SageMaker's one route for everything: a chat where the body has messages, else a completion."""
        if isinstance(body, ChatRequest):
            return await service.answer(body, request, validation.chat, ChatAnswer)
        return await service.answer(body, request, validation.completion, CompletionAnswer)

    @app.get("/kv_event_sources")
    async def kv_event_sources() -> Response:
        """Where changes of the cache are published: nowhere."""
        return json_response({})

    @app.post("/is_scaling_elastic_ep")
    async def is_scaling() -> Response:
        return json_response({"is_scaling_elastic_ep": False})

    async def scale_out(request: Request) -> Response:
        raise Forbidden("Scale-out endpoints are disabled: this server tokenizes and computes in one.")

    for path in SCALE_OUT:
        app.add_api_route(path, scale_out, methods=["POST"], include_in_schema=False)

    async def not_built(request: Request) -> Response:
        raise NotBuilt(f"{request.url.path} is not built into this server; completions and chats are.")

    for path in NOT_BUILT:
        app.add_api_route(path, not_built, methods=["POST"], include_in_schema=False)
