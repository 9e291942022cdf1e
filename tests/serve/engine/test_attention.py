"""Attention over pages against attention written out; through the kernels also against itself, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm.attention import explicit_attention, may_attend
from lm.params import SamplingParams
from serve.engine.kernels import Kernels, load
from serve.engine.kernels.library import NEEDS
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.scheduler import Share

# A processor that cannot run a variant, or an install that did not build it, leaves it out.
VARIANTS = [kernels for variant in NEEDS if (kernels := load(variant))]
needs_kernels = pytest.mark.skipif(not VARIANTS, reason="no kernels were built")


@dataclass
class Case:
    """Sequences of `lengths` tokens; their q, k and v side by side in one buffer, as a fused product leaves them."""

    lengths: list[int]
    kv_heads: int
    group: int
    dim: int
    window: int | None
    qkv: Tensor  # [all tokens, (H + 2 KV) * D]

    @classmethod
    def draw(cls, draw: st.DrawFn, dtype: torch.dtype, *, longest: int) -> Case:
        lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
        kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (1, 8), (2, 7)]))
        dim = draw(st.sampled_from([8, 16, 24, 64, 80, 128]))
        window = draw(st.none() | st.integers(1, longest))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        # Large scores: a few keys outweigh the rest, and the running maximum moves.
        qkv = 2 * torch.randn(sum(lengths), kv_heads * (group + 2) * dim, generator=generator)
        return cls(lengths, kv_heads, group, dim, window, qkv.to(dtype))

    def split(self, rows: Tensor | slice) -> list[Tensor]:
        """q [N, H, D], k and v [N, KV, D]: views of the chosen rows."""
        heads = [self.kv_heads * self.group, self.kv_heads, self.kv_heads]
        parts = self.qkv[rows].split([count * self.dim for count in heads], dim=1)
        return [part.unflatten(1, (-1, self.dim)) for part in parts]

    def expected(self) -> Tensor:
        """[all tokens, H, D], fp32, one sequence after the other."""
        outs, row = [], 0
        for length in self.lengths:
            q, k, v = (x.float().unsqueeze(0) for x in self.split(slice(row, row + length)))
            positions = torch.arange(length)
            outs.append(explicit_attention(q, k, v, may_attend(positions, positions, self.window).unsqueeze(0))[0][0])
            row += length
        return torch.cat(outs)


def run(
    case: Case, kernels: Kernels | None, steps: Sequence[Sequence[tuple[int, int]]], size: int, seed: int
) -> Tensor:
    """[all tokens, H, D] of the case, computed in these steps of (sequence, tokens), in blocks dealt by chance.

    What no token was written to holds no numbers.
    """
    dealer = random.Random(seed)
    blocks = 1 + sum(-(-length // size) for length in case.lengths)
    pages = Pages(
        layers=1,
        heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        dim=case.dim,
        blocks=blocks,
        size=size,
        dtype=case.qkv.dtype,
        device="cpu",
        kernels=kernels,
    )
    if kernels:
        for tensor in (*pages.keys, *pages.values):
            tensor.fill_(torch.nan)
    free = list(range(1, blocks))
    dealer.shuffle(free)
    requests, first = [], []
    for length in case.lengths:
        first.append(sum(case.lengths[: len(requests)]))
        requests.append(Request(id="", prompt=[0] * length, params=SamplingParams()))
        requests[-1].table = [free.pop() for _ in range(-(-length // size))]
    out = torch.empty(len(case.qkv), pages.heads, case.dim, dtype=case.qkv.dtype)
    done = [0] * len(requests)
    for step in steps:
        shares, rows = [], []
        for sequence, count in step:
            shares.append(Share(requests[sequence], done[sequence], count))
            rows += range(first[sequence] + done[sequence], first[sequence] + done[sequence] + count)
            done[sequence] += count
        index = torch.tensor(rows)
        out[index] = pages.attend([case.window], shares)(0, *case.split(index))
    assert done == case.lengths
    return out


def any_steps(draw: st.DrawFn, lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Steps in which each sequence takes part or not, with one token, a chunk, or all it has left."""
    order = random.Random(draw(st.integers(0, 1000)))
    left, steps = list(lengths), []
    while any(left):
        step = []
        for sequence in order.sample(range(len(left)), len(left)):
            if left[sequence] and order.random() < 0.7:
                count = min(left[sequence], order.choice([1, 1, 2, 5, 33, 1000]))
                step.append((sequence, count))
                left[sequence] -= count
        if step:
            steps.append(step)
    return steps


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", [None, *VARIANTS], ids=["torch", *(k.variant for k in VARIANTS)])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_paged_attention_is_attention(kernels: Kernels | None, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    case = Case.draw(data.draw, dtype, longest=150)
    size = data.draw(st.sampled_from([16, 48] if kernels else [1, 7, 16]))
    out = run(case, kernels, any_steps(data.draw, case.lengths), size, seed=0)
    error = 2e-5 if dtype is torch.float32 else 4e-2  # a bf16 number is off by 1/256 at most, of up to 8
    torch.testing.assert_close(out.float(), case.expected(), atol=error, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("kernels", VARIANTS, ids=[k.variant for k in VARIANTS])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_bit_depends_on_chunks_neighbours_blocks_or_threads(kernels: Kernels, data: st.DataObject) -> None:
    draw = data.draw
    case = Case.draw(draw, draw(st.sampled_from([torch.float32, torch.bfloat16])), longest=200)
    with threads(1):
        alone = run(case, kernels, [[(i, length)] for i, length in enumerate(case.lengths)], size=16, seed=0)
    with threads(draw(st.sampled_from([1, 2, 3]))):
        mixed = run(case, kernels, any_steps(draw, case.lengths), draw(st.sampled_from([16, 32, 64])), seed=1)
    assert torch.equal(mixed, alone)


@needs_kernels
def test_a_broken_sequence_breaks_no_other() -> None:
    case = Case([40, 40], 2, 2, 16, None, torch.randn(80, 8 * 16))
    sound = run(case, VARIANTS[0], [[(0, 40), (1, 40)]], size=16, seed=0)
    case.qkv[:40] = torch.nan
    out = run(case, VARIANTS[0], [[(0, 40), (1, 40)]], size=16, seed=0)
    assert out[:40].isnan().all()
    assert torch.equal(out[40:], sound[40:])


@needs_kernels
def test_tokens_of_no_number_are_seen_from_where_they_are() -> None:
    case = Case([40], 1, 1, 16, None, torch.randn(40, 3 * 16))
    case.qkv[20] = torch.nan
    out = run(case, VARIANTS[0], [[(0, 1)] for _ in range(40)], size=16, seed=0)
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()
