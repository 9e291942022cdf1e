"""One command at a time in a run's folder: a lock that the kernel holds for a process, and lets go of when it ends.

However the process ends, SIGKILL included, no stale lock is left. The file `live` says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from train.schema import RecipeError

FILE = "live"
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks


class Live:
    """The lock on a run's folder, a context. A folder that it made and that stayed empty is removed again."""

    def __init__(self, run_dir: Path):
        """Raises RecipeError where another process has the lock, or where the folder cannot be written."""
        self.run_dir, self.path = run_dir, run_dir / FILE
        self.made = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OSError as error:
            raise RecipeError(
                [f"run.dir is {run_dir}, and it cannot be written ({error.strerror or error}); choose another."]
            ) from None

    def _take(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                raise RecipeError(
                    [
                        f"{self.run_dir} is in use: {holder} trains there now. Wait for it or stop it (kill -TERM "
                        "leaves a checkpoint); or choose another run.dir."
                    ]
                ) from None
            except OSError as error:
                if error.errno not in UNKNOWN:
                    os.close(file)
                    raise
            if self._is_named(file):  # and not the one that its last holder has just removed
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
            os.close(file)

    def _is_named(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go. The file goes first, so that nobody locks one that has lost its name."""
        try:
            self.path.unlink(missing_ok=True)
            if self.made:
                self.run_dir.rmdir()
        except OSError:  # not empty, or not to be written any more: nothing that matters here
            pass
        os.close(self._file)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _holder(file: int) -> str:
    """What the holder has written of itself; it may have taken the lock a moment ago, and write it only now."""
    for _ in range(20):
        if said := os.pread(file, 200, 0).decode("utf-8", "replace").strip():
            return said
        time.sleep(0.02)
    return "another process"
