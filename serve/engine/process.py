"""The engine in a process of its own: msgspec frames over a socket pair, one frame of outputs a step.

`spawn` is the API's side and imports no torch; `main` is the engine's. The engine ends when the socket does, so that
no engine outlives its server, however that died; it leaves signals to the server, which drains first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

from serve.engine.messages import (
    Abort,
    Add,
    AddBeam,
    Configure,
    EngineConfig,
    Failed,
    Grammar,
    Stats,
    Step,
    ToEngine,
)

HEADER = struct.Struct("<I")  # the length of the frame that follows, in bytes
CHUNK = 1 << 20
OUT_OF_MEMORY = (
    "The engine ran out of memory while it was loading: pass a smaller --kv-cache-memory-bytes or --max-model-len."
)


def frame(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


def spawn(config: EngineConfig) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts the engine; the first frame that comes over the socket is Words or Failed."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "serve.engine.process", str(theirs.fileno())]
        # A thread that waits for the others spins for some microseconds, which bridges the gap between two operations,
        # and then sleeps: spinning on, as is the default, it takes a core for which HTTP or others have work, and then
        # a step takes several times as long.
        environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    ours.sendall(frame(Configure(config)))
    return process, ours


class Channel:
    """The engine's end of the socket, blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: Any) -> None:
        self._socket.sendall(frame(message))

    def receive(self, *, wait: bool) -> Iterator[ToEngine]:
        """All messages that have arrived; with `wait`, at least one. Raises EOFError when the other end has closed."""
        if wait:
            while not self._complete():
                self._read()
        while self._readable():
            self._read()
        while self._complete():
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            message = self._decoder.decode(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield message

    def _complete(self) -> bool:
        size = len(self._buffer)
        return size >= HEADER.size and size >= HEADER.size + HEADER.unpack_from(self._buffer)[0]

    def _readable(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def _read(self) -> None:
        data = self._socket.recv(CHUNK)
        if not data:
            raise EOFError
        self._buffer += data


def main(argv: list[str]) -> int:
    """Runs the engine whose socket is the file descriptor argv[0], until the other end closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(argv[0])))
    threading.Thread(target=_end_with_server, args=(int(argv[0]),), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(channel)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: nothing here is worth the interpreter's and torch's own tidying up


def _end_with_server(socket: int) -> None:
    """Ends this process when the other end closes, even while it loads a model or computes a long step."""
    poll = select.poll()
    poll.register(socket, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    poll.poll()
    os._exit(0)


def _serve(channel: Channel) -> None:
    # Imported here: `spawn` is called by a process that never loads torch.
    from lm import pretrained
    from serve.engine.build import build
    from serve.engine.memory import ran_out
    from serve.engine.words import pack

    configure, *early = channel.receive(wait=True)
    assert isinstance(configure, Configure)
    try:
        tokenizer = pretrained.load_tokenizer(configure.config.tokenizer or configure.config.folder)
        channel.send(pack(tokenizer))
        engine, ready = build(configure.config, tokenizer)
    except ValueError as error:  # FolderError, TokenizerError, SetupError: sentences for who starts the server
        channel.send(Failed(str(error)))
        return
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        channel.send(Failed(OUT_OF_MEMORY))
        return
    channel.send(ready)
    while True:
        for message in [*early, *channel.receive(wait=not engine.has_work and not early)]:
            if isinstance(message, (Add, AddBeam)):
                engine.add(message)
            elif isinstance(message, Abort):
                engine.abort(message.ids)
            elif isinstance(message, Grammar):
                engine.learn(message)
        early = []
        # Without work, what came were aborts: the server learns that nothing runs any more.
        channel.send(engine.step() if engine.has_work else Step([], engine.fill(Stats())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
