"""Tasks that need no data: copy, reverse or sort a sequence of numbers, with the true alignment known.

A model that reverses has to attend to the places of its source from last to first: its alignment is a clean
anti-diagonal, and whether it is one can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

TASKS = ("copy", "reverse", "sort")


def pairs(task: str, *, rows: int, symbols: int, longest: int, seed: int) -> Iterator[tuple[str, str]]:
    """`rows` pairs of sequences of the numbers 0 ... symbols - 1, with 1 to `longest` of them; a function of its
    arguments alone. Numbers and lengths are drawn evenly. ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"{task} is not a task; there are {', '.join(TASKS)}.")
    generator = np.random.default_rng(np.random.Philox(key=[seed, TASKS.index(task)]))
    for length in generator.integers(1, longest + 1, size=rows).tolist():
        numbers = generator.integers(symbols, size=length)
        yield _words(numbers), _words(answer(task, numbers))


def answer(task: str, numbers: np.ndarray) -> np.ndarray:
    """What a perfect model makes of `numbers`, int64 [n]."""
    return {"copy": lambda: numbers, "reverse": lambda: numbers[::-1], "sort": lambda: np.sort(numbers)}[task]()


def _words(numbers: np.ndarray) -> str:
    return " ".join(map(str, numbers.tolist()))
