"""Pairs and their batches: every pair once an epoch, budgets kept, and the same batch whatever the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.loss import IGNORE
from train.pairs import FETCHED, Frame, PairBatches, Pairs, in_order

FRAME = Frame(pad_id=0, bos_id=1, eos_id=2, source_end=2)
lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=80)


def some(sizes: list[tuple[int, int]]) -> Pairs:
    """Pairs of these lengths, each with tokens of its own."""
    return Pairs.of([([10 + row] * source, [100 + row] * target) for row, (source, target) in enumerate(sizes)])


@given(lengths, st.integers(13, 60), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_pair_once_within_the_budget(
    sizes: list[tuple[int, int]], budget: int, seed: int, epoch: int
) -> None:
    batches = PairBatches(some(sizes), seed=seed, batch_tokens=budget)
    plan = batches.plan(epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes)))
    for rows in plan:
        assert len(rows) * max(max(sizes[row]) + 1 for row in rows.tolist()) <= budget


@given(lengths, st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_batches_of_sentences_come_sorted_twenty_at_a_time(sizes: list[tuple[int, int]], count: int, seed: int) -> None:
    """arXiv 1409.0473, appendix B.2: one order for the whole run, of which 20 batches' worth are sorted together."""
    batches = PairBatches(some(sizes), seed=seed, batch_sentences=count)
    plan = batches.plan(0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes)))
    assert [len(rows) for rows in plan[:-1]] == [count] * (len(plan) - 1) or len(sizes) > FETCHED * count
    for first in range(0, len(plan), FETCHED):
        longest = [max(sizes[row]) for rows in plan[first : first + FETCHED] for row in rows.tolist()]
        assert longest == sorted(longest)
    assert all(np.array_equal(a, b) for a, b in zip(plan, batches.plan(1), strict=True))


def test_steps_follow_one_another_through_the_epochs_wherever_one_begins() -> None:
    sizes = [(1 + n % 9, 1 + n % 7) for n in range(200)]
    straight = PairBatches(some(sizes), seed=5, batch_tokens=40)
    rows = [straight.rows(step).tolist() for step in range(200)]
    for step in (199, 0, 57):
        assert PairBatches(some(sizes), seed=5, batch_tokens=40).rows(step).tolist() == rows[step]
    of_epoch = len(straight.plan(0))
    assert straight.epoch(of_epoch) == 1.0
    assert sorted(row for batch in rows[:of_epoch] for row in batch) == list(range(200))
    assert rows[:5] != rows[of_epoch : of_epoch + 5]  # another order
    assert PairBatches(some(sizes), seed=6, batch_tokens=40).rows(0).tolist() != rows[0]


def test_a_batch_is_what_the_model_reads() -> None:
    pairs = Pairs.of([([5, 6, 7], [8]), ([9], [10, 11])])
    batch = FRAME.batch(pairs, [0, 1])
    assert batch["src"].tolist() == [[5, 6, 7, 2], [9, 2, 0, 0]]
    assert batch["src_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["tgt_input"].tolist() == [[1, 8, 0], [1, 10, 11]]
    assert batch["tgt_output"].tolist() == [[8, 2, IGNORE], [10, 11, 2]]
    assert {tensor.dtype for name, tensor in batch.items() if name != "src_mask"} == {torch.int64}
    nothing = FRAME.batch(pairs, [0], counts=False)
    assert nothing["tgt_output"].tolist() == [[IGNORE, IGNORE]]
    assert PairBatches(pairs, seed=0, batch_tokens=8).targets(0) == 5  # an ending token each


def test_batches_keep_lengths_together() -> None:
    drawn = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in drawn.integers(1, 40, size=(3000, 2))]
    batches = PairBatches(some(sizes), seed=1, batch_tokens=512)
    real = sum(max(size) + 1 for size in sizes)
    padded = sum(len(rows) * max(max(sizes[row]) + 1 for row in rows.tolist()) for rows in batches.plan(0))
    assert real / padded > 0.95


def test_evaluation_takes_all_and_a_long_one_alone() -> None:
    batches = in_order(some([(3, 3), (50, 2), (1, 1), (4, 2)]), [0, 1, 2, 3], 10)
    assert sorted(np.concatenate(batches).tolist()) == [0, 1, 2, 3]
    assert [1] in [rows.tolist() for rows in batches]


def test_what_cannot_be_batched_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="a pair has 13 tokens on a side; a batch holds 12"):
        PairBatches(some([(12, 1)]), seed=0, batch_tokens=12)
    with pytest.raises(ValueError, match="no pair"):
        PairBatches(some([(1, 1)]), seed=0, batch_tokens=12, eligible=np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="one of the two"):
        PairBatches(some([(1, 1)]), seed=0)
