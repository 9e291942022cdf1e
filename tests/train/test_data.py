"""Batches by index: each window once an epoch, the same on any number of ranks, and nothing to save."""

from __future__ import annotations

import time
import tracemalloc
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data import IGNORED, Batches, Tokens, document_ids, permute, windows

EOS = 3


def counting(length: int) -> Tokens:
    """Tokens that are their own places, so that a batch says where it comes from."""
    return Tokens([np.arange(length, dtype=np.uint32)])


# ------------------------------------------------------------ tokens


@given(data=st.data())
def test_tokens_are_one_array_over_their_shards(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=5))
    whole = np.arange(sum(sizes), dtype=np.uint16)
    ends = list(accumulate(sizes, initial=0))
    shards = [whole[a:b] for a, b in pairwise(ends)]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.none() | st.integers(start, len(whole)))
    tokens = Tokens(shards, start=start, stop=stop)
    view = whole[start:stop]
    assert len(tokens) == len(view)
    first, last = data.draw(st.integers(0, 50)), data.draw(st.none() | st.integers(0, 50))
    np.testing.assert_array_equal(tokens[first:last], view[first:last])
    assert tokens[first:last].dtype == whole.dtype


def test_a_slice_of_one_shard_is_no_copy() -> None:
    shard = np.arange(10, dtype=np.uint16)
    assert np.shares_memory(Tokens([shard[:5], shard[5:]])[6:9], shard)


# ------------------------------------------------------------ the order


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    places = permute(np.arange(size, dtype=np.int64), size, np.full(size, key, dtype=np.uint64))
    np.testing.assert_array_equal(np.sort(places), np.arange(size))


def test_permutations_look_random() -> None:
    """Over many keys each index goes everywhere about equally often, and neighbours do not stay neighbours."""
    size, keys = 50, 4000
    key = np.random.default_rng(0).integers(0, 2**64, keys, dtype=np.uint64)
    places = permute(np.tile(np.arange(size), keys), size, np.repeat(key, size)).reshape(keys, size)
    counts = np.apply_along_axis(np.bincount, 0, places, minlength=size)
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum() / (size - 1) ** 2
    assert 0.9 < chi_square < 1.1
    steps = np.abs(np.diff(places, axis=1))
    assert abs((steps == 1).mean() - 2 / size) < 0.005


@given(data=st.data())
def test_an_epoch_sees_each_window_once(data: st.DataObject) -> None:
    context = data.draw(st.integers(1, 9))
    length = data.draw(st.integers(context + 1, 200))
    rows = data.draw(st.integers(1, 7))
    seed = data.draw(st.integers(0, 2**63))
    batches = Batches(counting(length), context=context, batch_tokens=rows * context, seed=seed)
    assert batches.sequences == rows
    epochs = 3
    steps = -(-epochs * batches.windows // rows)
    starts = np.concatenate([batches.starts(step) for step in range(steps)])[: epochs * batches.windows]
    for epoch in starts.reshape(epochs, batches.windows):
        inputs = (epoch[:, None] + np.arange(context)).ravel()
        assert len(np.unique(inputs)) == len(inputs), "windows overlap"
        assert inputs.min() >= 0
        assert inputs.max() + 1 < length, "the last target lies outside"
        assert length - len(inputs) <= 2 * context, "less than two windows are left out"
    assert batches.epoch(0) == 0
    assert batches.epoch(batches.windows) == rows


@given(data=st.data())
def test_ranks_share_one_global_batch(data: st.DataObject) -> None:
    rows, step = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 10**6))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    batches = Batches(counting(997), context=8, batch_tokens=8 * rows, seed=5)
    whole = batches.batch(step)
    parts = [batches.batch(step, slice(a, b)) for a, b in pairwise([0, *cuts, rows])]
    for name in whole:
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_the_order_is_a_function_of_seed_epoch_and_step() -> None:
    def starts(seed: int, steps: range) -> np.ndarray:
        batches = Batches(counting(1000), context=10, batch_tokens=50, seed=seed)
        return np.concatenate([batches.starts(step) for step in steps])

    assert np.array_equal(starts(1, range(40)), np.concatenate([starts(1, range(17)), starts(1, range(17, 40))]))
    assert not np.array_equal(starts(1, range(40)), starts(2, range(40)))
    epochs = starts(1, range(20 * 98 // 5)).reshape(-1, 98)[:4]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({int(epoch.min() % 10) for epoch in epochs}) > 1, "the grid moves"


def test_a_batch_and_its_targets() -> None:
    batches = Batches(counting(500), context=16, batch_tokens=64, seed=0)
    batch = batches.batch(3)
    assert set(batch) == {"tokens", "targets"}
    assert batch["tokens"].shape == batch["targets"].shape == (4, 16)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert torch.equal(batch["targets"], batch["tokens"] + 1)
    assert batch["tokens"][:, 0].tolist() == batches.starts(3).tolist()


def test_a_split_smaller_than_a_window_is_refused() -> None:
    assert Batches(counting(9), context=8, batch_tokens=8, seed=0).windows == 1
    with pytest.raises(ValueError, match="8 tokens do not hold one window of 8"):
        Batches(counting(8), context=8, batch_tokens=8, seed=0)
    with pytest.raises(ValueError, match="end-of-text"):
        Batches(counting(9), context=8, batch_tokens=8, seed=0, document_mask=True)


def test_a_batch_takes_less_than_a_millisecond_and_ten_billion_tokens_no_memory() -> None:
    billions = Tokens([np.broadcast_to(np.uint16(7), 10**10)])
    batches = Batches(billions, context=64, batch_tokens=768, seed=1)
    times = []
    tracemalloc.start()
    for step in range(10**6, 10**6 + 200):
        batches.batch(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for step in range(200):
        began = time.perf_counter()
        batches.batch(step)
        times.append(time.perf_counter() - began)
    assert peak < 1_000_000
    assert min(times) < 1e-3


# ------------------------------------------------------------ documents


@given(text=st.lists(st.sampled_from([0, 1, EOS]), min_size=2, max_size=40))
def test_no_target_is_predicted_from_another_document(text: list[int]) -> None:
    row = np.array([text])
    documents = document_ids(row[:, :-1], EOS)[0]
    # Written out: a document is what stands between two ends; its own end is its last target, never its input.
    owner = 0
    for place, token in enumerate(text[:-1]):
        owner += token == EOS
        assert documents[place] == owner
        visible = [text[other] for other in range(place + 1) if documents[other] == documents[place]]
        assert EOS not in visible[1:], "an end of text, and what stood before it, is seen from the next document"


def test_batches_carry_documents_only_when_asked() -> None:
    tokens = Tokens([np.array([1, 1, EOS, 2, 2, EOS, 4, 4, 4], dtype=np.uint16)])
    batch = Batches(tokens, context=8, batch_tokens=8, seed=0, eos_id=EOS, document_mask=True).batch(0)
    assert batch["documents"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert (batch["targets"] >= 0).all()
    assert "documents" not in Batches(tokens, context=8, batch_tokens=8, seed=0, eos_id=EOS).batch(0)
    (held,) = windows(tokens, 8, eos_id=EOS, document_mask=True)
    assert held["documents"].tolist() == batch["documents"].tolist()


# ------------------------------------------------------------ evaluation


@given(data=st.data())
def test_windows_ask_for_each_token_once(data: st.DataObject) -> None:
    length, context = data.draw(st.integers(2, 150)), data.draw(st.integers(1, 12))
    rows, limit = data.draw(st.integers(1, 5)), data.draw(st.none() | st.integers(1, 200))
    inputs, targets = [], []
    for batch in windows(counting(length), context, rows=rows, limit=limit):
        assert batch["tokens"].shape == batch["targets"].shape
        assert batch["tokens"].shape[1] == context
        assert 1 <= len(batch["tokens"]) <= rows
        asked = batch["targets"] != IGNORED
        inputs += batch["tokens"][asked].tolist()
        targets += batch["targets"][asked].tolist()
    wanted = min(length - 1, limit or length)
    assert targets == list(range(1, wanted + 1))
    assert inputs == list(range(wanted))


def test_nanogpts_validation_split_is_1743_windows_of_64() -> None:
    batches = list(windows(counting(111_540), 64, rows=100))
    assert sum(len(batch["tokens"]) for batch in batches) == 1743
    assert sum(int((batch["targets"] != IGNORED).sum()) for batch in batches) == 111_539
