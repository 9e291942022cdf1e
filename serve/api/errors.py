"""From an error to an HTTP answer: the one place that knows statuses.

Bodies are OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve.errors import (
    BodyTooLarge,
    EngineDead,
    Forbidden,
    GenerationFailed,
    HeadTooLarge,
    InvalidRequest,
    InvalidResponsesRequest,
    NotBuilt,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServeError,
    Unauthorized,
    UnknownResponse,
)

log = logging.getLogger("heed.serve")

STATUS: dict[type[ServeError], tuple[HTTPStatus, str]] = {
    InvalidRequest: (HTTPStatus.BAD_REQUEST, "BadRequestError"),
    InvalidResponsesRequest: (HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    UnknownResponse: (HTTPStatus.NOT_FOUND, "invalid_request_error"),
    Unauthorized: (HTTPStatus.UNAUTHORIZED, "AuthenticationError"),
    Forbidden: (HTTPStatus.FORBIDDEN, "PermissionDeniedError"),
    NotFound: (HTTPStatus.NOT_FOUND, "NotFoundError"),
    RequestTimeout: (HTTPStatus.REQUEST_TIMEOUT, "RequestTimeoutError"),
    BodyTooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestEntityTooLarge"),
    HeadTooLarge: (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "RequestHeaderFieldsTooLarge"),
    NotBuilt: (HTTPStatus.NOT_IMPLEMENTED, "NotImplementedError"),
    Overloaded: (HTTPStatus.SERVICE_UNAVAILABLE, "Service Unavailable"),
    GenerationFailed: (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"),
    EngineDead: (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"),
}
REPORTED = 10  # problems of one body, at most: an answer must not be many times the question
# Segments of pydantic's places that are its own, not the body's.
INTERNAL = re.compile(r"[\[\](){}]|^(?:str|int|float|bool|list|dict|nullable|union|none)$")
SHOWN = 200  # characters of any value that is repeated to the client


def body(error: ServeError) -> dict[str, Any]:
    """The error as JSON; also what a stream that has begun sends as its last event."""
    status, kind = STATUS[type(error)]
    # What an exception inside the engine said is not ours to vouch for.
    message = clean(error.message) if isinstance(error, GenerationFailed) else error.message
    return _body(message, kind, error.param, status)


def _body(message: str, kind: str, param: str | None, status: int) -> dict[str, Any]:
    return {"error": {"message": sendable(message), "type": kind, "param": param, "code": int(status)}}


def sendable(message: str) -> str:
    """Without halves of surrogate pairs, which JSON lets in and UTF-8 does not let out."""
    return message.encode("utf-8", "replace").decode("utf-8")


def clean(message: str) -> str:
    """Without memory addresses and paths."""
    message = re.sub(r" at 0x[0-9a-fA-F]+", "", message)
    return re.sub(r"(?<![\w/.])/(?:[\w.-]+/)+[\w.-]+", "<path>", message)


def headers(error: ServeError) -> dict[str, str]:
    """What an error says beside its body."""
    if isinstance(error, Overloaded):
        return {"Retry-After": str(error.retry_after)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}


def response(error: ServeError, form: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Response:
    """`form`: in the words of another API."""
    return json_response(form(body(error)), STATUS[type(error)][0], headers(error))


def anthropic(body: dict[str, Any]) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    return {"type": "error", "error": {"type": body["error"]["type"], "message": body["error"]["message"]}}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Every way in which a request can fail ends in the one shape."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return response(error)

    async def types(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = _describe(error)
        return json_response(_body(message, "Bad Request", param, 400), 400)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        kind = "NotFoundError" if error.status_code == 404 else phrase
        return json_response(
            _body(str(error.detail), kind, None, error.status_code), error.status_code, dict(error.headers or {})
        )

    async def unforeseen(request: Request, error: Exception) -> Response:
        return response(GenerationFailed("The server failed to handle this request; its log says why."))

    app.add_exception_handler(ServeError, ours)
    app.add_exception_handler(RequestValidationError, types)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _describe(error: RequestValidationError) -> tuple[str, str | None]:
    problems = error.errors()
    lines = []
    for problem in problems[:REPORTED]:
        where = ".".join(_place(problem))[:SHOWN] or ("body" if problem["loc"] else "")
        lines.append(f"{where}{': ' if where else ''}{str(problem['msg'])[:SHOWN]}")
    more = f"; and {len(problems) - REPORTED} more" if len(problems) > REPORTED else ""
    param = _param(problems[0]["loc"]) if problems else None
    noun = "error" if len(problems) == 1 else "errors"
    return f"{len(problems)} validation {noun}: " + "; ".join(lines) + more, param


def _place(problem: Any) -> list[str]:
    """Where in the body: field names and positions, without the names of our classes."""
    return [str(part) for part in problem["loc"] if part != "body" and not str(part).endswith("Request")]


def _param(place: Sequence[str | int]) -> str | None:
    """The place as vLLM says it: dotted from the body on, without what pydantic adds of types that it tried."""
    parts = [str(part) for part in place]
    kept = [part for part in parts if not INTERNAL.search(part) and not part.endswith("Request")]
    return ".".join(kept)[:SHOWN] or None
