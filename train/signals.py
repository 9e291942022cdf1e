"""What ends a run from outside: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), or a launcher that is gone.

    preparing   until the first update of this command is done there is nothing to keep: it ends at once.
    training    the first signal asks for a checkpoint; the loop gets to it and ends. A second Ctrl-C ends at once: what
                is complete stays, what is half written is removed.

`accelerate launch` with one process does not pass SIGTERM on; it ends, and its trainer would train on unseen. So a
launched trainer whose parent is another than at its start does as if it had been sent SIGTERM.

A thread listens beside Python's own handlers, which run in the main thread between two of its instructions: they wait
while it computes or waits in a collective; the thread does not.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what the launchers leave in the environment
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN = 0.3  # seconds: two signals nearer than this are one, sent to a process and passed on to it
PATIENCE = 5.0  # seconds that the main thread has to end by itself where nothing is to be kept


class Interrupted(BaseException):
    """A signal before there was anything to keep. Not an Exception: nobody on the way takes it for a failure."""

    def __init__(self, number: int):
        self.number = number


class Signals:
    """A context of the main thread. `number` is the first signal that came, else None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.why = ""  # the sentence's subject
        self.at_once: Callable[[], None] = lambda: None  # what is to be removed before a second Ctrl-C ends everything
        self._preparing = True
        self._came = 0.0  # when, on the monotonic clock
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    @property
    def status(self) -> int:
        """The exit status of a run that a signal ended: the shell's, 128 and the signal's number."""
        return 128 + (self.number or signal.SIGTERM)

    def training(self) -> None:
        """From now on a signal asks, and does not end; also where a library has put a handler of its own meanwhile."""
        if self._preparing:
            self._preparing = False
            for number in self._before:
                signal.signal(number, self._handle)

    def __enter__(self) -> Signals:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        # A command that nohup has made deaf to SIGHUP stays so.
        asking = [n for n in ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in asking}
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._mouth.close()  # ends the thread
        self._thread.join()
        self._ears.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if self._preparing:
            raise Interrupted(self.number or number)

    def _note(self, number: int) -> None:
        if self.number is None:
            self._came = time.monotonic()
            self.why = self.why or f"by {signal.Signals(number).name}"
            self.number = number

    # ------------------------------------------------------------ the thread

    def _listen(self) -> None:
        while True:
            readable, _, _ = select.select([self._ears], [], [], 1.0)
            if readable:
                numbers = self._ears.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    self._heard(number)
            self._look_around()

    def _heard(self, number: int) -> None:
        if number not in ASKING:
            return
        again = self.number == number == signal.SIGINT and time.monotonic() - self._came > AGAIN
        self._note(number)
        if again and not self._preparing:
            self._end("Stopped at once, without another checkpoint. The same command continues from the newest.")

    def _look_around(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            # A launcher of several processes waits for them after Ctrl-C, until there is a second one.
            if self.number == signal.SIGINT and "TORCHELASTIC_RUN_ID" in os.environ and not self._preparing:
                self._end("The launcher is gone: stopped at once, without another checkpoint.")
            if self.number is None:
                self.why = "because its launcher is gone"
                os.kill(os.getpid(), signal.SIGTERM)
        if self._preparing and self.number is not None and time.monotonic() - self._came > PATIENCE:
            self._end(sentence(self))

    def _end(self, said: str) -> None:
        with suppress(Exception):
            self.at_once()
        with suppress(OSError, ValueError):
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # the cursor, which a bar hides
                sys.stdout.flush()
            print(f"\n{said}", file=sys.stderr, flush=True)
        os._exit(self.status)


def sentence(signals: Signals) -> str:
    """What is said of a run that ended before its first update."""
    return f"Stopped {signals.why} before the first update: there was nothing new to keep."
