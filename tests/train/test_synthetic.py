"""The tasks that need no data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.synthetic import TASKS, answer, pairs


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_answers(numbers: list[int]) -> None:
    array = np.array(numbers)
    assert answer("copy", array).tolist() == numbers
    assert answer("reverse", array).tolist() == numbers[::-1]
    assert answer("sort", array).tolist() == sorted(numbers)


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_a_function_of_their_arguments(task: str) -> None:
    drawn = list(pairs(task, rows=500, symbols=7, longest=5, seed=1))
    assert drawn == list(pairs(task, rows=500, symbols=7, longest=5, seed=1))
    assert drawn != list(pairs(task, rows=500, symbols=7, longest=5, seed=2))
    assert {len(source.split()) for source, _ in drawn} == {1, 2, 3, 4, 5}
    assert {word for source, _ in drawn for word in source.split()} == set("0123456")
    for source, target in drawn:
        assert answer(task, np.array([int(word) for word in source.split()])).tolist() == [
            int(word) for word in target.split()
        ]


def test_an_unknown_task() -> None:
    with pytest.raises(ValueError, match="shuffle is not a task; there are copy, reverse, sort"):
        next(pairs("shuffle", rows=1, symbols=2, longest=2, seed=0))
