"""A checkpoint written by a thread while training goes on.

Weights and optimizer state change in the optimizer's step alone, so between two steps, during the next forward and
backward pass, they may be read where they lie: no copy is made. The next step waits until the thread has read them
(`release`), which it mostly has by then; syncing and renaming go on beside later updates. From a device there are
copies, and the step waits for these alone.

The forward and backward pass beside it are also the first to use the new weights. Only when their loss and gradient
are in order (`decide`) does the checkpoint get its name: no run resumes from a state that is broken already.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from train import checkpoint
from train.checkpoint import Snapshot


class Writer:
    """At most one checkpoint at a time. The main rank's; the others have none to write."""

    def __init__(self, run_dir: Path, keep: int):
        self.run_dir, self.keep = run_dir, keep
        self.step: int | None = None  # of the newest checkpoint that has its name
        self.failure: str | None = None  # why the newest attempt failed, until `reported`
        self.waited = 0.0  # seconds that training stood still for the newest one
        self.worked = 0.0  # seconds of a core that writing the newest one took
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._decided = threading.Event()
        self._good = False

    def begin(self, snapshot: Snapshot) -> None:
        """Start to write; waits for the one before, if it is still being written."""
        began = time.perf_counter()
        self.finish()
        self.waited = time.perf_counter() - began
        self._read.clear()
        self._decided.clear()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def decide(self, good: bool) -> None:
        """Whether the state that is being written has proved to be in order. Only the first answer counts."""
        if not self._decided.is_set():
            self._good = good
            self._decided.set()

    def release(self) -> None:
        """Return when the tensors may change."""
        if self._thread is not None and not self._read.is_set():
            began = time.perf_counter()
            self._read.wait()
            self.waited += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until nothing is being written. It must have been decided about."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def reported(self) -> str | None:
        """Why an attempt failed, once."""
        failure, self.failure = self.failure, None
        return failure

    def _write(self, snapshot: Snapshot) -> None:
        began = time.thread_time()
        try:
            if checkpoint.write(self.run_dir, snapshot, self.keep, self._read.set, self._is_good):
                self.step = snapshot.step
        except Exception as error:  # whatever it is: a run is worth more than one checkpoint of it
            self.failure = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        finally:
            self.worked = time.thread_time() - began
            self._read.set()

    def _is_good(self) -> bool:
        self._decided.wait()
        return self._good
