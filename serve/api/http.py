"""What every request passes, below the routes: the key, the size of the body, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import errors
from serve.errors import BodyTooLarge, ServeError, Unauthorized

OPEN = {"/health", "/ping", "/live"}  # what a load balancer asks, which has no key


class Gate:
    """ASGI middleware: guards every path but OPEN with the API keys, and reads the body first, up to a limit."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], max_body_bytes: int) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._max_body = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._authorise(scope)
            body = await self._read(scope, receive)
        except ServeError as error:
            await errors.response(error)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _authorise(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN:
            return
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        # Every key is compared, and in constant time: the answer's timing tells nothing of them.
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("A valid API key is needed, as the header `Authorization: Bearer KEY`.")
        scope.setdefault("state", {})["key"] = digest.hex()  # who asks, for what is kept apart: request.state.key

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client left before it was complete. Raises BodyTooLarge."""
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The body is larger than {self._max_body} bytes, which is what this server takes (--max-body-bytes)."
        )


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replaying() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replaying


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; None, and the work cancelled, when the client goes first."""
    return await _race(request.receive, work)


class EventStream(Response):
    """An ASGI response of server-sent events: each item as JSON, then [DONE]; or, `named`, each under the name that is
    its "type", and no [DONE].

    `leave` is called when all is sent or the client has gone, whichever comes first, and even if nothing was sent.
    """

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], leave: Callable[[], None], *, named: bool = False
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._events = events
        self._leave = leave
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _race(receive, self._send(send))
        finally:
            self._leave()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        encode = msgspec.json.encode
        async for event in self._events:
            name = b"event: " + event["type"].encode() + b"\n" if self._named else b""
            body = name + b"data: " + encode(event) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        end = b"" if self._named else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _race(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for unfinished in (task, gone):
            if not unfinished.done():
                unfinished.cancel()
                await asyncio.gather(unfinished, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
