"""HTTP's own metrics, under the names that vLLM's server has for them (those of prometheus-fastapi-instrumentator), and
how many requests are being answered.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Upper bounds of the buckets in seconds, as those metrics have them.
FINE = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
COARSE = (0.1, 0.5, 1)
NOT_COUNTED = {"/metrics", "/health", "/load", "/ping", "/version", "/live"}  # asked every few seconds by machines
NO_ROUTE = "none"  # of all paths that there are not, so that nobody makes a new label with each request


class Traffic:
    """What has been answered, in the registry; `load` is what is being answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.load = 0
        by_handler = ("handler",)
        self._total = Counter(
            "http_requests",
            "Requests, by route and status.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._received = Summary("http_request_size_bytes", "Bytes of bodies.", by_handler, registry=registry)
        self._sent = Summary("http_response_size_bytes", "Bytes of answers' bodies.", by_handler, registry=registry)
        self._fine = Histogram(
            "http_request_duration_highr_seconds", "Seconds to an answer's end.", registry=registry, buckets=FINE
        )
        self._coarse = Histogram(
            "http_request_duration_seconds",
            "Seconds to an answer's end, by route.",
            ("method", "handler"),
            registry=registry,
            buckets=COARSE,
        )

    def answered(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        """An answer of `size` bytes has ended."""
        handler = getattr(scope.get("route"), "path", NO_ROUTE)
        if handler in NOT_COUNTED:
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        self._total.labels(scope["method"], f"{status // 100}xx", handler).inc()
        self._received.labels(handler).observe(int(declared) if declared.isdigit() else 0)
        self._sent.labels(handler).observe(size)
        self._fine.observe(seconds)
        self._coarse.labels(scope["method"], handler).observe(seconds)


class Observed:
    """ASGI middleware that tells `traffic` of each request."""

    def __init__(self, app: ASGIApp, *, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, size, began = 0, 0, time.monotonic()

        async def counting(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        work = scope["method"] == "POST" and scope["path"] not in NOT_COUNTED
        self._traffic.load += work
        try:
            await self._app(scope, receive, counting)
        finally:
            self._traffic.load -= work
            if status:  # 0: the client left before there was one
                self._traffic.answered(scope, status, size, time.monotonic() - began)
