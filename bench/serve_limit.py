"""How far a decoding step is from what the machine could do: its bytes and products over two probes of this machine.

A step of B sequences reads every weight once and each sequence's keys and values, and multiplies each weight with B
numbers. It cannot take less than the longer of bytes / bandwidth and products / speed; attention's own products and
everything between the products count as nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm import pretrained

BATCHES = (1, 8, 16, 32)
CONTEXT = 160  # tokens of a sequence in the middle of 128 in and 64 out
TRIES = 7


@dataclass(frozen=True)
class Machine:
    """What this machine did at best in the probes."""

    bandwidth: float  # bytes/s, reading 1 GiB from memory
    speed: dict[str, float]  # dtype -> operations/s (two for a multiplication and addition), in a large product

    def best(self, dtype: str) -> float:
        """Of products of weights in this dtype: bfloat16 may be multiplied as floats, which some do faster."""
        return max(self.speed.values()) if dtype == "bfloat16" else self.speed[dtype]


def probe(threads: int) -> Machine:
    """Measures with so many threads, for a few seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        large = torch.ones(1 << 28)
        bandwidth = large.numel() * 4 / _least(large.sum)
        speed = {name: _speed(getattr(torch, name)) for name in ("float32", "bfloat16")}
    finally:
        torch.set_num_threads(before)
    return Machine(bandwidth, speed)


@torch.inference_mode()
def _speed(dtype: torch.dtype, rows: int = 512, width: int = 2048) -> float:
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
    ways: list[Callable[[], Tensor]] = [lambda: torch.nn.functional.linear(x, weight)]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        ways[-1]()
    except (RuntimeError, AttributeError):  # this build or machine has no packed product in this dtype
        ways = ways[:1]
    return 2 * rows * width * width / min(_least(way) for way in ways)


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few tries, after one that does not count."""
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def step(folder: Path, dtype: str, batch: int, context: int = CONTEXT) -> tuple[float, float]:
    """Bytes and operations of one decoding step of `batch` sequences of `context` tokens each."""
    config = pretrained.read_config(folder)
    size = getattr(torch, dtype).itemsize
    weights = config.parameters()["total"]  # a tied embedding is read once, by the output layer
    heads = config.heads * config.dim
    cached = 2 * config.layers * config.kv * config.dim * context
    operations = 2 * batch * weights + 4 * batch * config.layers * heads * context
    return size * (weights + batch * cached), operations


def rows(folder: Path, machine: Machine, measured: dict[tuple[str, int], float]) -> list[dict[str, str | float]]:
    """A row for each (dtype, batch) of `measured`, which holds milliseconds a step."""
    made: list[dict[str, str | float]] = []
    for (dtype, batch), milliseconds in measured.items():
        size, operations = step(folder, dtype, batch)
        read, multiply = size / machine.bandwidth * 1e3, operations / machine.best(dtype) * 1e3
        made.append(
            {
                "dtype": dtype,
                "sequences": batch,
                "MB a step": size / 1e6,
                "GFLOP a step": operations / 1e9,
                "limit, ms": max(read, multiply),
                "limited by": "memory" if read > multiply else "products",
                "measured, ms": milliseconds,
                "of the limit": f"{max(read, multiply) / milliseconds:.0%}",
            }
        )
    return made
