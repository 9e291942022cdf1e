"""Which updates are left out: bad numbers always, ordinary noise never, and one bad number spoils no judgement."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.guard import HISTORY, Guard

BAD = (math.nan, math.inf, -math.inf)


def filled(spike: float | None = 10.0, level: float = 3.0, noise: float = 0.05, seed: int = 0) -> Guard:
    """After HISTORY ordinary updates."""
    guard, drawn = Guard(spike), random.Random(seed)
    for _ in range(HISTORY):
        assert guard.judge(drawn.gauss(level, noise), math.exp(drawn.gauss(0, 0.3))) is None
    return guard


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spike", [None, 10.0])
def test_what_is_not_finite_is_left_out_from_the_first_update_on(bad: float, spike: float | None) -> None:
    guard = Guard(spike)
    assert guard.judge(bad, 1.0) == f"the loss is not finite ({bad})"
    assert guard.judge(3.0, bad) == f"the gradient is not finite ({bad})"
    assert guard.streak == 2
    assert guard.judge(3.0, 1.0) is None
    assert guard.streak == 0


@given(st.lists(st.sampled_from(BAD), max_size=300))
def test_bad_numbers_leave_no_trace(bad: list[float]) -> None:
    guard, other = filled(), filled()
    for value in bad:
        guard.judge(value, 1.0)
        guard.judge(3.0 if value == value else value, value)
    assert (guard.losses, guard.norms) == (other.losses, other.norms)
    assert guard.judge(9.0, 1.0) is not None  # and a spike is still one
    assert guard.judge(3.0, 1.0) is None


def test_a_spike_is_left_out_and_its_neighbours_are_not() -> None:
    guard = filled()
    assert guard.judge(3.2, 2.0) is None
    assert guard.judge(4.5, 1.0) == "the loss is 4.5 after a median of 3"
    assert str(guard.judge(3.0, 1000.0)).startswith("the gradient's norm is 1000 after a median of ")
    assert guard.judge(3.0, 1.0) is None
    assert filled(None).judge(1e9, 1e9) is None


def test_a_lasting_change_of_level_becomes_the_level() -> None:
    guard = filled()
    reasons = [guard.judge(8.0, 1.0) for _ in range(HISTORY)]
    assert reasons[0] is not None
    assert reasons[-1] is None


def test_it_is_silent_until_it_knows_enough() -> None:
    guard = Guard(10.0)
    assert all(guard.judge(loss, 10.0**k) is None for k, loss in enumerate([3.0, 300.0] * 10))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), noise=st.floats(0.001, 1.0), tail=st.floats(0.0, 1.0), fall=st.floats(0.0, 0.02))
def test_an_ordinary_run_is_left_alone(seed: int, noise: float, tail: float, fall: float) -> None:
    """A falling loss with noise of any size, and gradient norms with a long tail."""
    guard, drawn = Guard(10.0), random.Random(seed)
    for step in range(1000):
        loss = 1 + 9 * math.exp(-fall * step) + max(-1.0, drawn.gauss(0, noise))
        norm = math.exp(drawn.gauss(0, tail)) * (5 if drawn.random() < 0.01 else 1)
        assert guard.judge(loss, norm) is None, step


def test_what_it_knows_survives_a_checkpoint() -> None:
    guard = filled()
    guard.judge(math.nan, 1.0)
    other = Guard(10.0, json.loads(json.dumps(guard.state())))
    drawn = random.Random(5)
    for _ in range(300):
        numbers = drawn.choice([3.0, 3.1, 4.6, math.nan]), drawn.choice([1.0, 2.0, 1e4])
        assert guard.judge(*numbers) == other.judge(*numbers)
        assert guard.state() == other.state()
