"""The life of the server: bind, start the engine, be ready, drain, end.

One process of asyncio and one engine under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil

from serve.api import address
from serve.api.client import DIED, EngineClient, EngineFailed
from serve.engine.messages import EngineConfig, Ready
from serve.errors import StartError

LEAVING = 3  # seconds that connections get to take their last bytes


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that concerns HTTP; the engine's part is messages.EngineConfig."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None  # a Unix socket, in place of both
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0  # ssl.CERT_NONE, CERT_OPTIONAL or CERT_REQUIRED
    ssl_ciphers: str | None = None
    root_path: str = ""
    uvicorn_log_level: str = "warning"
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: tuple[str, ...] = ()
    disable_fastapi_docs: bool = False
    enable_tokenizer_info_endpoint: bool = False
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    max_logprobs: int = 20  # -1: all
    max_num_queued_reqs: int = 1152  # sequences that run or wait
    max_num_queued_tokens: int | None = None  # of prompts; None: no limit of their own
    max_body_bytes: int = 8 << 20
    shutdown_timeout: float = 25.0
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: str | None = None  # a file, or a template; None: the model's own
    trust_request_chat_template: bool = False
    default_chat_template_kwargs: dict[str, Any] | None = None
    response_role: str = "assistant"
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    stream_interval: int = 1  # tokens
    fingerprint_mode: str = "full"
    fingerprint_value: str | None = None
    enable_prompt_tokens_details: bool = False
    enable_log_requests: bool = False
    max_log_len: int = 0  # characters of a prompt that a line of the log shows
    enable_request_id_headers: bool = False
    sse_keep_alive_interval: float = 0  # seconds; 0: none
    allowed_hosts: tuple[str, ...] = ()  # beside localhost and the address that is bound
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    client_timeout: float = 30.0  # seconds
    max_connections: int = 4096
    h11_max_incomplete_event_size: int = 1 << 16  # bytes of a request's head
    h11_max_header_count: int = 256


def run(server: ServerConfig, engine: EngineConfig) -> int:
    """Serves until a signal or the engine's death; the exit status. Raises StartError."""
    address.check_certificate(server.ssl_certfile, server.ssl_keyfile, server.ssl_ca_certs, server.ssl_ciphers)
    bound = address.bind(server.host, server.port) if server.uds is None else address.bind_unix(server.uds)
    client = EngineClient(engine, server.max_num_queued_reqs, waiting_tokens=server.max_num_queued_tokens)
    client.launch()  # it loads torch while this process imports FastAPI
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Life(server, client, bound).live())


def _path(line: logging.LogRecord) -> str:
    """Of a line of uvicorn's, whose arguments are client, method, path with its query, version and status."""
    arguments: Any = line.args
    return str(arguments[2]).partition("?")[0]


class _Life:
    def __init__(self, config: ServerConfig, client: EngineClient, bound: socket.socket) -> None:
        self._config, self._client, self._bound = config, client, bound
        self._renderer: Any = None
        self._grammars: Any = None
        self._reasoning: Any = None
        self._signals = 0
        self._signalled = asyncio.Event()
        self._hurried = asyncio.Event()

    async def live(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal)
        try:
            return await self._start_and_serve()
        finally:
            self._bound.close()
            if self._config.uds is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._config.uds)
            await self._client.close()
            if self._renderer is not None:
                await self._renderer.close()
            if self._grammars is not None:
                await self._grammars.close()

    def _signal(self) -> None:
        self._signals += 1
        self._signalled.set()
        if self._signals > 1:
            self._hurried.set()  # the second one waits for nobody

    async def _start_and_serve(self) -> int:
        starting = asyncio.ensure_future(self._start())
        try:
            if not await _before(self._signalled, starting):
                return 0
            ready, tokenizer, defaults = starting.result()
        except EngineFailed as error:
            raise StartError(str(error), 2) from None
        server, serving = await self._listen(ready, tokenizer, defaults)
        print(self._announcement(ready), flush=True)

        await _first(self._signalled.wait(), self._client.dead.wait(), serving)
        died = self._client.dead.is_set()
        if not died:
            self._client.draining = True
            await _first(self._client.idle(), self._hurried.wait(), timeout=self._config.shutdown_timeout)
            self._client.abort_all()
        server.should_exit = True
        await serving
        if died:
            print(DIED, await self._client.cause(), file=sys.stderr, flush=True)
        return 1 if died else 0

    async def _start(self) -> tuple[Ready, Any, dict[str, Any]]:
        """Engine, tokenizer and sampling defaults; the first error is the one that is told. Raises EngineFailed."""
        config = self._config
        reading = asyncio.to_thread(_read, self._client.config.folder, config)
        words, (defaults, template) = await asyncio.gather(self._client.words(), reading)
        from serve.api.renderer import Renderer, Templates
        from serve.engine.words import unpack

        async def prepare() -> Any:
            tokenizer = await asyncio.to_thread(unpack, words)
            templates = Templates.of(tokenizer, template)
            self._renderer = Renderer(templates, trust_requests=config.trust_request_chat_template)
            await self._renderer.start()
            if config.reasoning_parser is not None:
                self._reasoning = _reasoning(config.reasoning_parser, tokenizer)
            return tokenizer

        ready, tokenizer = await asyncio.gather(self._client.connect(), prepare())
        return ready, tokenizer, defaults

    async def _listen(self, ready: Ready, tokenizer: Any, defaults: dict[str, Any]) -> tuple[Any, asyncio.Task[None]]:
        import uvicorn

        from serve.api.app import create_app
        from serve.api.connection import Limits, file_limit, protocol
        from serve.api.fingerprint import fingerprint
        from serve.api.gate import known_hosts
        from serve.api.grammars import Grammars
        from serve.api.model import AnswerFlags, Model

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # they are handled here, by a drain

        config, folder = self._config, self._client.config.folder
        names = config.served_model_name or (folder,)
        flags = AnswerFlags(
            role=config.response_role,
            auto_tools=config.enable_auto_tool_choice,
            tool_parser=config.tool_call_parser,
            reasoning=self._reasoning,
            template_kwargs=config.default_chat_template_kwargs or {},
            tokens_as_ids=config.return_tokens_as_token_ids,
            usage=config.enable_force_include_usage,
            interval=config.stream_interval,
        )
        self._grammars = Grammars(tokenizer, ready.vocab_size, ready.eos_token_ids)
        most = ready.vocab_size if config.max_logprobs == -1 else config.max_logprobs
        model = Model(names, folder, ready, tokenizer, self._renderer, self._grammars, most, defaults, flags)
        app = create_app(
            model,
            self._client,
            keys=config.api_key,
            max_body_bytes=config.max_body_bytes,
            hosts=known_hosts(config.host, config.allowed_hosts, loopback=address.is_loopback(self._bound)),
            origins=config.allowed_origins,
            origin_methods=config.allowed_methods,
            origin_headers=config.allowed_headers,
            origin_credentials=config.allow_credentials,
            request_ids=config.enable_request_id_headers,
            keep_alive=config.sse_keep_alive_interval,
            fingerprint=fingerprint(config.fingerprint_mode, config.fingerprint_value, self._client.config, ready),
            root_path=config.root_path,
            docs=not config.disable_fastapi_docs,
            tokenizer_info=config.enable_tokenizer_info_endpoint,
            prompt_details=config.enable_prompt_tokens_details,
            log_requests=config.enable_log_requests,
            max_log_len=config.max_log_len,
        )
        limits = Limits(
            head_bytes=config.h11_max_incomplete_event_size,
            headers=config.h11_max_header_count,
            body_bytes=config.max_body_bytes,
            seconds=config.client_timeout,
            connections=file_limit(config.max_connections),
        )
        settings = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            http=protocol(limits),
            loop="none",
            log_level=config.uvicorn_log_level,
            access_log=not config.disable_uvicorn_access_log,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            ssl_ca_certs=config.ssl_ca_certs,
            ssl_cert_reqs=config.ssl_cert_reqs,
            ssl_ciphers=config.ssl_ciphers or "TLSv1",
            server_header=False,
            timeout_graceful_shutdown=LEAVING,
            backlog=2048,
        )
        quiet = {f"{root}{path}" for path in config.disable_access_log_for_endpoints for root in ("", config.root_path)}
        logging.getLogger("uvicorn.access").addFilter(lambda line: _path(line) not in quiet)
        server = Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[self._bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        return server, serving

    def _announcement(self, ready: Ready) -> str:
        name = (self._config.served_model_name or (self._client.config.folder,))[0]
        tokens = (ready.blocks - 1) * ready.block_size
        seconds = time.time() - psutil.Process().create_time()
        where = address.shown(self._bound, tls=self._config.ssl_certfile is not None)
        line = (
            f"{where} serves {name}: {_scaled(ready.parameters)} parameters, "
            f"{ready.dtype} on {ready.device}, {ready.threads} threads, "
            f"cache {ready.cache_bytes / 2**20:,.0f} MiB for {tokens:,} tokens; "
            f"first token {seconds:.1f} s after the start."
        )
        return f"{ready.note}\n{line}" if ready.note else line


def _read(folder: str, config: ServerConfig) -> tuple[dict[str, Any], str | None]:
    """Sampling defaults, and the template of the command line. Imports the web framework on the way."""
    import serve.api.app  # noqa: F401
    from serve.api.defaults import generation_defaults
    from serve.api.renderer import TemplateFileError, read_template

    defaults = generation_defaults(folder, config.generation_config, config.override_generation_config)
    try:
        return defaults, None if config.chat_template is None else read_template(config.chat_template)
    except TemplateFileError as error:
        raise EngineFailed(str(error)) from None


def _reasoning(name: str, tokenizer: Any) -> Any:
    """How the model's thoughts are known. Raises EngineFailed."""
    from serve.api.reasoning import Reasoning, ReasoningError

    try:
        return Reasoning.of(name, tokenizer)
    except ReasoningError as error:
        raise EngineFailed(str(error)) from None


async def _before(event: asyncio.Event, work: asyncio.Future[Any]) -> bool:
    """Whether the work ended before the event came; if not, it is cancelled."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait((waiting, work), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not work.done():
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        return False
    return True


async def _first(*awaitables: Any, timeout: float | None = None) -> None:
    """Returns when the first is done, or after `timeout` seconds; what was given as a task goes on."""
    given = [awaitable for awaitable in awaitables if isinstance(awaitable, asyncio.Task)]
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task not in given:
            task.cancel()


def _scaled(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
