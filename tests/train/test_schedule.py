"""The learning rate: its corners, its bounds, its shape."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import Schedule
from train.schedule import factor


def curve(steps: int, **options: object) -> list[float]:
    return [factor(Schedule(**options), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert curve(20, kind=kind, warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve(5, kind="constant") == [1.0] * 5


def test_cosine_falls_along_a_half_wave_to_its_floor() -> None:
    rates = curve(101, kind="cosine", floor=0.1)
    assert (rates[0], rates[50], rates[100]) == pytest.approx((1.0, 0.55, 0.1))
    assert rates[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    after = curve(111, kind="cosine", floor=0.1, warmup=10)
    assert after[10:] == pytest.approx(rates)


def test_wsd_stays_and_then_falls_in_equal_steps() -> None:
    rates = curve(100, kind="wsd", warmup=5, decay=0.2, floor=0.0)
    assert rates[5:80] == pytest.approx([1.0] * 75)
    # The first of 20 updates of the fall is a step lower, and the last still moves: it is one step above the floor.
    assert rates[80:] == pytest.approx([(20 - number) / 21 for number in range(20)])
    assert curve(100, kind="wsd", decay=0.2, floor=0.5)[99] == pytest.approx(0.5 + 0.5 / 21)


def test_a_run_of_one_update_learns() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert factor(Schedule(kind=kind), 0, 1) > 0.5


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 299),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_between_nothing_and_the_peak_and_down_after_the_warm_up(
    kind: str, steps: int, warmup: int, decay: float, floor: float
) -> None:
    warmup = min(warmup, steps - 1)
    rates = curve(steps, kind=kind, warmup=warmup, decay=decay, floor=floor)
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    assert rates[-1] >= min(floor, 1 / (warmup + 1)) - 1e-12


@given(warmup=st.integers(1, 50), step=st.integers(0, 400))
def test_inverse_square_root_is_the_papers(warmup: int, step: int) -> None:
    """arXiv 1706.03762, equation 3, over its peak; whatever the run's length."""
    equation = min((step + 1) ** -0.5, (step + 1) * warmup**-1.5) / warmup**-0.5
    schedule = Schedule(kind="inverse_sqrt", warmup=warmup)
    assert factor(schedule, step, 500) == pytest.approx(equation)
    assert factor(schedule, warmup - 1, 500) == pytest.approx(1)
