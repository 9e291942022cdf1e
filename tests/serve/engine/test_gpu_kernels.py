"""Triton's kernels against what they compute, written out: on a GPU, or through Triton's interpreter where it is
installed.
"""

from __future__ import annotations

import os
import random
from types import ModuleType
from typing import Any

import pytest
import torch

from serve.engine import gpu_explicit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
    pytest.importorskip("triton", reason="comes with torch for GPUs")
    from serve.engine import gpu_kernels

    return gpu_kernels


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[ours.dtype]
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def random_(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "size", "window", "tokens", "splits"),
    [
        (6, 2, 24, 16, None, 4, 1),  # three to a group, heads that fill no power of two
        (4, 4, 16, 5, 9, 3, 1),
        (8, 1, 64, 16, 40, 1, 5),
        (2, 2, 16, 16, None, 1, 16),  # more parts than keys for most
    ],
)
def test_attention(
    kernels: ModuleType, heads: int, kv: int, dim: int, size: int, window: int | None, tokens: int, splits: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    dice = random.Random(0)
    shares = [(0, 3), (69, 1), (31, 4), (150, 1)] if tokens > 1 else [(0, 1), (69, 1), (150, 1)]
    width = 150 // size + 1
    blocks = len(shares) * width + 1
    keys, values = (random_(kv, blocks, size, dim, dtype=dtype) for _ in range(2))
    tables = torch.tensor(dice.sample(range(1, blocks), blocks - 1), dtype=torch.int32).view(len(shares), width)
    tiles, rows = [], 0
    for sequence, (start, length) in enumerate(shares):
        for first in range(0, length, tokens):
            tiles.append((sequence, rows + first, min(tokens, length - first), start + first))
        rows += length
    arguments: dict[str, Any] = {"window": window, "tokens": tokens, "splits": splits}
    q = random_(rows, heads, dim, dtype=dtype)
    made = []
    for module in (kernels, gpu_explicit):
        out = torch.full_like(q, torch.nan)
        module.attend_pages(
            q, keys, values, tables.to(DEVICE), torch.tensor(tiles, dtype=torch.int32, device=DEVICE), out, **arguments
        )
        made.append(out)
    assert close(*made)


def test_parts_are_for_single_tokens(kernels: ModuleType) -> None:
    for module in (kernels, gpu_explicit):
        with pytest.raises(ValueError, match="2 parts of the keys are for tiles of one token, not of 4"):
            module.attend_pages(*[torch.zeros(1)] * 6, window=None, tokens=4, splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_places(kernels: ModuleType, rotates: bool, norms: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, kv, dim, size, rows = 6, 2, 24, 4, 5
    qkv = random_(rows, (heads + 2 * kv) * dim, dtype=dtype)
    positions = torch.tensor([3, 0, 7, 8, 1], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([5, 27, 8, 15, 9], dtype=torch.int32, device=DEVICE)
    angles = random_(9, 2, dim) if rotates else None
    weights = (random_(dim, dtype=dtype), random_(dim, dtype=dtype), 1e-5) if norms else None
    made = []
    for module in (kernels, gpu_explicit):
        keys, values = torch.zeros(2, kv, 7, size, dim, dtype=dtype, device=DEVICE)
        q = module.place(qkv, keys, values, positions, slots, heads=heads, angles=angles, norms=weights)
        made.append((q, keys, values))
    for ours, theirs in zip(*made, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate(kernels: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = random_(3, 40, dtype=dtype), random_(40, dtype=dtype)
    assert close(kernels.rms_norm(x, weight, 1e-5), gpu_explicit.rms_norm(x, weight, 1e-5))
    both = random_(2, 2 * 1100, dtype=dtype)
    assert close(kernels.swiglu(both), gpu_explicit.swiglu(both))
