"""The learning rate as a function of the update count: nothing to save, nothing to step."""

from __future__ import annotations

import math

from train.config import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rates are multiplied by in update `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches 1 in update `warmup`. Then `cosine` falls to `floor` in the last update;
    `wsd` (warm-up, stable, decay) stays at 1 and falls linearly to `floor` over the last `decay` share of the run
    (arXiv 2405.18392); `inverse_sqrt` is arXiv 1706.03762's, equation 3: d^-0.5 min(n^-0.5, n warmup^-1.5) for update
    n = step + 1, whose peak, d^-0.5 warmup^-0.5, is in update `warmup`; `constant` stays.
    """
    if schedule.kind == "inverse_sqrt":
        return min((step + 1) / schedule.warmup, math.sqrt(schedule.warmup / (step + 1)))
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        past = (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * min(1.0, past))) / 2
    fall = max(1, round(schedule.decay * steps))
    left = (steps - step) / (fall + 1)  # the last update still moves, at 1 / (fall + 1) of the way up
    return schedule.floor + (1 - schedule.floor) * min(1.0, left)
