"""A connection's limits, below what its requests mean: how long a head and a body may take to come and how large a head
may be, how long an answer may lie unread, and how many connections there may be.

uvicorn's own protocol has none of these: its parser would take a head without an end, as slowly as it comes.
"""

from __future__ import annotations

import asyncio
import functools
import resource
from dataclasses import dataclass
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.api import errors
from serve.errors import HeadTooLarge, InvalidRequest, Overloaded, RequestTimeout, ServeError

PIPELINED = 16  # requests that a client may send ahead of the answer to its first
LAST_BYTES = 3.0  # seconds that a closed connection gets to take what was written to it
SPARE_FILES = 128  # descriptors that are for something else than clients
NOT_HTTP = "This is not a request in HTTP/1.1."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a connection may cost."""

    head_bytes: int = 1 << 16  # of the request's line and headers
    headers: int = 256
    body_bytes: int = 8 << 20
    seconds: float = 30.0  # for a head, for a body, and for taking an answer on
    connections: int = 4096


def protocol(limits: Limits) -> Any:
    """What uvicorn makes of each connection (its setting `http`)."""
    return functools.partial(Connection, limits)


def file_limit(connections: int) -> int:
    """How many connections there are descriptors for, of those wanted. Raises the process's limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - SPARE_FILES))


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits. A request is awaited in two parts, its head and its body, each with its time.

    When there are too many connections, the one that has been without a whole request for the longest time makes room:
    connections that say nothing, or that speak slowly, keep nobody out.
    """

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._part: str | None = None  # "head" or "body": what of a request is on its way
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._received = 0  # bytes of the part
        self._head = 0  # bytes of the headers (and trailers) that are kept,
        self._count = 0  # and their number
        self._since = 0.0  # when it began to be without a whole request
        self._refusal: ServeError | None = None  # what the parser is told by an exception

    # ---------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self._limits.connections:
            others = (one for one in self.connections if isinstance(one, Connection) and one is not self)
            oldest = min((one for one in others if not one.busy), key=lambda one: one._since, default=None)
            if oldest is None:
                self._end(Overloaded(f"All {self._limits.connections} connections are busy. Try again later."))
                return
            oldest._end(None)
        self._await("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    @property
    def busy(self) -> bool:
        """Whether a request that has come as a whole is being answered."""
        return self._answering and self._part is None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end(self, error: ServeError | None) -> None:
        """Closes, after one last answer if nothing of another has been said."""
        self.connections.discard(self)
        self._await(None)
        if self.transport.is_closing():
            return
        if error is not None and not (self._answering and self.cycle.response_started):
            self.transport.write(_spelt(error))
        self.transport.close()
        self.loop.call_later(LAST_BYTES, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self._end(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # ---------------------------------------------------------------- what comes

    def _await(self, part: str | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._part, self._received = part, 0
        self._timer = None if part is None else self.loop.call_later(self._limits.seconds, self._late)

    def _late(self) -> None:
        if self.pipeline or (self._part == "head" and self._answering):
            # Nothing is read while an answer is being made: it is not the client who is slow.
            self._timer = self.loop.call_later(self._limits.seconds, self._late)
        elif self._part == "head" and not self._received:
            self._end(None)
        else:
            self._end(
                RequestTimeout(
                    f"The {self._part} of the request took longer to come than {self._limits.seconds:g} seconds "
                    "(--client-timeout)."
                )
            )

    def data_received(self, data: bytes) -> None:
        if self._part is None:
            self._await("head")
        self._received += len(data)
        super().data_received(data)
        most = self._limits.head_bytes + (2 * self._limits.body_bytes if self._part == "body" else 0)
        if self._part is not None and self._received > most and not self.transport.is_closing():
            self._end(self._too_large())

    def on_message_begin(self) -> None:
        self._head = self._count = 0
        if self._part is None:
            self._await("head")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        self._count += 1
        if self._head > self._limits.head_bytes or self._count > self._limits.headers:
            raise self._refuse(self._too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            raise self._refuse(InvalidRequest(f"More than {PIPELINED} requests were sent ahead of their answers."))
        if len(self.url) > self._limits.head_bytes:
            raise self._refuse(self._too_large())
        super().on_headers_complete()
        self._await("body")

    def on_message_complete(self) -> None:
        self._await(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    # ---------------------------------------------------------------- what is no request

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The request's line and headers are more than {self._limits.head_bytes} bytes "
            f"(--h11-max-incomplete-event-size) or {self._limits.headers} headers (--h11-max-header-count)."
        )

    def _refuse(self, error: ServeError) -> ServeError:
        self._refusal = error
        return error

    def send_400_response(self, msg: str) -> None:
        self._end(self._refusal or InvalidRequest(NOT_HTTP))


def _spelt(error: ServeError) -> bytes:
    """The answer that an error is, byte by byte: there is no request to answer in the ordinary way."""
    body = msgspec.json.encode(errors.body(error))
    status, _ = errors.STATUS[type(error)]
    lines = [
        STATUS_LINE[status].rstrip(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
    ]
    lines += [f"{name}: {value}".encode() for name, value in errors.headers(error).items()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
