"""The tensors of the cache: empty at first, of the size that they are said to have, cleared where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve.engine import kernels
from serve.engine.pages import Pages

DIM = 16


def pages(**more: Any) -> Pages:
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 2, "dim": DIM, "blocks": 5, "size": 16}
    return Pages(**{**sizes, "dtype": torch.float32, "device": "cpu", **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 16])
def test_a_cache_is_zero_and_costs_what_it_says(dtype: torch.dtype, size: int) -> None:
    cache = pages(layers=3, size=size, dtype=dtype)
    tensors = (*cache.keys, *cache.values)
    assert all(tensor.dtype == dtype and not tensor.any() for tensor in tensors)
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert bytes_ == 5 * Pages.bytes_per_block(layers=3, kv_heads=2, dim=DIM, size=size, dtype=dtype)


@pytest.mark.parametrize("kernels", ["best", None])
def test_cleared_blocks_are_numbers_again(kernels: str | None) -> None:
    cache = pages(kernels=kernels)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, 2] = torch.nan
        tensor[:, 3] = 1
    cache.clear([2])
    for tensor in (*cache.keys, *cache.values):
        assert not tensor[:, 2].any()
        assert (tensor[:, 3] == 1).all()


@pytest.mark.parametrize(
    "unfit", [{"size": 8}, {"size": 24}, {"dim": 257}, {"heads": 770, "kv_heads": 1}, {"dtype": torch.float16}]
)
def test_torch_takes_what_the_kernels_do_not(unfit: dict[str, Any]) -> None:
    assert pages(**unfit).kernels is None


def test_the_kernels_are_taken_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages().kernels is kernels.current()
    monkeypatch.setenv("HEED_KERNELS", "off")
    assert pages().kernels is None
