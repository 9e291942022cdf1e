"""Attention over pages against attention written out, whatever the mix of chunks, heads, windows and block tables."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.attention import explicit_attention, may_attend
from lm.params import SamplingParams
from serve.engine.pages import PagedAttend, Pages
from serve.engine.requests import Request
from serve.engine.scheduler import Share

DIM = 16


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_paged_attention_is_attention(data: st.DataObject) -> None:
    draw = data.draw
    kv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    window = draw(st.none() | st.integers(1, 40))
    size = draw(st.integers(1, 20))
    spans = draw(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 30) | st.just(1)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    blocks = 1 + sum(-(-(start + length) // size) for start, length in spans)
    pages = Pages(layers=1, kv_heads=kv, dim=DIM, blocks=blocks, size=size, dtype=torch.float32, device="cpu")
    free = list(range(1, blocks))
    random.Random(0).shuffle(free)
    shares, keys, values = [], [], []
    for start, length in spans:
        total = start + length
        request = Request(id="", prompt=[0] * total, params=SamplingParams())
        request.table = [free.pop() for _ in range(-(-total // size))]
        k, v = noise(total, kv, DIM), noise(total, kv, DIM)
        slots = torch.tensor([request.table[p // size] * size + p % size for p in range(start)], dtype=torch.int64)
        pages.write(0, slots, k[:start], v[:start])
        shares.append(Share(request, start, length))
        keys.append(k)
        values.append(v)

    q = noise(sum(length for _, length in spans), kv * group, DIM)
    new_keys = torch.cat([k[start:] for k, (start, _) in zip(keys, spans, strict=True)])
    new_values = torch.cat([v[start:] for v, (start, _) in zip(values, spans, strict=True)])
    out = PagedAttend(pages, [window], shares)(0, q, new_keys, new_values)

    row = 0
    for k, v, (start, length) in zip(keys, values, spans, strict=True):
        positions = torch.arange(start + length)
        mask = may_attend(positions[start:], positions, window).unsqueeze(0)
        expected, _ = explicit_attention(q[row : row + length].unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask)
        torch.testing.assert_close(out[row : row + length], expected[0], atol=2e-5, rtol=1e-4)
        row += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_zero_and_costs_what_it_says(dtype: torch.dtype) -> None:
    pages = Pages(layers=3, kv_heads=2, dim=DIM, blocks=5, size=4, dtype=dtype, device="cpu")
    tensors = (*pages.keys, *pages.values)
    assert all(tensor.dtype == dtype and not tensor.any() for tensor in tensors)
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert bytes_ == 5 * Pages.bytes_per_block(layers=3, kv_heads=2, dim=DIM, size=4, dtype=dtype)


def test_cleared_blocks_are_numbers_again() -> None:
    pages = Pages(layers=1, kv_heads=1, dim=DIM, blocks=4, size=2, dtype=torch.float32, device="cpu")
    pages.write(0, torch.tensor([4]), torch.full((1, 1, DIM), torch.nan), torch.full((1, 1, DIM), torch.nan))
    pages.clear([2])
    assert not pages.keys[0].isnan().any()
    assert not pages.values[0].isnan().any()
