"""Beam search: against every output there is, against a plain search that stops late, and on all three models."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import SamplingParams
from lm.beam import GNMT, VLLM, BeamParams, Scorer, beam_search, beam_steps, best
from lm.search import generate, pad, stream
from lm.trace import AttentionTrace

END = 2
SOURCES = [[5, 6, 7, 8, 2], [9, 2], [3, 3, 4, 10, 11, 12, 13, 14, 2], [15, 16, 2], [17, 18, 19, 5, 5, 5, 2]]


class Table:
    """A model whose next token depends on source and tokens so far through a random table, and on nothing else."""

    def __init__(self, seed: int, vocabulary: int, context: int, halves: bool = False):
        self.seed, self.vocabulary, self.context, self.halves = seed, vocabulary, context, halves

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1)

    def room(self, tokens: int) -> int:
        if tokens < 1:
            raise ValueError("the source is empty.")
        return self.context

    def start(self, src: torch.Tensor, mask: torch.Tensor, record: AttentionTrace | None = None) -> TableState:
        return TableState([(*ids[real].tolist(), "|") for ids, real in zip(src, mask, strict=True)])

    def step(
        self, tokens: torch.Tensor, state: TableState, record: AttentionTrace | None = None
    ) -> tuple[torch.Tensor, TableState]:
        rows = [(*row, token) for row, token in zip(state.rows, tokens[:, 0].tolist(), strict=True)]
        return torch.tensor([self.logits(row) for row in rows]).unsqueeze(1), TableState(rows)

    def logits(self, row: tuple) -> list[float]:
        draw = random.Random(repr((self.seed, row)))
        values = [draw.gauss(0, 2) for _ in range(self.vocabulary)]
        return [round(value) / 2 for value in values] if self.halves else values


class TableState:
    def __init__(self, rows: list[tuple]):
        self.rows, self.first = rows, torch.ones(len(rows), dtype=torch.int64)

    def select(self, index: torch.Tensor) -> TableState:
        return TableState([self.rows[i] for i in index.tolist()])


def logprobs(model: Table, source: list[int], output: tuple[int, ...]) -> torch.Tensor:
    """float64 [V]: of what follows the output."""
    logits = torch.tensor([model.logits((*source, "|", 1, *output))])
    return logits.log_softmax(dim=-1).double()[0]


def everything(model: Table, source: list[int], scorer: Scorer, limit: int) -> list[tuple[float, tuple[int, ...]]]:
    """Each output that a search may return and its score, best first."""
    words = [token for token in range(model.vocabulary) if token != END]
    found = []
    for length in range(limit + 1):
        for output in itertools.product(words, repeat=length):
            total = sum(float(logprobs(model, source, output[:i])[token]) for i, token in enumerate(output))
            if length < limit:
                ended = total + float(logprobs(model, source, output)[END])
                found.append((scorer.score(ended, length + 1, True), output))
            elif scorer.competes:
                found.append((scorer.score(total, length, False), output))
    return sorted(found, key=lambda one: -one[0])


def plain(model: Table, source: list[int], params: BeamParams, limit: int) -> list[tuple[float, tuple[int, ...]]]:
    """The same search, written down simply: no batch, no early stop, everything kept."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended, scorer = [], params.scorer
    for step in range(1, limit + 1):
        candidates = []
        for rank, (total, output) in enumerate(live):
            row = logprobs(model, source, output)
            order = sorted(range(model.vocabulary), key=lambda token: (-float(row[token]), token))
            for place, token in enumerate(order):
                candidates.append((-(total + float(row[token])), rank, place, token, output))
        candidates.sort()
        going = []
        for place, (negative, _, own_place, token, output) in enumerate(candidates):
            if token == END:
                if own_place < 2 * params.beam if scorer.competes else place < params.beam:
                    ended.append((scorer.score(-negative, step, True), output))
            elif len(going) < params.beam:
                going.append((-negative, (*output, token)))
        live = going
        if ended and params.beam == 1 and not scorer.competes:
            break
    cut = [(scorer.score(total, limit, False), output) for total, output in live]
    if scorer.competes:
        ended, cut = ended + cut, []
    ended.sort(key=lambda one: -one[0])
    return (ended + cut)[: params.n_best]


SCORERS = st.sampled_from([-1.0, 0.0, 0.6, 1.0, 3.0]).map(GNMT) | st.builds(
    VLLM, st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), st.integers(1, 9)
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scorer=SCORERS, n_best=st.integers(1, 12), limit=st.integers(1, 4))
def test_a_beam_that_holds_everything_finds_the_best_there_is(
    seed: int, scorer: Scorer, n_best: int, limit: int
) -> None:
    model = Table(seed, 4, limit)
    params = BeamParams(beam=200, n_best=n_best, scorer=scorer, max_tokens=99)
    found = beam_search(model, [[5], [6, 7]], params, [END])
    for source, hypotheses in zip([[5], [6, 7]], found, strict=True):
        there_is = everything(model, source, scorer, limit)[:n_best]
        best_scores = [score for score, _ in there_is]
        assert [h.score for h in hypotheses][: len(best_scores)] == pytest.approx(best_scores, abs=1e-5)
        assert [tuple(h.ids) for h in hypotheses][: len(there_is)] == [output for _, output in there_is]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scorer=SCORERS,
    beam=st.integers(1, 6),
    n_best=st.integers(1, 6),
    limit=st.integers(1, 9),
    vocabulary=st.integers(3, 12),
    halves=st.booleans(),
    rows=st.integers(1, 4),
)
def test_stopping_early_loses_nothing(
    seed: int, scorer: Scorer, beam: int, n_best: int, limit: int, vocabulary: int, halves: bool, rows: int
) -> None:
    """Whatever the length penalty, and among equals too (logits in halves): the sources of a batch get what the search
    that goes on to the greatest length gives each alone.
    """
    model = Table(seed, vocabulary, 20, halves)
    sources = [[5 + row] * (row + 1) for row in range(rows)]
    params = BeamParams(beam=beam, n_best=min(n_best, beam), scorer=scorer, max_tokens=limit)
    for source, hypotheses in zip(sources, beam_search(model, sources, params, [END]), strict=True):
        expected = plain(model, source, params, limit)
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected], abs=1e-5)
        assert [tuple(h.ids) for h in hypotheses] == [output for _, output in expected]
        for h in hypotheses:
            assert h.end == (END if len(h.logprobs) > len(h.ids) else None)
            assert scorer.score(h.logprob, len(h.logprobs), h.end is not None) == pytest.approx(h.score)
            steps = [*h.ids, END][: len(h.logprobs)]
            own = [float(logprobs(model, source, tuple(h.ids[:i]))[token]) for i, token in enumerate(steps)]
            assert h.logprobs == pytest.approx(own, abs=1e-5)


def test_the_worth_of_a_hypothesis() -> None:
    assert GNMT(0.0).score(-3.0, 7, True) == -3.0
    assert GNMT(0.6).score(-3.0, 7, True) == pytest.approx(-3.0 / (12 / 6) ** 0.6)
    assert GNMT(-0.5).score(-3.0, 7, False) == pytest.approx(-3.0 * 2**0.5)
    assert VLLM(1.0, prompt=4).score(-3.0, 7, True) == pytest.approx(-3.0 / 10)  # the end is not counted
    assert VLLM(1.0, prompt=4).score(-3.0, 7, False) == pytest.approx(-3.0 / 11)
    assert VLLM(2.0).score(-3.0, 2, True) == pytest.approx(-3.0 / 4)
    assert VLLM(1e6).score(-3.0, 7, True) == 0.0  # beyond a float, and no error
    assert VLLM(-1e6).score(-3.0, 7, True) == -math.inf


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5), k=st.integers(1, 7))
def test_among_equals_the_first_come_first(rows: list[list[int]], k: int) -> None:
    values, ids = best(torch.tensor(rows, dtype=torch.float32), k)
    for row, value, id in zip(rows, values.tolist(), ids.tolist(), strict=True):
        assert id == sorted(range(7), key=lambda i: (-row[i], i))[:k]
        assert value == [row[i] for i in id]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(2040, 2300), k=st.integers(1, 40), spread=st.sampled_from([3, 1000]))
def test_among_many_equals_too(seed: int, size: int, k: int, spread: int) -> None:
    """A large vocabulary is searched in blocks; a small spread makes equals inside and across them."""
    logits = torch.randint(spread, (3, size), generator=torch.Generator().manual_seed(seed)).float()
    values, ids = best(logits, k)
    expected, order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(ids, order[:, :k])
    values, ids = best(-logits / 7, k)  # negative ones, and a zero with a sign
    expected, order = (-logits / 7).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(ids, order[:, :k])


def test_a_source_whose_search_is_over_leaves_the_batch() -> None:
    model = Table(3, 8, 30)
    steps = beam_steps(model, SOURCES, BeamParams(beam=3, scorer=GNMT(0.0)), [END])
    rows = []
    while True:
        try:
            rows.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
    assert rows[0] == len(SOURCES)
    assert rows[1] == 3 * len(SOURCES)
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < rows[1]
    assert len(found) == len(SOURCES)


def test_a_given_number_of_tokens_and_the_greatest_length() -> None:
    model = Table(1, 6, 70)
    for hypotheses in beam_search(model, SOURCES, BeamParams(min_tokens=9, max_tokens=9, n_best=3), [END]):
        assert [len(h.ids) for h in hypotheses] == [9] * 3
        assert [h.end for h in hypotheses] == [None] * 3
    endless = beam_search(model, SOURCES, BeamParams(beam=2))  # nothing ends it
    assert [len(hypotheses[0].ids) for hypotheses in endless] == [min(70, len(source) + 50) for source in SOURCES]
    assert beam_search(model, [], BeamParams()) == []
    late = beam_search(model, SOURCES, BeamParams(min_tokens=5, beam=2), [END])
    assert min(len(hypotheses[0].ids) for hypotheses in late) >= 5


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"beam": 0}, "beam must be at least 1, got 0."),
        ({"beam": 2, "n_best": 3}, "n_best must be between 1 and beam=2, got 3."),
        ({"n_best": 0}, "n_best must be between 1 and beam=4, got 0."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1."),
    ],
)
def test_what_cannot_be_searched_for(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        BeamParams(**values)
    assert str(refused.value) == sentence


def test_a_source_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError) as refused:
        beam_search(Table(1, 5, 9), [[1], []], BeamParams())
    assert str(refused.value) == "prompt 1: the source is empty."


# ---------------------------------------------------------------- the three models

PARAMS = [
    BeamParams(beam=4, n_best=4, max_tokens=12),
    BeamParams(beam=3, n_best=2, scorer=GNMT(0.0), max_tokens=12),
    BeamParams(beam=2, n_best=2, scorer=VLLM(1.0), max_tokens=12),
]


def ends(model: Any) -> list[int]:
    """Tokens that end outputs of this model early and late, where they are taken for ends: those that it writes."""
    free = generate(model, SOURCES, SamplingParams(temperature=0.0, max_tokens=12))
    return sorted({END, *(output[2 * row + 2] for row, output in enumerate(free))})


def outputs(found: list[list[Any]]) -> list[list[tuple]]:
    return [[(h.ids, h.end) for h in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("params", PARAMS)
def test_a_sentence_alone_and_in_a_batch_is_translated_equally(translator_model: Any, params: BeamParams) -> None:
    """Padded beside longer ones, in any order, with others leaving before it."""
    stops = ends(translator_model)
    together = beam_search(translator_model, SOURCES, params, stops)
    assert any(h.end is not None for hypotheses in together for h in hypotheses)
    turned = beam_search(translator_model, SOURCES[::-1], params, stops)[::-1]
    assert outputs(turned) == outputs(together)
    for source, hypotheses in zip(SOURCES, together, strict=True):
        (alone,) = beam_search(translator_model, [source], params, stops)
        assert outputs([alone]) == outputs([hypotheses])
        assert [h.score for h in alone] == pytest.approx([h.score for h in hypotheses], abs=1e-4)
        ended = [h.score for h in hypotheses if h.end is not None]
        assert ended == sorted(ended, reverse=True)
        assert len({(*h.ids, h.end) for h in hypotheses}) == params.n_best


def test_in_bfloat16_scores_are_near_float32(translator_model: Any) -> None:
    """Each hypothesis of a search in bfloat16 is worth there about what float32 says of the same tokens."""
    model = copy.deepcopy(translator_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # weights as loud as these make much of the least difference
    half = copy.deepcopy(model).bfloat16()
    for source in SOURCES:
        (found,) = beam_search(half, [source], BeamParams(beam=2, scorer=GNMT(0.0), max_tokens=6))
        with torch.inference_mode():
            state = model.start(*pad([source]))
            given = torch.tensor([[int(state.first), *found[0].ids[:-1]]])
            logits = model.step(given, state)[0][0, -len(found[0].ids) :]
        exact = logits.log_softmax(dim=-1).gather(1, torch.tensor(found[0].ids).unsqueeze(1)).sum().item()
        assert found[0].score == pytest.approx(exact, abs=0.05 * len(found[0].ids) + 0.05 * abs(exact))


def test_a_beam_of_one_is_greedy_search(translator_model: Any) -> None:
    stops = ends(translator_model)
    greedy = generate(translator_model, SOURCES, SamplingParams(temperature=0.0, max_tokens=15), stops)
    for scorer in (GNMT(0.6), GNMT(0.0), GNMT(2.0)):
        found = beam_search(translator_model, SOURCES, BeamParams(beam=1, max_tokens=15, scorer=scorer), stops)
        assert [h.ids + ([] if h.end is None else [h.end]) for (h,) in found] == greedy


def forced(model: Any, source: list[int], steps: list[int]) -> Any:
    """The attention of decoding these tokens, given at once."""
    record = AttentionTrace()
    with torch.inference_mode():
        state = model.start(*pad([source]), record=record)
        model.step(torch.tensor([[int(state.first), *steps[:-1]]]), state, record=record)
    return record.row(0)


def assert_equal_maps(found: Any, expected: Any) -> None:
    assert found.kinds == expected.kinds
    for kind in expected.kinds:
        assert found.of(kind).keys() == expected.of(kind).keys()
        for layer, weights in expected.of(kind).items():
            torch.testing.assert_close(found.of(kind)[layer], weights, atol=1e-3, rtol=1e-2)
    assert found.energies.keys() == expected.energies.keys()
    for layer, energies in expected.energies.items():
        torch.testing.assert_close(found.energies[layer], energies, atol=1e-2, rtol=1e-3)


def test_recorded_attention_follows_its_hypothesis(translator_model: Any) -> None:
    """Through reordering, and through others' leaving: it is the attention of decoding that output alone."""
    params = BeamParams(beam=3, n_best=3, max_tokens=9)
    stops = ends(translator_model)
    free = beam_search(translator_model, SOURCES, params, stops)
    found = beam_search(translator_model, SOURCES, params, stops, AttentionTrace())
    assert outputs(found) == outputs(free)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        for h in hypotheses:
            steps = h.ids if h.end is None else [*h.ids, h.end]
            assert_equal_maps(h.attention, forced(translator_model, source, steps))


def test_recorded_attention_of_rows_that_leave(translator_model: Any) -> None:
    stops = ends(translator_model)
    record = AttentionTrace()
    params = SamplingParams(temperature=0.0, max_tokens=9)
    tokens: list[list[int]] = [[] for _ in SOURCES]
    for produced in stream(translator_model, SOURCES, params, stops, record):
        for place, (row, token) in enumerate(produced):
            tokens[row].append(token)
            if token in stops or len(tokens[row]) == 9:
                assert_equal_maps(record.row(place), forced(translator_model, SOURCES[row], tokens[row]))
    assert tokens == generate(translator_model, SOURCES, params, stops)
