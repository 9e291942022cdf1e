"""Which updates are left out: those whose loss or gradient is not a number, or far from all that came before.

The judge knows the last HISTORY finite losses and gradient norms. A value is a spike when it lies more than `spike`
deviations above their median; a deviation is estimated from the median distance to the median (1.4826 of it is the
standard deviation of a normal distribution), which a few outliers do not move. What is not finite is never remembered,
so that one NaN cannot poison it; what is finite always is, so that a lasting change of level becomes the new level.

It is slow to speak: silent until it has a full history, and a deviation is taken as no less than LEAST_LOSS nats and,
of the norm's logarithm, LEAST_NORM. With spike=10 a loss must rise by one nat and by ten deviations, a norm to e^5 =
148 times its median: clipping is what smaller ones are for. Still it is off by default. A spike that a broken batch
makes is gone with the batch; one that the weights make, after too high a rate, stays however many batches are left out,
and would have gone by training on: leaving out is then the way to end a run that would have recovered.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

HISTORY = 128
LEAST_LOSS = 0.1
LEAST_NORM = 0.5


class Diverged(RuntimeError):
    """Too many updates in a row were left out: one sentence for the person who trains."""


class Guard:
    """Judges each update before it is made. All ranks give it the same numbers and get the same answers."""

    def __init__(self, spike: float | None, state: dict[str, Any] | None = None):
        """spike: how many deviations above the median are too many; None looks for what is not finite alone.
        state: what `state()` of an earlier one returned."""
        self.spike = spike
        state = state or {}
        self.losses: list[float] = list(state.get("losses", ()))
        self.norms: list[float] = list(state.get("norms", ()))  # their logarithms
        self.streak: int = int(state.get("streak", 0))  # updates left out since the last one that was made

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as it would have."""
        return {"losses": list(self.losses), "norms": list(self.norms), "streak": self.streak}

    def judge(self, loss: float, norm: float) -> str | None:
        """Why this update must not be made, or None. loss in nats a target, of the global batch; norm of its gradient
        before clipping."""
        if not math.isfinite(loss):
            reason: str | None = f"the loss is not finite ({loss})"
        elif not math.isfinite(norm):
            reason = f"the gradient is not finite ({norm})"
        else:
            logarithm = math.log(max(norm, 1e-30))
            reason = self._spike(loss, logarithm, norm)
            self.losses = [*self.losses, loss][-HISTORY:]
            self.norms = [*self.norms, logarithm][-HISTORY:]
        self.streak = self.streak + 1 if reason else 0
        return reason

    def _spike(self, loss: float, logarithm: float, norm: float) -> str | None:
        if self.spike is None or len(self.losses) < HISTORY:
            return None
        middle, deviation = _spread(self.losses, LEAST_LOSS)
        if loss > middle + self.spike * deviation:
            return f"the loss is {loss:.4g} after a median of {middle:.4g}"
        middle, deviation = _spread(self.norms, LEAST_NORM)
        if logarithm > middle + self.spike * deviation:
            return f"the gradient's norm is {norm:.4g} after a median of {math.exp(middle):.4g}"
        return None


def _spread(values: list[float], least: float) -> tuple[float, float]:
    """Median, and deviation from it, estimated from the median distance."""
    middle = statistics.median(values)
    return middle, max(least, 1.4826 * statistics.median(abs(value - middle) for value in values))
