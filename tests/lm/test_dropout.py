"""Dropout is what torch's is, in distribution and in gradient."""

from __future__ import annotations

import pytest
import torch

from lm.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_the_share_and_the_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 501, dtype=dtype)
    y = dropout(x, p, True)
    assert y.dtype == dtype
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.01)
    assert y[y != 0].float().unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-2)]


def test_elements_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000), 0.5, True) != 0).float()
    for lag in (1, 2, 3, 4, 5, 8):  # four share a draw
        both = (kept[:-lag] * kept[lag:]).mean()
        assert float(both) == pytest.approx(0.25, abs=0.01)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(7, 9, requires_grad=True)
    y = dropout(x, 0.4, True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.where(y.detach() == 0, 0.0, torch.tensor(1 / (1 - 0.4))))


def test_the_generator_decides() -> None:
    x = torch.ones(50)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)


def test_it_is_the_identity_outside_training_and_without_a_share() -> None:
    x = torch.randn(3)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.equal(dropout(x, 1.0, True), torch.zeros(3))
