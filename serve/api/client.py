"""The API's end of the engine: a request's sequences go in as a group, their outputs come back as they are made."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import msgspec

from lm.params import SamplingParams
from serve.api.budget import BUDGET, ENTRY, UNREAD, entries, most
from serve.engine.messages import (
    Abort,
    Add,
    AddBeam,
    BeamSearchParams,
    Constraint,
    EngineConfig,
    Failed,
    FromEngine,
    Grammar,
    Output,
    Ready,
    Stats,
    Step,
    Timings,
    Words,
)
from serve.engine.process import HEADER, frame, spawn
from serve.errors import EngineDead, GenerationFailed, InvalidRequest, Overloaded, ServeError

T = TypeVar("T")
log = logging.getLogger("heed.serve")

DIED = "The engine process has ended unexpectedly; the server is stopping."
DRAINING = "The server is shutting down and takes no new requests."


class EngineFailed(Exception):
    """The engine could not start; the message is its sentence."""


class Member:
    """One sequence in the engine: the `index`-th of its group."""

    def __init__(
        self, group: Group, index: int, prompt_tokens: int, arrival: float, max_tokens: int | None = None
    ) -> None:
        self.id = f"{group.id}-{index}"
        self.group = group
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens  # None: nothing is generated
        self.arrival = arrival
        self.generated = 0
        self.cached = 0  # tokens of the prompt that were found in the prefix cache
        self.finish_reason: str | None = None
        self.timings: Timings | None = None  # the engine's, when it has ended by itself
        self.first_token = 0.0  # when the API had it,
        self.last_token = 0.0  # and the latest one


class Group:
    """The sequences of one HTTP request; `close` aborts those that have not ended.

    Iterating gives (index, output) until every sequence has given its last; what piled up while nobody read comes as
    one. Raises GenerationFailed or EngineDead.
    """

    def __init__(self, client: EngineClient, *, n: int = 1, stream: bool = False, held: int = 0) -> None:
        self.id = uuid.uuid4().hex
        self.members: list[Member] = []
        self.n = n  # sequences of each prompt
        self.held = held  # bytes that it counts for in the client's budget
        self._client = client
        self._stream = stream
        self._unread = 0  # log-probabilities that are pending
        self._pending: dict[int, Output] = {}
        self._arrived = asyncio.Event()
        self._failure: ServeError | None = None

    def put(self, index: int, output: Output) -> None:
        waiting = self._pending.get(index)
        self._pending[index] = output if waiting is None else join(waiting, output)
        self._arrived.set()
        if self._stream and output.logprobs:
            self._unread += entries(output)
            if self._unread > UNREAD and self._failure is None:
                self.fail(GenerationFailed(f"More than {UNREAD} log-probabilities of this stream were left unread."))
                self.close()

    def fail(self, error: ServeError) -> None:
        self._failure = error
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        left = len(self.members)
        while left:
            await self._arrived.wait()
            self._arrived.clear()
            ready, self._pending, self._unread = self._pending, {}, 0
            for index, output in ready.items():
                if output.impossible:
                    raise InvalidRequest(output.error or "The request cannot be carried out.")
                if output.finish_reason == "error":
                    raise GenerationFailed(f"This request failed in the engine. {output.error}")
                left -= output.finish_reason is not None
                yield index, output
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        self._client.abort(self.members)
        self._client.release(self)


def join(first: Output, then: Output) -> Output:
    """Two outputs of one sequence, one after the other, as one, which has the lists of the first: those grow, so that
    an answer of many parts is not copied for each of them.
    """
    first.tokens.extend(then.tokens)
    logprobs = first.logprobs if first.logprobs is not None else then.logprobs
    if first.logprobs is not None:
        first.logprobs.extend(then.logprobs or ())
    return Output(
        id=first.id,
        text=first.text + then.text,
        tokens=first.tokens,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs,
        finish_reason=then.finish_reason,
        stop_reason=then.stop_reason,
        error=then.error,
        timings=then.timings,
        cumulative_logprob=then.cumulative_logprob,
        cached=first.cached or then.cached,
        impossible=then.impossible,
    )


class EngineClient:
    """Starts the engine process and speaks with it.

    `limit` bounds the sequences that are in the engine, running or queued. While prompts of `waiting_tokens` tokens in
    all (None: any number) have no first token yet, no more are taken. `on_step` sees every step, `on_output` every
    output with its member.
    """

    def __init__(self, config: EngineConfig, limit: int, *, waiting_tokens: int | None = None) -> None:
        self.config = config
        self.limit = limit
        self._waiting_tokens = waiting_tokens
        self.stats = Stats()
        self.draining = False
        self.dead = asyncio.Event()
        self.on_step: Callable[[Step], None] = lambda step: None
        self.on_output: Callable[[Member, Output], None] = lambda sequence, output: None
        self._members: dict[str, Member] = {}
        self._held = 0  # bytes of log-probabilities that answers may come to take
        self._idle = asyncio.Event()
        self._idle.set()
        self._process: subprocess.Popen[bytes] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    def launch(self) -> None:
        """Starts the process; `connect` waits for it. Apart, so that what the API needs is imported meanwhile."""
        self._process, self._socket = spawn(self.config)

    async def words(self) -> Words:
        """The model's tokenizer, which comes first. Raises EngineFailed."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=1 << 26)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        return await self._expect(Words)

    async def connect(self) -> Ready:
        """What the engine says of itself once it has produced its first token. Raises EngineFailed."""
        ready = await self._expect(Ready)
        self._reading = asyncio.create_task(self._read())
        return ready

    @property
    def in_flight(self) -> int:
        """Sequences that have been given to the engine and have not ended."""
        return len(self._members)

    @property
    def healthy(self) -> bool:
        return not (self.draining or self.dead.is_set())

    def admit(self, count: int) -> None:
        """Raises Overloaded, EngineDead or (if they never may) InvalidRequest unless `count` more may come."""
        if self.dead.is_set():
            raise EngineDead(DIED)
        if self.draining:
            raise Overloaded(DRAINING)
        if count > self.limit:
            raise InvalidRequest(
                f"The request asks for {count} sequences at once; this server takes {self.limit} at most.", "n"
            )
        if self.in_flight + count > self.limit:
            sentence = f"The queue is full: {self.in_flight} sequences are running or waiting. Try again later."
            raise Overloaded(sentence, limit="max_num_queued_reqs")
        if self._waiting_tokens is not None:
            waiting = sum(member.prompt_tokens for member in self._members.values() if not member.generated)
            if waiting >= self._waiting_tokens:
                sentence = f"The queue is full: {waiting} tokens of prompts are waiting. Try again later."
                raise Overloaded(sentence, limit="max_num_queued_tokens")

    def submit(
        self,
        work: Sequence[tuple[list[int], SamplingParams | BeamSearchParams]],
        *,
        grammar: Grammar | None = None,
        constraints: Sequence[Constraint | None] = (),
        n: int = 1,
        stream: bool = False,
        generate: bool = True,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Group:
        """Gives prompts to the engine, each to be continued by a sequence or by those of a beam. Of the sequences `n`
        each are of one prompt. `constraints`, if there are any, hold for the sequences, one each; they name the
        `grammar`. The group has to be closed in the end. Raises as `admit`.
        """
        assert self._writer is not None
        self.admit(sum(params.beam_width if isinstance(params, BeamSearchParams) else 1 for _, params in work))
        group = Group(self, n=n, stream=stream, held=self._hold(most(work, stream=stream)))
        now = time.monotonic()
        if grammar is not None:
            self._writer.write(frame(grammar))
        for (prompt, params), constraint in zip(work, constraints or [None] * len(work), strict=True):
            if isinstance(params, BeamSearchParams):
                ids = [self._enter(group, prompt, now, params.max_tokens) for _ in range(params.beam_width)]
                self._writer.write(frame(AddBeam(ids, prompt, params, now, priority)))
            else:
                id = self._enter(group, prompt, now, params.max_tokens)
                self._writer.write(frame(Add(id, prompt, params, now, generate, priority, cache_salt, constraint)))
        self._idle.clear()
        return group

    def _hold(self, size: int) -> int:
        """Takes so much from the budget. Raises InvalidRequest where that is more than all of it, else Overloaded."""
        if size > BUDGET:
            raise InvalidRequest(
                f"The answer could have {size // ENTRY} log-probabilities; this server keeps {BUDGET // ENTRY} at "
                "once. Ask for fewer, for a smaller n or max_tokens, or for a stream.",
                "logprobs",
            )
        if self._held + size > BUDGET:
            raise Overloaded("Too many log-probabilities are asked for at once. Try again later.")
        self._held += size
        return size

    def release(self, group: Group) -> None:
        """Gives back what a group has taken from the budget."""
        self._held -= group.held
        group.held = 0

    def _enter(self, group: Group, prompt: Sequence[int], now: float, max_tokens: int | None) -> str:
        member = Member(group, len(group.members), len(prompt), now, max_tokens)
        group.members.append(member)
        self._members[member.id] = member
        return member.id

    def abort(self, members: Sequence[Member]) -> None:
        """Forgets those that have not ended; whoever still reads them gets finish_reason "abort"."""
        known = [member for member in members if member.id in self._members]
        if not known or self.dead.is_set() or self._writer is None:
            return
        self._writer.write(frame(Abort([member.id for member in known])))
        for member in known:
            self._deliver(member, Output(id=member.id, finish_reason="abort"))

    def abort_all(self) -> None:
        self.abort(list(self._members.values()))

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    async def cause(self) -> str:
        """What the engine's process died of, for the person at the terminal."""
        assert self._process is not None
        try:
            status = await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            return "It does not answer."
        if status == -signal.SIGKILL:
            return "It was killed (SIGKILL); the usual reason is that the machine ran out of memory."
        if status < 0:
            return f"It was ended by {signal.Signals(-status).name}."
        return f"It ended with status {status}."

    async def close(self) -> None:
        """Ends the engine process: by closing the socket; by force, if it is still loading or after five seconds."""
        if self._process is None:
            return
        process = self._process
        if self._reading is None:
            process.kill()
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()
        try:
            await asyncio.to_thread(process.wait, 5)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=1)

    async def _expect(self, kind: type[T]) -> T:
        try:
            message = await self._receive()
        except EngineDead:
            message = Failed("The engine process ended while it was starting; the usual reason is a lack of memory.")
        if not isinstance(message, kind):
            raise EngineFailed(message.message if isinstance(message, Failed) else DIED)
        return message

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
                self.stats = step.stats
                for output in step.outputs:
                    member = self._members.get(output.id)
                    if member is not None:  # None: aborted while this was under way
                        self._deliver(member, output)
                self.on_step(step)
        except Exception as error:
            # The engine's end, or a fault of ours in reading it: nobody would ever be answered again.
            if not isinstance(error, EngineDead):
                log.error("unforeseen error in reading the engine's outputs", exc_info=error)
            self.dead.set()
            for group in {member.group for member in self._members.values()}:
                group.fail(EngineDead(DIED))
            self._members.clear()
            self._idle.set()

    def _deliver(self, member: Member, output: Output) -> None:
        member.generated += len(output.tokens)
        member.cached = member.cached or output.cached
        member.timings = output.timings or member.timings
        self.on_output(member, output)
        member.group.put(member.index, output)
        if output.finish_reason is not None:
            member.finish_reason = output.finish_reason
            del self._members[member.id]
            if not self._members:
                self._idle.set()
