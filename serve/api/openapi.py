"""/openapi.json: what each route answers and how it can fail, beside the bodies that FastAPI describes by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve.api.gate import OPEN

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _object(**fields: Schema) -> Schema:
    """An object with these fields, and perhaps others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _one(value: str) -> Schema:
    return {"type": "string", "const": value}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_maybe(TEXT), code={"type": "integer"}))
ANTHROPIC_ERROR = _object(type=_one("error"), error=_object(type=TEXT, message=TEXT))
USAGE = _object(prompt_tokens=COUNT, total_tokens=COUNT, completion_tokens=COUNT)
REASON = {"type": "string", "enum": ["stop", "length", "abort", "error", "repetition", "tool_calls"]}
STOP = {"anyOf": [TEXT, {"type": "integer"}, {"type": "null"}]}
LISTED = _object(
    text_offset=_list(COUNT),
    token_logprobs=_list(_maybe(NUMBER)),
    tokens=_list(TEXT),
    top_logprobs=_list(_maybe({"type": "object", "additionalProperties": NUMBER})),
)
SPELT = _object(token=TEXT, logprob=NUMBER, bytes=_maybe(_list(COUNT)))
CONTENT = _object(content=_maybe(_list(_object(token=TEXT, logprob=NUMBER, top_logprobs=_list(SPELT)))))
COMPLETION_CHOICE = _object(
    index=COUNT, text=TEXT, logprobs=_maybe(LISTED), finish_reason=_maybe(REASON), stop_reason=STOP
)
MESSAGE = _object(role=TEXT, content=_maybe(TEXT))
CHAT_CHOICE = _object(
    index=COUNT, message=MESSAGE, logprobs=_maybe(CONTENT), finish_reason=_maybe(REASON), stop_reason=STOP
)
HEAD = {"id": TEXT, "created": COUNT, "model": TEXT}
COMPLETION = _object(object=_one("text_completion"), choices=_list(COMPLETION_CHOICE), usage=USAGE, **HEAD)
CHAT = _object(object=_one("chat.completion"), choices=_list(CHAT_CHOICE), usage=USAGE, **HEAD)
CARD = _object(id=TEXT, object=_one("model"), created=COUNT, owned_by=TEXT, root=TEXT, max_model_len=COUNT)
TOKENS = _object(count=COUNT, max_model_len=COUNT, tokens=_list(COUNT), token_strs=_maybe(_list(TEXT)))
# No type: what reads schemas takes it for the body's, or for that of each event.
STREAM = {
    "text/event-stream": {"schema": {"description": "Server-sent events, each with a chunk of the answer as JSON."}}
}

# What each route answers where all goes well: JSON, or also a stream, or text.
JSON: dict[str, Schema] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": CHAT,
    "/v1/responses": _object(id=TEXT, object=_one("response"), status=TEXT, output=_list(_object())),
    "/v1/messages": _object(id=TEXT, type=_one("message"), role=TEXT, content=_list(_object(type=TEXT))),
    "/v1/messages/count_tokens": _object(input_tokens=COUNT),
    "/v1/models": _object(object=_one("list"), data=_list(CARD)),
    "/v1/models/{name}": CARD,
    "/tokenize": TOKENS,
    "/detokenize": _object(prompt=TEXT),
    "/tokenizer_info": _object(),
    "/invocations": _object(),
    "/version": _object(version=TEXT),
    "/load": _object(server_load=COUNT),
    "/kv_event_sources": _object(),
    "/is_scaling_elastic_ep": _object(),
}
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations")
PLAIN = ("/metrics",)

ERRORS = {
    "400": "The request asks for something impossible, or is no request of this route.",
    "401": "There is no API key, or a wrong one.",
    "403": "What is asked for is switched off here, or the Host header names another server.",
    "404": "The model, or what the path names, does not exist.",
    "405": "The route has other methods.",
    "408": "The request did not come as a whole in time.",
    "413": "The body is larger than --max-body-bytes.",
    "431": "The request's line and headers are larger than may be.",
    "500": "The server failed.",
    "501": "This server does not have what is asked for.",
    "503": "The queue is full, or the server is shutting down; Retry-After says when to ask again.",
}


def install(app: FastAPI) -> None:
    """To be called when all routes are there."""

    def described() -> Schema:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, summary=SUMMARY, routes=app.routes)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            schemas |= {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in made["paths"].items():
                for operation in methods.values():
                    _complete(path, operation)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to say it


SUMMARY = "Language models and translators through the HTTP API of vLLM and OpenAI."


def _complete(path: str, operation: Schema) -> None:
    content: Schema = {}
    if path in JSON:
        content = {"application/json": {"schema": JSON[path]}}
    if path in PLAIN:
        content = {"text/plain": {"schema": TEXT}}
    if path in STREAMS:
        content |= STREAM
    answer: Schema = {"description": "The answer." if content else "Yes."}
    operation["responses"] = {"200": answer | ({"content": content} if content else {})}
    if path in OPEN:
        operation["responses"]["503"] = {"description": "No: the engine is dead, or the server is shutting down."}
        return
    # What is no request of the route is refused in one form on all routes.
    forms = ("AnthropicError", "Error") if path.startswith("/v1/messages") else ("Error",)
    error = {"application/json": {"schema": {"anyOf": [{"$ref": f"#/components/schemas/{form}"} for form in forms]}}}
    operation["responses"] |= {status: {"description": said, "content": error} for status, said in ERRORS.items()}
    operation["security"] = [{"key": []}]
