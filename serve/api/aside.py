"""Processes aside, for what a stranger's program or pattern may do to the one that runs it: how many at once, and an
end for what does not end by itself.

The other end is a module that answers a line of JSON for each line that it reads, and holds its own limits on memory
and processor time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

from serve.errors import Overloaded

WORKERS = 2  # processes at most: one that is slow does not keep everybody waiting
WAITING = 1024  # questions that may wait for one
WALL_SECONDS = 60.0  # the processor's time is what is limited; this is for a machine that gives none
LINE = 1 << 27  # bytes of an answer, at most
# What the process sees of the environment: enough to start, and no keys.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")


class Ended(Exception):
    """The process ended over the question; `slow`: because that took too long."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.slow = slow


class Aside:
    """Asks processes of `module`. `opening` gives the first line for each of them, which it does not answer; `what` is
    said of those who wait ("chats are waiting to be rendered").
    """

    def __init__(self, module: str, what: str, opening: Callable[[], bytes] | None = None) -> None:
        self._module, self._what, self._opening = module, what, opening
        self._seats = asyncio.Semaphore(WORKERS)
        self._waiting = 0
        self._idle: list[_Worker] = []
        self.workers: set[_Worker] = set()

    async def start(self) -> None:
        """Starts a process, so that the first question finds it. Does not wait for it."""
        self._idle.append(await self._spawn())

    async def ask(self, question: bytes) -> bytes:
        """The line that answers a line. Raises Overloaded or Ended."""
        if self._waiting >= WAITING:
            raise Overloaded(f"{WAITING} {self._what}. Try again later.")
        self._waiting += 1
        try:
            async with self._seats:
                worker = await self._take()
                try:
                    line = await asyncio.wait_for(worker.ask(question), WALL_SECONDS)
                except BaseException as error:
                    await self._end(worker)
                    if not isinstance(error, TimeoutError):
                        raise
                    line = b""
                if not line:
                    raise Ended(await self._end(worker) in (-signal.SIGPROF, -signal.SIGKILL))
                self._idle.append(worker)
        finally:
            self._waiting -= 1
        return line

    async def close(self) -> None:
        """Ends the processes."""
        for worker in list(self.workers):
            await self._end(worker)

    async def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.returncode is None:
                return worker
            self.workers.discard(worker)
        return await self._spawn()

    async def _spawn(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            limit=LINE,
        )
        worker = _Worker(process, b"" if self._opening is None else self._opening())
        self.workers.add(worker)
        return worker

    async def _end(self, worker: _Worker) -> int:
        """Kills the process unless it has ended; its exit status."""
        self.workers.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        try:
            # It may be on its way out, with a status that says why.
            return await asyncio.wait_for(worker.process.wait(), 0.2)
        except TimeoutError:
            worker.process.kill()
            return await worker.process.wait()


class _Worker:
    """A process, which answers one question at a time."""

    def __init__(self, process: asyncio.subprocess.Process, opening: bytes) -> None:
        self.process = process
        self._opening = opening

    async def ask(self, question: bytes) -> bytes:
        """The line it answers; empty where it died over the question."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        opening, self._opening = self._opening, b""
        try:
            self.process.stdin.write(opening + question)
            await self.process.stdin.drain()
            return await self.process.stdout.readline()
        except (ConnectionError, ValueError):  # ValueError: more than LINE bytes
            return b""
