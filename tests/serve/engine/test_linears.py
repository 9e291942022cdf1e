"""Fused products: right, and a row's bits are its own whoever shares the product, with every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.layers import RMSNorm
from serve.engine.kernels import Kernels
from serve.engine.kernels.library import NEEDS, load
from serve.engine.linears import FusedLinear, PlainLinear, Scratch

VARIANTS = [kernels for variant in NEEDS if (kernels := load(variant)) is not None]
NAMES = [kernels.variant for kernels in VARIANTS]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ROWS = (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 16, 17, 24, 25, 33, 64, 100)
SIZES = ((96, 64), (33, 77), (64, 2048), (512, 48), (16, 1))  # outputs, inputs

kernels_and_dtypes = pytest.mark.parametrize(
    ("kernels", "dtype"),
    [(kernels, dtype) for kernels in VARIANTS for dtype in (torch.float32, torch.bfloat16)],
    ids=lambda value: value.variant if isinstance(value, Kernels) else str(value).removeprefix("torch."),
)


@kernels_and_dtypes
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_row_is_the_same_in_any_company(kernels: Kernels, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weights, biases = [torch.randn(outputs, inputs, dtype=dtype)], [torch.randn(outputs, dtype=dtype)]
    linear = FusedLinear(weights, biases, kernels, Scratch())
    x, residual = torch.randn(128, inputs, dtype=dtype), torch.randn(128, outputs, dtype=dtype)
    for other in (None, residual):
        whole = linear(x, other)
        for rows in ROWS:
            at = slice(rows % 20, rows % 20 + rows)
            assert torch.equal(linear(x[at], None if other is None else other[at]), whole[at])


@kernels_and_dtypes
def test_a_row_is_the_same_on_any_number_of_threads(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    linear = FusedLinear([torch.randn(530, 130, dtype=dtype)], (), kernels, Scratch())
    x, before = torch.randn(9, 130, dtype=dtype), torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(linear(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def right(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.double() @ torch.cat(weights).double().T + torch.cat(biases).double()


def some(
    dtype: torch.dtype, rows: int, outputs: tuple[int, ...], inputs: int = 21
) -> tuple[list, list, Tensor, Tensor]:
    torch.manual_seed(1)
    weights = [torch.randn(n, inputs, dtype=dtype) for n in outputs]
    biases = [torch.randn(n, dtype=dtype) for n in outputs]
    return weights, biases, torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, sum(outputs), dtype=dtype)


@kernels_and_dtypes
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_maps_of_one_x_are_one_product(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    weights, biases, x, residual = some(dtype, rows, (7, 3, 9))
    linear = FusedLinear(weights, biases, kernels, Scratch())
    expected = right(x, weights, biases)
    torch.testing.assert_close(linear(x).double(), expected, rtol=NEAR[dtype], atol=10 * NEAR[dtype])
    torch.testing.assert_close(
        linear(x, residual).double(), expected + residual, rtol=NEAR[dtype], atol=10 * NEAR[dtype]
    )
    exact = FusedLinear(weights, biases, kernels, Scratch(), out=torch.float32)(x)
    assert exact.dtype is torch.float32
    halves = kernels.variant == "avx512fp16" and dtype is torch.bfloat16  # sums are rounded to halves on the way
    torch.testing.assert_close(exact.double(), expected, rtol=1e-3 if halves else 1e-5, atol=2e-2 if halves else 1e-4)


@kernels_and_dtypes
@pytest.mark.parametrize("size", [2.0**-90, 2.0**-20, 1.0, 2.0**60])
def test_numbers_of_any_size_are_multiplied(kernels: Kernels, dtype: torch.dtype, size: float) -> None:
    weights, _, x, _ = some(dtype, 9, (19,), inputs=300)
    weights[0][:7] *= 1e-4  # each channel has its own size, and each row
    x[::2] *= 1e4
    expected = right(x, weights, [torch.zeros(19)]) * size
    for scaled, by in (((x * size).to(dtype), weights), (x, [(weights[0] * size).to(dtype)])):
        found = FusedLinear(by, (), kernels, Scratch(), out=torch.float32)(scaled).double()
        off = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert off.max() < 2e-3


@kernels_and_dtypes
def test_weights_near_the_largest_are_not_lost(kernels: Kernels, dtype: torch.dtype) -> None:
    weights = [torch.full((3, 4), 2.0**127, dtype=dtype)]
    found = FusedLinear(weights, (), kernels, Scratch(), out=torch.float32)(torch.ones(2, 4, dtype=dtype) / 8)
    assert (found >= 2.0**126).all()  # inf where halves cannot hold it, and never 0


@kernels_and_dtypes
def test_what_is_no_number_stays_in_its_row(kernels: Kernels, dtype: torch.dtype) -> None:
    weights, biases, x, _ = some(dtype, 9, (19,))
    linear = FusedLinear(weights, biases, kernels, Scratch())
    whole = linear(x)
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[4, 3] = bad
        found = linear(spoilt)
        assert not found[4].isfinite().any()
        assert torch.equal(found[:4], whole[:4])
        assert torch.equal(found[5:], whole[5:])


@kernels_and_dtypes
@pytest.mark.parametrize("norm", [RMSNorm(21, 1e-5), nn.LayerNorm(21), nn.LayerNorm(21, bias=False)])
def test_rows_are_normed_first(kernels: Kernels, dtype: torch.dtype, norm: nn.Module) -> None:
    weights, biases, x, _ = some(dtype, 7, (20,))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(21))
        expected = right(norm(x.float()), weights, biases)
    found = FusedLinear(weights, biases, kernels, Scratch(), norm=norm)(x)
    torch.testing.assert_close(found.double(), expected, rtol=NEAR[dtype], atol=20 * NEAR[dtype])


@kernels_and_dtypes
@pytest.mark.parametrize("inner", [5, 16, 70])
@pytest.mark.parametrize("biased", [True, False])
def test_gate_and_up_become_one_answer(kernels: Kernels, dtype: torch.dtype, inner: int, biased: bool) -> None:
    weights, biases, x, _ = some(dtype, 7, (inner, inner))
    gate, up = right(x, weights, biases if biased else [torch.zeros(2 * inner)]).split(inner, dim=1)
    found = FusedLinear(weights, biases if biased else (), kernels, Scratch(), gated=True)(x)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=NEAR[dtype], atol=20 * NEAR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_torch_multiplies_where_there_are_no_kernels(dtype: torch.dtype, rows: int) -> None:
    weights, biases, x, residual = some(dtype, rows, (7, 3, 9))
    linear, expected = PlainLinear(weights, biases), right(x, weights, biases)
    torch.testing.assert_close(linear(x).double(), expected, rtol=NEAR[dtype], atol=10 * NEAR[dtype])
    torch.testing.assert_close(
        linear(x, residual).double(), expected + residual, rtol=NEAR[dtype], atol=10 * NEAR[dtype]
    )
