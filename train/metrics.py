"""`metrics.jsonl`: what a run measured, one JSON object a line. It is the truth; wandb and the loss curve mirror it.

A resumed run repeats the steps after its checkpoint. Their old rows would stand twice, so opening the file for a run
that goes on from step k first rewinds it: rows up to k stay, later ones move to `metrics.replayed.jsonl`. So does the
row of an evaluation at k that is made again, because the checkpoint is older than it.

A disk that is full does not end a run and does not break the file: a row that could not be written whole is taken back
and kept in memory, and goes before the next one that can be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

FILE = "metrics.jsonl"
REPLAYED = "metrics.replayed.jsonl"

Value = float | int | str | bool | None


class Metrics:
    """Appends rows to `RUN/metrics.jsonl`; each row is in the file when `log` returns, unless `problem` says why not.

    Keys of a training row: `step` (updates done), `tokens` (trained on so far), `loss` (nats a token), `lr`,
    `grad_norm`, `tokens_per_second`, `mfu` (share of the peak, or null), `memory_gib`, `data_wait` (share of the time),
    `seconds` (since the run began); an evaluation adds `validation_loss` and `validation_bits_per_byte`; an update that
    was left out has `skip` (why), `skip_loss` and `skip_norm`.
    """

    def __init__(
        self, run_dir: str | Path, resume_step: int = 0, again: Callable[[dict], bool] = lambda row: False
    ) -> None:
        """Opens the file, rewound to rows with `step <= resume_step` (0: a new run, nothing stays), without those of
        them that, as `again` says, will be made again. Raises OSError."""
        self.path = Path(run_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(self.path, lambda row: row["step"] <= resume_step and not again(row))
        self.problem: str | None = None  # why the newest rows are not in the file
        self._waiting = b""  # these rows
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._file).st_size

    def log(self, row: Mapping[str, object]) -> None:
        """Appends one row. `step` must be in it; numbers that JSON cannot say (NaN, infinity) are written as null."""
        if "step" not in row:
            raise ValueError(f"a metrics row needs its step; got the keys {sorted(row)}")
        self._waiting += json.dumps({key: _plain(value) for key, value in row.items()}).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):  # the disk took what it had room for; the next byte says why
                written += os.write(self._file, self._waiting[written:])
            self.problem = None
        except OSError as error:
            self.problem = error.strerror or str(error)
        if self.problem is None and written == len(self._waiting):
            self._size, self._waiting = self._size + written, b""
            return
        self.problem = self.problem or "No space left on device"
        with suppress(OSError):  # where not even this can be done, `read` skips the broken line
            os.ftruncate(self._file, self._size)  # to whole lines; making a file shorter needs no room

    def close(self) -> None:
        """Closes the file, after a last try to write what waits."""
        if self._waiting:
            self._flush()
        os.close(self._file)


def read(path: str | Path) -> list[dict]:
    """Every complete row of a metrics file, in order, without a line that a crash cut off. A missing file has none."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def _rewind(path: Path, stays: Callable[[dict], bool]) -> None:
    """Leaves rows that stay, moves the rest aside; the file is replaced whole, never cut in place."""
    if not path.exists():
        return
    rows = read(path)
    kept = [row for row in rows if stays(row)]
    replayed = [row for row in rows if not stays(row)]
    if replayed:
        with path.with_name(REPLAYED).open("a", encoding="utf-8") as aside:
            aside.writelines(json.dumps(row) + "\n" for row in replayed)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _plain(value: object) -> Value:
    """A value as JSON can hold it: tensors and numpy scalars become Python numbers, NaN and infinity become null."""
    item = getattr(value, "item", None)
    if callable(item):
        value = item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a metrics row holds numbers and strings, not {type(value).__name__}: {value!r}")
