"""What never losing more than a minute costs: a decoder of 100M parameters trained with a checkpoint a minute.

    make bench-checkpoint      (or python -m bench.checkpoint --pairs 3)

One process trains as `python -m train` does, in windows of a minute each, of equally many updates: with a checkpoint
begun at their start, and without one, in the order with, without, without, with, ... A sample is the seconds of a
window, over all that happens in it: copying and writing beside training, waiting for it, syncing, renaming. Windows
differ by more than a checkpoint costs, so what can be counted is recorded too: the seconds that training stood still
for each checkpoint, and the seconds of a core that its thread took.
QUICK=1: a small model and windows of seconds, to see that it runs; nothing is recorded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from typing import Any

import torch
import yaml

from bench.record import WORK, save, timed
from train import loop
from train.config import load
from train.keeper import Keeper
from train.launch import cores
from train.metrics import Metrics
from train.writer import Writer

WITH, WITHOUT = "a checkpoint a minute", "none"
WARMUP = 6  # updates, of which the last three say how many make a window
SHAPE = {"context": 256, "layers": 12, "width": 768, "heads": 12, "mlp_width": 2048, "tie_embeddings": False}
SMALL = {"context": 128, "layers": 2, "width": 128, "heads": 4, "mlp_width": 256, "tie_embeddings": False}


class Windows:
    """When windows begin, and in which of them a checkpoint is due. Hooked into the loop of this process."""

    def __init__(self, pairs: int, seconds: float):
        self.sides = ([WITH, WITHOUT, WITHOUT, WITH] * pairs)[: 2 * pairs]
        self.seconds = seconds
        self.updates = 0  # of a window
        self.ends: list[float] = []  # of each update, on a clock
        self.waited: list[float] = []  # seconds that training stood still, a checkpoint each
        self.worked: list[float] = []  # seconds of a core, a checkpoint each
        self.writer: Writer | None = None

    def begins(self, step: int) -> str | None:
        """The side of the window that begins after update `step`, if one does."""
        window, rest = divmod(step - WARMUP, self.updates or 1)
        return self.sides[window] if self.updates and not rest and 0 <= window < len(self.sides) else None

    def log(self, metrics: Metrics, row: dict[str, Any]) -> None:
        self.ends.append(time.perf_counter())
        Metrics.log(metrics, row)
        step = len(self.ends)
        if step == WARMUP - 1:
            self.updates = max(2, round(self.seconds / ((self.ends[-1] - self.ends[-4]) / 3)))
        if step == WARMUP + self.updates * len(self.sides):
            self.count()
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self, keeper: Keeper) -> bool:
        """In the place of the clock. It is asked before the update is counted."""
        side = self.begins(keeper.progress.step + 1)
        if side is not None:
            self.count()
            self.writer = keeper.writer if side == WITH else None
        return side == WITH

    def count(self) -> None:
        """Note what the checkpoint of the window that ends cost."""
        if self.writer is not None:
            self.waited.append(self.writer.waited)
            self.worked.append(self.writer.worked)

    def samples(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {WITH: [], WITHOUT: []}
        for number, side in enumerate(self.sides):
            first = WARMUP + number * self.updates
            found[side].append(self.ends[first + self.updates - 1] - self.ends[first - 1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    quick = os.environ.get("QUICK") == "1"
    pairs, seconds = (2, 3.0) if quick else (parser.parse_args().pairs, 60.0)
    timed([sys.executable, "scripts/fetch.py", "shakespeare"])
    shape, vocabulary = (SMALL, 512) if quick else (SHAPE, 8192)
    batch = 4 * int(shape["context"])
    run = WORK / "checkpoint"
    shutil.rmtree(run, ignore_errors=True)
    recipe = {
        "run": {"dir": str(run)},
        "data": {"text": ".cache/text/shakespeare.txt", "validation": None},
        "tokenizer": {"kind": "bpe", "vocab_size": vocabulary},
        "model": shape,
        "optim": {"name": "adamw", "lr": 1e-4},
        "train": {"steps": 100_000, "batch_tokens": batch, "dtype": "auto", "threads": 1 if quick else None},
        "checkpoint": {"every": 100_000},
        "log": {"every": 1, "wandb": None},
    }
    path = WORK / "checkpoint.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")

    windows = Windows(pairs, seconds)
    loop.Metrics = type("Watched", (Metrics,), {"log": lambda self, row: windows.log(self, row)})  # type: ignore
    Keeper.due = lambda self: windows.due(self)  # type: ignore[method-assign]
    status = loop.run(load(path))
    if status != 128 + signal.SIGTERM:
        sys.exit(f"the training ended with status {status}")
    samples = windows.samples()
    ratio = statistics.median(samples[WITH]) / statistics.median(samples[WITHOUT])
    # All cores stand still with training; the thread takes one.
    cost = (statistics.median(windows.waited) + statistics.median(windows.worked) / cores()) / 60
    if quick:
        print(f"ratio {ratio:.4f}; samples {samples}; {windows.waited} {windows.worked}; nothing is recorded")
        return
    parameters = load(path).decoder_config(vocabulary).parameters()["total"]
    save(
        f"checkpoint-{'gpu' if torch.cuda.is_available() else 'cpu'}",
        f"Training {parameters / 1e6:.0f}M parameters with a checkpoint of {parameters * 12 / 1e9:.1f} GB a minute",
        "python -m bench.checkpoint",
        {side: {"samples": values, "unit": "s a window"} for side, values in samples.items()},
        ratio,
        statistic="median",
        note=f"Windows of {windows.updates} updates of {batch:,} tokens, about a minute each. "
        "Weights and AdamW's two means in float32. Counted for each checkpoint: training stood still for "
        f"{statistics.median(windows.waited):.2f} s, its thread took {statistics.median(windows.worked):.2f} s of a "
        f"core; together {100 * cost:.2f}% of the machine in a minute.",
        stood_still=windows.waited,
        thread_seconds=windows.worked,
    )
    shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    main()
