"""Packed products: right, and a row's bits are its own whoever shares the product; so too on a CPU with AVX2 alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lm.linear import packing_is_usable
from serve.engine.linears import PackedLinear

ROWS = (1, 2, 3, 5, 7, 8, 16, 17, 33, 64, 100)
SIZES = (
    (96, 64),
    (33, 77),
    (64, 2048),
    (512, 48),
)  # outputs, inputs; of 2,048 inputs one row alone is summed otherwise


def unequal(dtype: torch.dtype) -> list[str]:
    """Products in which a row has other bits than among all the others."""
    torch.manual_seed(0)
    found = []
    for outputs, inputs in SIZES:
        linear = PackedLinear([torch.randn(outputs, inputs, dtype=dtype)], [torch.randn(outputs, dtype=dtype)])
        x, residual = torch.randn(128, inputs, dtype=dtype), torch.randn(128, outputs, dtype=dtype)
        for other in (None, residual):
            whole = linear(x, other)
            for rows in ROWS:
                at = slice(rows % 20, rows % 20 + rows)
                if not torch.equal(linear(x[at], None if other is None else other[at]), whole[at]):
                    found.append(f"{dtype} {outputs} x {inputs}, {rows} rows, residual: {other is not None}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    if not packing_is_usable(dtype):
        pytest.skip("this CPU has no instructions for bfloat16")
    assert unequal(dtype) == []


def test_so_it_is_with_avx2_alone() -> None:
    code = "from tests.serve.engine.test_linears import *\n"
    code += "print(unequal(torch.float32), packing_is_usable(torch.bfloat16))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[] False", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_maps_of_one_x_are_one_product(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(n, 20, dtype=dtype) for n in (7, 3, 9)]
    biases = [torch.randn(n, dtype=dtype) for n in (7, 3, 9)]
    x, residual = torch.randn(rows, 20, dtype=dtype), torch.randn(rows, 19, dtype=dtype)
    right = x.double() @ torch.cat(weights).double().T + torch.cat(biases).double()
    linear = PackedLinear(weights, biases)
    off = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(linear(x).double(), right, rtol=off, atol=10 * off)
    torch.testing.assert_close(linear(x, residual).double(), right + residual, rtol=off, atol=10 * off)
