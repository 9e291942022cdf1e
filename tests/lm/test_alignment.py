"""Measures on attention maps, against maps whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.alignment import agreement, entropy, head_entropy, monotone, reversal, strongest
from lm.trace import Maps


@given(st.integers(1, 12), st.floats(0.0, 0.45))
def test_an_anti_diagonal_is_a_reversal(n: int, noise: float) -> None:
    true = torch.eye(n + 1)[[*range(n - 1, -1, -1), n]]  # row i has its mass on n - 1 - i
    assert strongest((1 - noise) * true + noise / (n + 1), reversal(n, n)) == (n, n)
    assert strongest(torch.eye(n + 1), monotone(n, n)) == (n, n)


def test_wrong_and_missing_truths_are_told_apart() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    assert strongest(weights, [0, 1, None]) == (1, 2)
    assert reversal(2, 4) == [1, 0, None, None, None]
    with pytest.raises(ValueError, match="names 2 queries"):
        strongest(weights, [0, 1])


@given(st.integers(1, 64))
def test_entropy_counts_keys(n: int) -> None:
    assert entropy(torch.full((2, n), 1 / n)).tolist() == pytest.approx([math.log2(n)] * 2, abs=1e-5)
    assert entropy(torch.eye(n)).tolist() == pytest.approx([0.0] * n)


def test_entropy_of_each_head() -> None:
    sharp, even = torch.eye(4), torch.full((4, 4), 0.25)
    maps = Maps(decoder={0: torch.stack((sharp, even))}, cross={1: even.unsqueeze(0)})
    assert head_entropy(maps) == {"decoder": {0: [0.0, 2.0]}, "cross": {1: [2.0]}}


def test_agreement() -> None:
    assert agreement(torch.eye(4), torch.eye(4)) == 1
    assert agreement(torch.eye(4), torch.eye(4).flip(0)) == 0
    with pytest.raises(ValueError, match="must be equal"):
        agreement(torch.eye(4), torch.eye(3))
