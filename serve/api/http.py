"""Answers that take a while: streams of events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

COMMENT = b": keep-alive\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; None, and the work cancelled, when the client goes first."""
    return await _race(request.receive, work)


class EventStream(Response):
    """An ASGI response of server-sent events: each item as JSON, then [DONE]; or, `named`, each under the name that is
    its "type", and no [DONE].

    `leave` is called when all is sent or the client has gone, whichever comes first, and even if nothing was sent.
    After `keep_alive` seconds without an event a comment is sent, which proxies see and clients pass over; 0: never.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        leave: Callable[[], None],
        *,
        named: bool = False,
        keep_alive: float = 0,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._events: AsyncIterator[dict[str, Any] | None] = (
            events if keep_alive <= 0 else with_pauses(events, keep_alive)
        )
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
            if event is None:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                continue
            name = b"event: " + event["type"].encode() + b"\n" if self._named else b""
            body = name + b"data: " + encode(event) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        end = b"" if self._named else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def with_pauses(events: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """The items, and None whenever none has come for so many seconds."""
    end = object()
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(events, end))
            await asyncio.wait([coming], timeout=seconds)
            if not coming.done():
                yield None
                continue
            item, coming = coming.result(), None
            if item is end:
                return
            yield item
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


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
