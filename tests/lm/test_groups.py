"""Rows in groups: a beam's hypotheses share their source and their past, and do not get into each other's way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.groups import regroup, take
from lm.search import pad
from lm.target_cache import TargetCache

SOURCES = [[5, 6, 7, 2], [9, 2], [3, 4, 10, 11, 12, 2]]


@settings(max_examples=100, deadline=None)
@given(each=st.integers(1, 4), index=st.lists(st.integers(0, 11), max_size=12))
def test_new_groups_hold_their_rows(each: int, index: list[int]) -> None:
    kept, rows = regroup(torch.tensor(index, dtype=torch.int64), each)
    assert len(kept) * rows == len(index)
    assert [group for group in kept for _ in range(rows)] == [row // each for row in index]


def test_groups_that_stay_are_not_copied() -> None:
    tensor = torch.arange(6).view(3, 2)
    assert take(tensor, [0, 1, 2]) is tensor
    assert take(tensor, [2, 0]).tolist() == [[4, 5], [0, 1]]


@torch.inference_mode()
def write(cache: TargetCache, step: int, values: list[float]) -> None:
    """Each row writes one number at a step."""
    rows = torch.tensor(values).view(-1, 1, 1, 1)
    cache.reserve(step + 1, 99)
    cache.begin(torch.tensor([step]))
    cache.write(0, rows, -rows, torch.tensor([step]), step)


def past(cache: TargetCache, span: int) -> list[list[float]]:
    """What each row reads."""
    keys, values = cache.read(0, span)
    assert torch.equal(values, -keys)
    lineage = cache.lineage(span)
    if lineage is None:
        return keys[:, 0, :, 0].tolist()
    cells = keys[:, 0, :, 0].view(len(keys), 1, span, -1).expand(lineage.shape)
    return cells[lineage].view(-1, span).tolist()


def test_what_is_selected_twice_is_written_apart() -> None:
    empty = torch.zeros(1, 1, 1, 0, 1, 1)
    root = TargetCache(empty, empty.clone()).select(torch.tensor([0, 0]), [0], 2)
    write(root, 0, [1.0, 2.0])
    first = root.select(torch.tensor([0, 1]), [0], 2)
    write(first, 1, [3.0, 4.0])
    second = root.select(torch.tensor([1, 0]), [0], 2)
    write(second, 1, [5.0, 6.0])
    write(root, 1, [7.0, 8.0])
    assert past(first, 2) == [[1.0, 3.0], [2.0, 4.0]]
    assert past(second, 2) == [[2.0, 5.0], [1.0, 6.0]]
    assert past(root, 2) == [[1.0, 7.0], [2.0, 8.0]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=st.integers(1, 3))
def test_every_row_reads_its_own_past(data: st.DataObject, groups: int) -> None:
    """Whatever is selected from whatever, in any order, with states that are left behind going on meanwhile."""
    empty = torch.zeros(1, groups, 1, 0, 1, 1)
    states: list[tuple[TargetCache, list[list[float]], int]] = [
        (TargetCache(empty, empty.clone()), [[] for _ in range(groups)], 1)
    ]
    number = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, len(states) - 1))
        cache, rows, each = states[at]
        if data.draw(st.booleans()):
            numbers = [number + i for i in range(1, len(rows) + 1)]
            number += len(rows)
            write(cache, len(rows[0]), numbers)
            for row, value in zip(rows, numbers, strict=True):
                row.append(value)
        else:
            width = data.draw(st.integers(1, 4))
            sources = data.draw(st.lists(st.integers(0, len(rows) // each - 1), min_size=1, max_size=3, unique=True))
            within = st.integers(0, each - 1)
            index = [source * each + data.draw(within) for source in sources for _ in range(width)]
            kept, new = regroup(torch.tensor(index), each)
            states.append((cache.select(torch.tensor(index), kept, new), [list(rows[i]) for i in index], new))
        for cache, rows, _ in states:
            if rows[0]:
                assert past(cache, len(rows[0])) == rows
    alike = [
        (cache, rows) for cache, rows, each in states if each == states[-1][2] and len(rows[0]) == len(states[-1][1][0])
    ]
    joined = TargetCache.join([cache for cache, _ in alike])
    apart = TargetCache.join([cache.apart() for cache, rows, _ in states if len(rows[0]) == len(alike[0][1][0])])
    if alike[0][1][0]:
        span = len(alike[0][1][0])
        assert past(joined, span) == [row for _, rows in alike for row in rows]
        assert past(apart, span) == [row for _, rows, _ in states if len(rows[0]) == span for row in rows]


def test_reordering_a_beam_copies_nothing() -> None:
    empty = torch.zeros(1, 2, 1, 0, 1, 1)
    cache = TargetCache(empty, empty.clone()).select(torch.tensor([0, 0, 0, 1, 1, 1]), [0, 1], 3)
    write(cache, 0, [1, 2, 3, 4, 5, 6])
    turned = cache.select(torch.tensor([2, 0, 0, 5, 4, 3]), [0, 1], 3)
    assert turned.keys is cache.keys
    write(turned, 1, [7, 8, 9, 10, 11, 12])
    assert turned.keys is cache.keys
    assert past(turned, 2) == [[3, 7], [1, 8], [1, 9], [6, 10], [5, 11], [4, 12]]
    write(cache, 1, [13, 14, 15, 16, 17, 18])  # it is left behind, and writes elsewhere now
    assert past(turned, 2) == [[3, 7], [1, 8], [1, 9], [6, 10], [5, 11], [4, 12]]
    assert past(cache, 2) == [[1, 13], [2, 14], [3, 15], [4, 16], [5, 17], [6, 18]]


@torch.inference_mode()
def test_two_continuations_of_a_beam_do_not_meet(translator_model: Any) -> None:
    """Both give what forced decoding of the same tokens gives, though they step in turns."""
    state = translator_model.start(*pad(SOURCES))
    beam = state.select(torch.tensor([0, 0, 1, 1, 2, 2]))
    first = beam.first
    _, beam = translator_model.step(first.unsqueeze(1), beam)
    written: list[tuple[Any, torch.Tensor]] = []
    for seed in (1, 2):
        index = torch.tensor([[1, 0, 2, 2, 5, 4], [0, 0, 3, 2, 4, 4]][seed - 1])
        tokens = torch.randint(3, 24, (6, 4), generator=torch.Generator().manual_seed(seed))
        written.append((beam.select(index), tokens))
    logits: list[list[torch.Tensor]] = [[], []]
    for t in range(4):
        for number, (state, tokens) in enumerate(written):
            out, state = translator_model.step(tokens[:, t : t + 1], state)
            written[number] = (state, tokens)
            logits[number].append(out)
    for found, (_, tokens) in zip(logits, written, strict=True):
        fresh = translator_model.start(*pad([source for source in SOURCES for _ in range(2)]))
        wanted, _ = translator_model.step(torch.cat((first.unsqueeze(1), tokens), dim=1), fresh)
        torch.testing.assert_close(torch.cat(found, dim=1), wanted[:, 1:], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("kind", ["rnnsearch", "transformer"])
def test_a_beam_holds_its_source_once(kind: str, translator_named: Any) -> None:
    state = translator_named(kind).start(*pad(SOURCES))
    beam = state.select(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    turned = beam.select(torch.tensor([2, 0, 0, 5, 3, 4, 6, 8, 6]))
    for other in (beam, turned):
        if kind == "transformer":
            assert other.memory is state.memory
        else:
            assert other.annotations is state.annotations
            assert other.projected is state.projected
