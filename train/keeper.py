"""When a checkpoint is due, of what kind, and whether it counts: what all ranks must decide alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from train import checkpoint
from train.checkpoint import Progress
from train.config import Checkpoint
from train.launch import Launch
from train.writer import Writer

SHARE = 0.01  # of the time that training may stand still for ephemeral checkpoints


class Keeper:
    """One rank's part in a run's checkpoints. The main rank writes; all take part in gathering sharded state."""

    def __init__(
        self,
        here: Launch,
        run_dir: Path,
        ask: Checkpoint,
        model: nn.Module,
        optimizer: Any,
        progress: Progress,
        bring: Callable[[], None],
    ):
        """bring: puts into `progress` what the loop keeps elsewhere; called before each snapshot."""
        self.here, self.run_dir, self.ask = here, run_dir, ask
        self.model, self.optimizer, self.progress, self.bring = model, optimizer, progress, bring
        self.writer = Writer(run_dir, ask.keep) if here.main else None
        self._begun = time.monotonic()
        self._owed = False  # one that is to be kept: due, and not yet begun or not proved to be good
        self._unproved = False  # the one that is being written is to be kept

    def due(self) -> bool:
        """Whether it is time for an ephemeral one, by the main rank's clock; less often where training would stand
        still for more than SHARE of the time."""
        if self.writer is None or self.ask.ephemeral is None:
            return False
        return time.monotonic() - self._begun >= max(self.ask.ephemeral, self.writer.waited / SHARE)

    def after_update(self, due: bool, healthy: bool) -> None:
        """Begin a checkpoint after this update if there is to be one; it is written while the next is computed.

        due: what the main rank's `due()` said. healthy: not after an update that was left out.
        """
        self._owed |= self.progress.step % self.ask.every == 0
        if healthy and (self._owed or due):
            self.begin(ephemeral=not self._owed)

    def begin(self, ephemeral: bool) -> None:
        snapshot = self._snapshot(ephemeral)
        if self.writer is not None and snapshot is not None:
            self.writer.begin(snapshot)
        self._unproved, self._owed = not ephemeral, False
        self._begun = time.monotonic()

    def prove(self, good: bool) -> None:
        """The state that is being written has been used for a forward and backward pass, which went well or did not.
        Returns when it may change."""
        self._owed |= self._unproved and not good
        self._unproved = False
        if self.writer is not None:
            self.writer.decide(good)
            self.writer.release()

    def save(self, ephemeral: bool) -> str | None:
        """Write the state now, unless its checkpoint stands. Why it failed, for every rank to know."""
        here, writer = self.here, self.writer
        here.watch.at(f"the checkpoint after update {self.progress.step}")
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        broken = here.any(not all(bool(p.isfinite().all()) for p in parameters))
        problem = "the weights are not finite" if broken else None
        if writer is not None:
            writer.decide(not broken)
            writer.finish()
        stands = here.any(writer is not None and writer.step == self.progress.step)
        if not (broken or stands) and (snapshot := self._snapshot(ephemeral)) is not None:
            try:
                checkpoint.write(self.run_dir, snapshot, self.ask.keep)
            except OSError as error:
                problem = error.strerror or str(error)
        failed = here.any(problem is not None)
        return problem or ("the main rank could not write" if failed else None)

    def close(self) -> None:
        """Let go of what is being written and not proved: an error came before."""
        if self.writer is not None:
            self.writer.decide(False)
            self.writer.finish()

    def problem(self) -> str | None:
        """A sentence for a checkpoint that could not be written, once; on the main rank."""
        if self.writer is None or not (why := self.writer.reported()):
            return None
        return f"a checkpoint could not be written ({why}); {self.newest()}, and the next one is tried when it is due."

    def newest(self) -> str:
        found = checkpoint.checkpoints(self.run_dir)
        return f"the newest is {found[0]}" if found else "there is none yet"

    def _snapshot(self, ephemeral: bool) -> checkpoint.Snapshot | None:
        self.bring()
        return checkpoint.snapshot(self.model, self.optimizer, self.progress, main=self.here.main, ephemeral=ephemeral)
