"""Our own forwards and backwards (linear, RMSNorm, rotation, head and loss) against plain autograd of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lm.linear
import lm.loss
from lm.layers import RMSNorm
from lm.linear import Linear, Packed, linear, packing_is_usable, packing_pays
from lm.loss import IGNORE, head_loss
from lm.positions import rotary_table, rotate, sinusoidal_table

sizes = st.integers(1, 40)


def same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, atol: float = 1e-5) -> None:
    """Value and every gradient of `ours`, in fp32, equal those of `plain`, in fp64, for one random outer gradient."""
    mine = [t.detach().clone().requires_grad_() for t in inputs]
    theirs = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = ours(*mine), plain(*theirs)
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=1e-4)
    outer = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    out.backward(outer.float())
    expected.backward(outer)
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=atol * 10, rtol=1e-4)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ------------------------------------------------------------ linear


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), inside=sizes, outside=sizes, bias=st.booleans())
def test_linear_is_the_product(rows: int, inside: int, outside: int, bias: bool) -> None:
    inputs = [randn(rows, inside), randn(outside, inside)] + ([randn(outside)] if bias else [])
    same(linear, F.linear, *inputs)


def test_this_machine_takes_the_fast_product() -> None:
    """Otherwise the tests here would hold F.linear against itself."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    assert lm.linear.onednn_is_usable()


def test_linear_takes_any_layout() -> None:
    weight, wide = randn(24, 16), randn(40, 32)
    # A turned input, a slice, a batch of three dimensions, and a gradient that is one number expanded.
    for x in (randn(16, 40).T, wide[:, ::2], randn(4, 10, 16).transpose(0, 1)):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
        same(lambda a, w: linear(a, w).sum(), lambda a, w: F.linear(a, w).sum(), x, weight)
    same(lambda a, w: linear(a, w.T), lambda a, w: F.linear(a, w.T), randn(40, 16), randn(16, 24))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_linear_computes_only_the_gradients_that_are_asked_for(frozen: str) -> None:
    x, weight = randn(40, 16), randn(24, 16)
    wanted = weight if frozen == "x" else x
    wanted.requires_grad_()
    linear(x, weight).square().sum().backward()
    ours, wanted.grad = wanted.grad, None
    F.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(ours, wanted.grad, atol=1e-3, rtol=1e-4)


def test_linear_leaves_other_dtypes_autocast_and_inference_to_torch() -> None:
    x, layer = randn(40, 16), Linear(16, 24)
    assert torch.equal(linear(x.double(), layer.weight.double()), F.linear(x.double(), layer.weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_without_the_operator_the_answer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(lm.linear, "product", gone)
    lm.linear.onednn_is_usable.cache_clear()
    try:
        x, weight = randn(40, 16), randn(24, 16)
        assert not lm.linear.onednn_is_usable()
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        lm.linear.onednn_is_usable.cache_clear()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 70), inside=sizes, outside=st.lists(sizes, min_size=1, max_size=3), bias=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_maps_are_the_products(
    dtype: torch.dtype, rows: int, inside: int, outside: list[int], bias: bool
) -> None:
    if not packing_is_usable(dtype):
        pytest.skip(f"this machine packs no weights in {dtype}")
    x, weights = randn(rows, inside).to(dtype), [randn(out, inside).to(dtype) for out in outside]
    biases = [randn(out).to(dtype) if bias else None for out in outside]
    packed = Packed()
    with torch.inference_mode():
        assert packing_pays(x, weights[0])
        found = [packed(x, weights, biases) for _ in range(2)]  # laid out, and as it was laid out
    whole = None if not bias else torch.cat([b for b in biases if b is not None]).double()
    expected = F.linear(x.double(), torch.cat(weights).double(), whole)
    assert torch.equal(*found)
    assert found[0].dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0].double(), expected, atol=near, rtol=near)


def test_other_dtypes_are_not_packed() -> None:
    with torch.inference_mode():
        assert not packing_pays(randn(4, 16).double(), randn(24, 16).double())
        assert not packing_pays(randn(4, 16).half(), randn(24, 16).half())
        assert not packing_pays(randn(4, 16).bfloat16(), randn(24, 16))


# ------------------------------------------------------------ RMSNorm and positions


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=0, max_size=3), width=st.integers(1, 33))
def test_rms_norm_is_the_formula(shape: list[int], width: int) -> None:
    norm = RMSNorm(width, 1e-5)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    same(ours, plain, randn(*shape, width) * 3, 1 + randn(width))


def test_rms_norm_keeps_the_dtype_and_computes_in_fp32() -> None:
    norm, x = RMSNorm(16, 1e-5), randn(40, 16) * 100
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())
    assert torch.equal(norm(torch.zeros(2, 16)), torch.zeros(2, 16))


@pytest.mark.parametrize("dim", [2, 8, 6])
def test_rotation_is_the_formula(dim: int) -> None:
    table = rotary_table(20, dim, 100.0)

    def plain(x: Tensor) -> Tensor:
        """Each pair (x_i, x_{i + d/2}) as a complex number, times e^{i position theta^{-2i/d}}."""
        angles = torch.arange(20.0, dtype=torch.float64)[:, None] * 100.0 ** (
            -2 * torch.arange(dim // 2).double() / dim
        )
        turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.exp(1j * angles)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    same(lambda x: rotate(x, table), plain, randn(3, 20, 2, dim))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    table, q, k = rotary_table(64, 16, 10_000.0), randn(1, 16), randn(1, 16) + 1

    def product(a: int, b: int) -> float:
        return float((rotate(q, table[a]) * rotate(k, table[b])).sum())

    for distance in (0, 1, 7, 30):
        products = [product(place + distance, place) for place in (0, 5, 33)]
        assert products == pytest.approx([products[0]] * 3, abs=1e-5)


def test_sinusoids_are_the_papers() -> None:
    table = sinusoidal_table(40, 8)
    for place, i in ((0, 0), (3, 1), (39, 3)):
        angle = torch.tensor(place / 10_000 ** (2 * i / 8), dtype=torch.float64)
        assert float(table[place, 2 * i]) == pytest.approx(float(angle.sin()), abs=1e-6)
        assert float(table[place, 2 * i + 1]) == pytest.approx(float(angle.cos()), abs=1e-6)


# ------------------------------------------------------------ head and loss


def plain_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, smoothing: float = 0.0
) -> Tensor:
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("slice_", [None, 1])  # 1: the least that is computed at a time, 64 rows
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 200),
    width=sizes,
    vocabulary=sizes,
    softcap=st.sampled_from([None, 2.0, 30.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.floats(0, 1),
)
def test_head_loss_is_cross_entropy(
    slice_: int | None,
    rows: int,
    width: int,
    vocabulary: int,
    softcap: float | None,
    smoothing: float,
    ignored: float,
) -> None:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    with pytest.MonkeyPatch.context() as patch:
        if slice_ is not None:
            patch.setitem(lm.loss.SLICE, "cpu", slice_)
        same(
            lambda hidden, weight: head_loss(hidden, weight, targets, softcap, smoothing).total,
            lambda hidden, weight: plain_loss(hidden, weight, targets, softcap, smoothing),
            randn(rows, width),
            randn(vocabulary, width),
            atol=1e-4,
        )


def test_head_loss_without_gradients_and_in_any_shape() -> None:
    hidden, weight, targets = randn(2, 5, 8), randn(11, 8), torch.randint(11, (2, 5))
    flat = (hidden.reshape(10, 8), weight, targets.reshape(10), None)
    with torch.no_grad():
        loss = head_loss(hidden, weight, targets, smoothing=0.1)
    torch.testing.assert_close(loss.total, plain_loss(*flat, smoothing=0.1))
    torch.testing.assert_close(loss.nll, plain_loss(*flat))  # the plain one, whatever is smoothed
    assert int(loss.targets) == 10
    loss = head_loss(hidden.requires_grad_(), weight, targets, smoothing=0.1)
    torch.testing.assert_close(loss.nll, plain_loss(*flat).detach())
    assert not loss.nll.requires_grad
    assert loss.total.dtype == torch.float32
    assert loss.total.shape == ()
    nothing = head_loss(hidden, weight, torch.full((2, 5), IGNORE))
    assert (nothing.total.item(), int(nothing.targets)) == (0, 0)


def test_head_loss_of_huge_logits_is_finite() -> None:
    hidden, weight = randn(70, 8) * 1e4, (randn(11, 8) * 1e4).requires_grad_()
    loss = head_loss(hidden, weight, torch.randint(11, (70,))).total
    loss.backward()
    assert torch.isfinite(loss)
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_head_loss_under_autocast_is_within_bf16_of_fp32() -> None:
    hidden, weight, targets = randn(100, 16).requires_grad_(), randn(30, 16).requires_grad_(), torch.randint(30, (100,))
    exact = head_loss(hidden, weight, targets).total
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, weight, targets).total
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02
