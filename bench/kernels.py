"""Attention over the paged cache: the C kernel beside torch's fused attention, one layer, no model around it.

    make bench-kernels

Three sides take turns, on the same numbers: the kernel, which also writes the new keys and values; `sdpa`, torch's
fused attention over keys and values that already lie one after the other, with nothing to write or gather: the least
that it can take; and `gathered`, what the engine does without kernels, gather and `sdpa`. Heads are SmolLM2-135M's
(9 query heads on 3 KV heads) and a 110M model's (12 on 12), 64 wide.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import save_table
from lm.params import SamplingParams
from serve.engine import kernels
from serve.engine.kernels import Kernels
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.scheduler import Share

MODELS = {"SmolLM2-135M": (9, 3), "110M": (12, 12)}
DIM, SIZE = 64, 16
# Sequences, tokens computed before, tokens of this step.
LOADS = [
    *((sequences, context, 1) for context in (160, 1024) for sequences in (1, 8, 16, 32)),
    *((1, 0, prompt) for prompt in (128, 512, 2048)),
]
LEAST = 4e-3  # seconds of a sample, at least: short calls are repeated
LAYERS = 8  # in turn, so that short contexts are not all in the nearest cache, as in a model they are not


@dataclass
class Load:
    """One step over `sequences` sequences, each with `context` tokens before its `new` ones."""

    heads: int
    kv_heads: int
    sequences: int
    context: int
    new: int
    dtype: torch.dtype

    def sides(self, library: Kernels) -> dict[str, Callable[[int], Tensor]]:
        """By name, what computes layer i -> the mixed values."""
        total = self.context + self.new
        each = -(-total // SIZE)
        order = torch.randperm(self.sequences * each, generator=torch.Generator().manual_seed(0)) + 1
        shares = []
        for i in range(self.sequences):
            request = Request(id="", prompt=[0] * total, params=SamplingParams())
            request.table = order[i * each : (i + 1) * each].tolist()
            shares.append(Share(request, self.context, self.new))

        def pages(side: Kernels | None) -> Pages:
            made = Pages(
                layers=LAYERS,
                heads=self.heads,
                kv_heads=self.kv_heads,
                dim=DIM,
                blocks=self.sequences * each + 1,
                size=SIZE,
                dtype=self.dtype,
                device="cpu",
                kernels=side,
            )
            for tensor in (*made.keys, *made.values):
                tensor.normal_()
            return made

        rows = self.sequences * self.new
        qkv = torch.randn(rows, (self.heads + 2 * self.kv_heads) * DIM).to(self.dtype)
        counts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = (x.unflatten(1, (-1, DIM)) for x in qkv.split([count * DIM for count in counts], dim=1))
        ours, gathered = (pages(side).attend([None] * LAYERS, shares) for side in (library, None))
        grouped, kv = self._contiguous(q, total)
        causal = self.new > 1

        def sdpa(layer: int) -> Tensor:
            keys, values = kv[layer]
            return F.scaled_dot_product_attention(grouped, keys, values, is_causal=causal)

        return {"kernel": lambda i: ours(i, q, k, v), "sdpa": sdpa, "gathered": lambda i: gathered(i, q, k, v)}

    def _contiguous(self, q: Tensor, total: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Queries, and keys and values of LAYERS layers, as the fused operator is fastest with them.

        One token of each sequence: the heads that share a KV head are query rows of it. A prompt: keys are repeated.
        """
        shape = (self.sequences, self.kv_heads, total, DIM)
        group = self.heads // self.kv_heads
        if self.new == 1:
            queries, repeated = q.unflatten(1, (self.kv_heads, group)), 1
        else:
            queries, repeated = q.transpose(0, 1).unsqueeze(0), group

        def made() -> Tensor:
            return torch.randn(shape).to(self.dtype).repeat_interleave(repeated, dim=1)

        return queries, [(made(), made()) for _ in range(LAYERS)]

    def operations(self) -> float:
        """Multiplications and additions of the two products."""
        pairs = self.new * self.context + self.new * (self.new + 1) / 2
        return 4 * self.sequences * pairs * self.heads * DIM

    def bytes(self) -> float:
        """Keys and values, each read once."""
        return 2 * self.sequences * (self.context + self.new) * self.kv_heads * DIM * self.dtype.itemsize


def sample(side: Callable[[int], Tensor], calls: int) -> float:
    """Milliseconds of a call."""
    began = time.perf_counter()
    for i in range(calls):
        side(i % LAYERS)
    return (time.perf_counter() - began) * 1e3 / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: every core)")
    options = parser.parse_args()
    library = kernels.current()
    if library is None:
        raise SystemExit("The kernels were not built, or HEED_KERNELS is off.")
    torch.set_num_threads(options.threads)
    rows = []
    for model, (heads, kv_heads) in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for sequences, context, new in LOADS:
                load = Load(heads, kv_heads, sequences, context, new, dtype)
                with torch.inference_mode():
                    sides = load.sides(library)
                    once = max(sample(side, LAYERS) for side in sides.values())
                    calls = max(1, round(LEAST * 1e3 / once))
                    samples: dict[str, list[float]] = {name: [] for name in sides}
                    for _ in range(options.rounds):
                        for name, side in sides.items():
                            samples[name].append(sample(side, calls))
                medians = {name: statistics.median(values) for name, values in samples.items()}
                kind = f"decode {sequences} at {context}" if new == 1 else f"prompt of {new}"
                rows.append(
                    {"heads of": model, "dtype": str(dtype).removeprefix("torch."), "step": kind}
                    | {f"{name}, ms": medians[name] for name in sides}
                    | {
                        "sdpa / kernel": medians["sdpa"] / medians["kernel"],
                        "kernel, GFLOP/s": load.operations() / medians["kernel"] / 1e6,
                        "kernel, GB/s": load.bytes() / medians["kernel"] / 1e6,
                        "samples": samples,
                    }
                )
    columns = [key for key in rows[0] if key != "samples"]
    save_table(
        "kernels",
        "Attention of one layer over the paged cache, milliseconds",
        "make bench-kernels",
        columns,
        rows,
        note=f"{library.variant} kernels, {options.threads} threads, medians of {options.rounds}; sdpa: keys and "
        "values lie together, nothing is written; gathered: the engine without kernels.",
    )


if __name__ == "__main__":
    main()
