"""What every request passes before the routes: the name it was sent to, the key, the size of its body, its turn."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import errors
from serve.errors import BodyTooLarge, Forbidden, InvalidRequest, Overloaded, ServeError, Unauthorized

OPEN = {"/health", "/ping", "/live"}  # what a load balancer asks, which has no key and no name for the server
LARGE = 1 << 16  # bytes from which a body is looked at, waits for its turn and is counted
LARGE_BODIES = 256 << 20  # bytes of large bodies in all requests together
VALUES = 1 << 20  # in the JSON of a body,
CONTAINERS = 1 << 16  # and of these, lists and objects: of millions, the parser makes seconds and gigabytes
PAUSE = 3.0  # how many times as long as a large body took does the next one wait
STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)


class Gate:
    """ASGI middleware: guards every path but OPEN with the API keys, and reads the body first, up to a limit.

    `hosts` are the names that a Host header may have, None for any: a page of somebody else that has made its own name
    point here (DNS rebinding) says that name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str] = (),
        max_body_bytes: int = 8 << 20,
        hosts: frozenset[str] | None = None,
        request_ids: bool = False,
    ) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._max_body = max_body_bytes
        self._hosts = hosts
        self._request_ids = request_ids
        self._large = 0  # bytes of large bodies that are here
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._request_ids:
            send = self._naming(scope, send)
        try:
            self._check_host(scope)
            self._authorise(scope)
        except ServeError as error:
            await errors.response(error)(scope, receive, send)
            return
        reading = _Body()
        try:
            try:
                whole = await self._read(scope, receive, reading)
            except ServeError as error:
                await errors.response(error)(scope, receive, send)
                return
            if whole is not None:
                await self._app(scope, _replay(whole, receive), send)
        finally:
            self._large -= reading.counted

    def _check_host(self, scope: Scope) -> None:
        """Raises Forbidden. Who sends no Host is no browser."""
        if self._hosts is None or scope["path"] in OPEN:
            return
        for name in _headers(scope, b"host"):
            if host_name(name) not in self._hosts:
                raise Forbidden(
                    f"This server is not known as {name[:100]!r}: start it with --allowed-hosts and that name to have "
                    "it answer."
                )

    def _authorise(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN:
            return
        scheme, _, token = next(iter(_headers(scope, b"authorization")), "").partition(" ")
        if not scheme:  # Anthropic's clients say it so
            scheme, token = "bearer", next(iter(_headers(scope, b"x-api-key")), "")
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        # Every key is compared, and in constant time: the answer's timing tells nothing of them.
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("A valid API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`.")
        scope.setdefault("state", {})["key"] = digest.hex()  # who asks, for what is kept apart: request.state.key

    def _naming(self, scope: Scope, send: Send) -> Send:
        """Gives the answer the request's id, which is the client's own where it has one."""
        given = next(iter(_headers(scope, b"x-request-id")), "")
        scope.setdefault("state", {})["request_id"] = id = clean_id(given) or uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id.encode())]}
            await send(message)

        return named

    # ---------------------------------------------------------------- the body

    async def _read(self, scope: Scope, receive: Receive, body: _Body) -> bytes | None:
        """The whole body; None where the client left before it was complete. Raises BodyTooLarge, InvalidRequest
        or Overloaded.
        """
        declared = next(iter(_headers(scope, b"content-length")), "")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            more = body.take(message.get("body", b""))
            self._large += more
            if body.size > self._max_body:
                raise self._too_large()
            if more and self._large > max(LARGE_BODIES, 8 * self._max_body):
                raise Overloaded("Too many large bodies are here at once. Try again later.")
            if not message.get("more_body", False):
                break
        whole = body.whole()
        if len(whole) <= LARGE:
            return whole
        await self._turns.take()  # for looking at it here, and for what the routes do with it at first: parsing it
        if crowded(whole):
            raise InvalidRequest(
                f"The body has more than {VALUES} values or {CONTAINERS} lists and objects, which is more than this "
                "server looks at in one request."
            )
        return whole

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The body is larger than {self._max_body} bytes, which is what this server takes (--max-body-bytes)."
        )


class _Body:
    """The parts of a body, and how much of it counts as large."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = self.counted = 0

    def take(self, part: bytes) -> int:
        """By how many bytes the count has grown."""
        before = self.counted
        self._parts.append(part)
        self.size += len(part)
        self.counted = max(0, self.size - LARGE)
        return self.counted - before

    def whole(self) -> bytes:
        made, self._parts = b"".join(self._parts), []
        return made


class Turns:
    """Large bodies are parsed one after another, with pauses: parsing one stops everything else in this process, so
    that many at once would keep everybody waiting.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Returns when it is one's turn. What is then done before the next `await` that waits is what a turn takes."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._done, loop, loop.time())

    def _done(self, loop: asyncio.AbstractEventLoop, began: float) -> None:
        loop.call_later(PAUSE * (loop.time() - began), self._lock.release)


def crowded(body: bytes) -> bool:
    """Whether a JSON text has more values than are looked at. What is inside of its strings does not count."""
    return _crowded(body) and _crowded(STRINGS.sub(b"", body))


def _crowded(text: bytes) -> bool:
    containers = text.count(b"[") + text.count(b"{")
    return containers > CONTAINERS or text.count(b",") + containers > VALUES


def clean_id(given: str) -> str:
    """A client's own id, as far as it is fit to be one."""
    return re.sub(r"[^\w.:-]", "", given, flags=re.ASCII)[:128]


def host_name(header: str) -> str:
    """The name in a Host header, without port, brackets and case."""
    name = header.strip().lower().rstrip(".")
    match = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", name)
    return name if match is None else (match[1] if match[1] is not None else match[2].rstrip("."))


def known_hosts(bound: str, allowed: Sequence[str], *, loopback: bool) -> frozenset[str] | None:
    """The names that a Host header may have; None for any.

    A server that only this machine reaches is known by this machine's names for itself. One that others reach may have
    names that cannot be guessed, and is asked by all of them, unless `allowed` says which.
    """
    if "*" in allowed or not (allowed or loopback):
        return None
    own = {"localhost", "127.0.0.1", "::1", host_name(bound) if ":" not in bound else bound.lower()}
    return frozenset(own | {host_name(name) for name in allowed})


def _replay(body: bytes, receive: Receive) -> Receive:
    left: bytes | None = body

    async def replaying() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        message, left = {"type": "http.request", "body": left, "more_body": False}, None
        return message

    return replaying


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
