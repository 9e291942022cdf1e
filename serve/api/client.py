"""The API's end of the engine: requests go in, each gets a stream of its outputs, and the engine's death ends them all."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec

from lm.params import SamplingParams
from serve.engine.messages import Abort, Add, EngineConfig, Failed, FromEngine, Output, Ready, Stats, Step
from serve.engine.process import HEADER, frame, spawn
from serve.errors import EngineDead, GenerationFailed

DIED = "The engine process has ended unexpectedly; the server is stopping."


class EngineFailed(Exception):
    """The engine could not start; the message is its sentence."""


class Stream:
    """Outputs of one sequence, as they come. What has piled up while nobody read is given out as one."""

    def __init__(self, id: str, prompt_tokens: int, params: SamplingParams) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.params = params
        self.generated = 0
        self._pending: deque[Output | EngineDead] = deque()
        self._arrived = asyncio.Event()

    def put(self, output: Output | EngineDead) -> None:
        self._pending.append(output)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Output]:
        """Ends after the output with a finish_reason. Raises GenerationFailed or EngineDead."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            merged: Output | None = None
            while self._pending:
                output = self._pending.popleft()
                if isinstance(output, EngineDead):
                    raise output
                if output.finish_reason == "error":
                    raise GenerationFailed(f"This request failed in the engine. {output.error}")
                merged = output if merged is None else _merge(merged, output)
            if merged is not None:
                yield merged
                if merged.finish_reason is not None:
                    return


def _merge(first: Output, then: Output) -> Output:
    return Output(
        id=first.id,
        text=first.text + then.text,
        tokens=first.tokens + then.tokens,
        logprobs=None
        if then.logprobs is None and first.logprobs is None
        else (first.logprobs or []) + (then.logprobs or []),
        prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs,
        finish_reason=then.finish_reason,
        stop_reason=then.stop_reason,
        timings=then.timings,
    )


class EngineClient:
    """Starts the engine process and speaks with it. `on_step` sees every step, `on_end` each sequence's last output."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = Stats()
        self.dead = asyncio.Event()
        self.on_step: Callable[[Step], None] = lambda step: None
        self.on_end: Callable[[Stream, Output], None] = lambda stream, output: None
        self._streams: dict[str, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reading: asyncio.Task[None] | None = None

    def launch(self) -> None:
        """Starts the process; `connect` waits for it. Apart, so that what the API needs can be imported meanwhile."""
        self._process, self._socket = spawn(self.config)

    async def connect(self) -> Ready:
        """What the engine says of itself once it has produced its first token. Raises EngineFailed."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=1 << 26)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            message = await self._receive()
        except EngineDead:
            raise EngineFailed(
                "The engine process ended while it was starting; out of memory is the usual reason."
            ) from None
        if isinstance(message, Failed):
            raise EngineFailed(message.message)
        assert isinstance(message, Ready)
        self._reading = asyncio.create_task(self._read())
        return message

    @property
    def in_flight(self) -> int:
        """Sequences that have been given to the engine and have not ended."""
        return len(self._streams)

    def submit(self, id: str, prompt: list[int], params: SamplingParams, *, generate: bool = True) -> Stream:
        """Gives a sequence to the engine. Raises EngineDead."""
        if self.dead.is_set():
            raise EngineDead(DIED)
        stream = Stream(id, len(prompt), params)
        self._streams[id] = stream
        self._idle.clear()
        self._writer.write(frame(Add(id, prompt, params, time.monotonic(), generate)))
        return stream

    def abort(self, streams: list[Stream], *, tell: bool = False) -> None:
        """Forgets sequences whose client has gone, or, with `tell`, ends their streams with finish_reason "abort"."""
        known = [stream for stream in streams if stream.id in self._streams]
        if not known or self.dead.is_set():
            return
        self._writer.write(frame(Abort([stream.id for stream in known])))
        for stream in known:
            last = Output(id=stream.id, finish_reason="abort")
            if tell:
                stream.put(last)
            self._end(stream, last)

    def abort_all(self) -> None:
        self.abort(list(self._streams.values()), tell=True)

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    async def close(self) -> None:
        """Ends the engine process: kindly, then not."""
        self._closing = True
        if self._process is None:
            return
        if hasattr(self, "_writer"):
            self._writer.close()
        else:
            self._socket.close()
        process = self._process
        try:
            await asyncio.to_thread(process.wait, 5)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=1)

    async def _receive(self) -> FromEngine:
        try:
            header = await self._reader.readexactly(HEADER.size)
            return self._decoder.decode(await self._reader.readexactly(HEADER.unpack(header)[0]))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EngineDead(DIED) from None

    async def _read(self) -> None:
        try:
            while True:
                step = await self._receive()
                assert isinstance(step, Step)
                self._take(step)
        except EngineDead as error:
            self.dead.set()
            for stream in list(self._streams.values()):
                stream.put(error)
                self._end(stream, Output(id=stream.id, finish_reason="error"))

    def _take(self, step: Step) -> None:
        self.stats = step.stats
        for output in step.outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                continue  # aborted while this was under way
            stream.generated += len(output.tokens)
            stream.put(output)
            if output.finish_reason is not None:
                self._end(stream, output)
        self.on_step(step)

    def _end(self, stream: Stream, output: Output) -> None:
        del self._streams[stream.id]
        if not self._streams:
            self._idle.set()
        self.on_end(stream, output)
