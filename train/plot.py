"""The loss curve of a run as one PNG: training loss, its running mean, and the held-out loss over tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from train.metrics import read

TRAINING = "#7aa6d8"
SMOOTHED = "#1f5fa8"
HELD_OUT = "#c8501e"


def loss_curve(metrics_path: str | Path, png_path: str | Path) -> bool:
    """Draws `metrics_path` (a metrics.jsonl) into `png_path`, replaced whole. False, and no file, without two rows."""
    rows = read(metrics_path)
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    if len(train) < 2:
        return False

    # The object interface, not pyplot: no global state, no display, safe inside a training process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    mean = smooth(losses)
    if mean != list(losses):
        axes.plot(steps, losses, color=TRAINING, linewidth=0.8, alpha=0.7, label="training, each log row")
        axes.plot(steps, mean, color=SMOOTHED, linewidth=1.8, label="training, running mean")
    else:  # too few rows to smooth
        axes.plot(steps, losses, color=SMOOTHED, linewidth=1.8, label="training")
    if held_out:
        held_steps, held_losses = zip(*held_out, strict=True)
        best = min(held_out, key=lambda point: point[1])
        label = f"held out: best {best[1]:.3f} at step {best[0]}"
        axes.plot(held_steps, held_losses, color=HELD_OUT, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.set_xlabel("step (updates)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(Path(metrics_path).resolve().parent.name)
    axes.margins(x=0.01, y=0.06)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    png_path = Path(png_path)
    fresh = png_path.with_name(f".{png_path.name}.{os.getpid()}")
    try:
        figure.savefig(fresh, format="png")
        fresh.replace(png_path)
    finally:
        fresh.unlink(missing_ok=True)
    return True


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred running mean over about `share` of the points; the window narrows at both ends, so it never lags."""
    half = int(share * len(values) / 2)
    if not half:
        return list(values)
    sums = list(accumulate(values, initial=0.0))
    out = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        out.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return out
