"""What is summed between two rows of metrics.jsonl."""

from __future__ import annotations

import time
from typing import Any


class Window:
    """Sums over all ranks. A run that is stopped between two rows takes them along: the next row is the same."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds without a batch
        self.targets = 0  # since `began`
        state = state or {}
        self.loss: float = state.get("loss", 0.0)  # of the updates that were made: the objective in nats
        self.nll: float = state.get("nll", 0.0)  # without label smoothing
        self.counted: int = state.get("counted", 0)  # their targets
        self.norm: float | None = state.get("norm")  # of the last one's gradient, before clipping

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "nll": self.nll, "counted": self.counted, "norm": self.norm}

    def add(self, loss: float, nll: float, norm: float, targets: int) -> None:
        """An update that was made: nats a target."""
        self.loss, self.nll = self.loss + loss * targets, self.nll + nll * targets
        self.counted, self.norm = self.counted + targets, norm

    def means(self) -> tuple[float | None, float | None]:
        """Loss and nll, nats a target; None where no update was made."""
        return (self.loss / self.counted, self.nll / self.counted) if self.counted else (None, None)
