"""Rows: what a model writes of a source is the same whoever else is read, comes, goes, or is preempted meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm import SamplingParams
from lm.search import generate
from serve.engine.engine import Engine
from serve.engine.messages import Add, Output
from serve.engine.rows import RowsRunner, bytes_per_token

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def sources(translator: Any, lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(1)
    vocab = translator.tokenizer.vocab_size
    return [[draw.randrange(3, vocab) for _ in range(length - 1)] + [2] for length in lengths]


def made(translator: Any, **settings: Any) -> Engine:
    defaults = {"eos": translator.eos, "blocks": 400, "block_size": 4, "max_num_seqs": 16}
    return Engine(translator.model, translator.tokenizer, **{**defaults, **settings})


def run(engine: Engine, adds: Sequence[Any]) -> dict[str, list[Output]]:
    """All outputs by id; blocks are consistent, and rows are those of running requests, after every step."""
    for add in adds:
        engine.add(add)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.id, []).append(output)
        check(engine)
    assert engine.blocks.free == engine.blocks.count - 1
    return outputs


def check(engine: Engine) -> None:
    engine.blocks.check([request.table for request in engine.scheduler])
    assert isinstance(engine.runner, RowsRunner)
    rows = engine.runner._rows
    assert set(rows) <= set(engine.scheduler.running)
    assert len(set(rows)) == len(rows)
    assert (engine.runner._state is None) == (not rows)


def tokens(outputs: Sequence[Output]) -> list[int]:
    assert all(output.error is None for output in outputs), outputs
    return [token for output in outputs for token in output.tokens]


LONE: dict[tuple[int, tuple[int, ...]], list[int]] = {}


def alone(translator: Any, source: Sequence[int], count: int) -> list[int]:
    """What the model writes of this source by itself, at most `count` tokens; EOS ends it."""
    key = (id(translator.model), tuple(source))
    if key not in LONE:
        most = translator.model.room(len(source))
        LONE[key] = generate(translator.model, [source], replace(GREEDY, max_tokens=most), translator.eos)[0]
    return LONE[key][:count]


def test_models_write_what_depends_on_what_they_read(translator: Any) -> None:
    written = [tuple(alone(translator, source, 20)) for source in sources(translator, (5, 9, 12, 20, 31))]
    assert len(set(written)) == 5
    assert len({token for each in written for token in each}) > 8
    assert len({len(each) for each in written}) > 1  # some end by themselves


@pytest.mark.parametrize(
    ("budget", "blocks", "seats"), [(2048, 400, 16), (2048, 400, 1), (40, 400, 16), (40, 26, 16), (48, 30, 3)]
)
def test_greedy_is_the_models_own_however_it_is_batched(translator: Any, budget: int, blocks: int, seats: int) -> None:
    engine = made(translator, max_num_batched_tokens=budget, blocks=blocks, max_num_seqs=seats)
    read = sources(translator, (1, 7, 33, 12, 40, 2, 21, 5, 16, 28, 9))
    outputs = run(engine, [Add(str(i), source, GREEDY, 0.0) for i, source in enumerate(read)])
    for i, source in enumerate(read):
        assert tokens(outputs[str(i)]) == alone(translator, source, 20)


def test_a_tiny_cache_preempts_and_changes_nothing(translator: Any) -> None:
    engine = made(translator, max_num_batched_tokens=40, blocks=26)
    read = sources(translator, (12, 9, 14, 12, 11, 13))
    params = replace(GREEDY, max_tokens=30, ignore_eos=True)
    outputs = run(engine, [Add(str(i), source, params, 0.0) for i, source in enumerate(read)])
    assert engine.scheduler.preemptions > 3
    for i, source in enumerate(read):
        assert tokens(outputs[str(i)]) == generate(translator.model, [source], params)[0]
    ends = [output[-1].timings for output in outputs.values()]
    assert sum(timings.preemptions for timings in ends if timings) == engine.scheduler.preemptions


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    work=st.lists(
        st.tuples(
            st.integers(0, 12),  # the step before which it comes
            st.integers(1, 40),  # tokens of source
            st.integers(1, 24),  # tokens wanted
            st.one_of(st.none(), st.integers(1, 10)),  # steps until it is aborted
        ),
        min_size=1,
        max_size=9,
    ),
    blocks=st.integers(18, 60),
    budget=st.integers(40, 64),
    seats=st.integers(1, 9),
)
def test_whoever_comes_leaves_or_is_preempted_the_others_read_the_same(
    translator: Any, work: list[tuple[int, int, int, int | None]], blocks: int, budget: int, seats: int
) -> None:
    engine = made(translator, max_num_batched_tokens=budget, blocks=blocks, max_num_seqs=seats)
    read = sources(translator, [length for _, length, _, _ in work])
    outputs: dict[str, list[Output]] = {str(i): [] for i in range(len(work))}
    ended: set[str] = set()
    step = 0
    while engine.has_work or any(begin >= step for begin, *_ in work):
        for i, (begin, _, wanted, patience) in enumerate(work):
            if begin == step:
                engine.add(Add(str(i), read[i], replace(GREEDY, max_tokens=wanted), 0.0))
            if patience is not None and begin + patience == step and str(i) not in ended:
                engine.abort([str(i)])
                ended.add(str(i))
                assert str(i) not in [request.id for request in engine.scheduler]
                check(engine)
        if engine.has_work:
            for output in engine.step().outputs:
                assert output.id not in ended, "somebody was answered who had gone"
                outputs[output.id].append(output)
                if output.finish_reason is not None:
                    ended.add(output.id)
        check(engine)
        step += 1
    assert len(ended) == len(work)
    assert engine.blocks.free == engine.blocks.count - 1
    for i, (_, _, wanted, patience) in enumerate(work):
        expected, found = alone(translator, read[i], wanted), tokens(outputs[str(i)])
        assert found == expected if patience is None else found == expected[: len(found)]


def test_seeds_stops_and_probabilities(translator: Any) -> None:
    (source,) = sources(translator, (14,))
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=16, ignore_eos=True, logprobs=2)
    lone = run(made(translator), [Add("x", source, params, 0.0)])["x"]
    assert tokens(lone) == generate(translator.model, [source], params)[0]
    others = [Add(str(i), s, replace(params, seed=None), 0.0) for i, s in enumerate(sources(translator, (3, 30, 9)))]
    crowded = run(made(translator, blocks=30), [*others, Add("x", source, params, 0.0)])["x"]
    assert tokens(crowded) == tokens(lone)
    for mine, theirs in zip(lone, crowded, strict=True):
        ((one,), (other,)) = (mine.logprobs or [], theirs.logprobs or [])
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [id for id, _ in one.top] == [id for id, _ in other.top]
    text = "".join(output.text for output in lone)
    assert text == translator.tokenizer.decode(tokens(lone))
    stopped = run(made(translator), [Add("x", source, replace(params, stop=(text[3:6],)), 0.0)])["x"]
    assert "".join(output.text for output in stopped) == text[: text.find(text[3:6])]
    assert stopped[-1].finish_reason == "stop"


def test_min_tokens_and_penalties_look_at_the_output_alone(translators: dict[str, Any]) -> None:
    translator = translators["transformer"]
    (source,) = sources(translator, (14,))
    free = alone(translator, source, 20)
    held = tokens(run(made(translator), [Add("x", source, replace(GREEDY, min_tokens=15), 0.0)])["x"])
    assert len(held) >= 15
    assert not set(held[:14]) & set(translator.eos)
    penalised = replace(GREEDY, repetition_penalty=1.5, max_tokens=2)
    # A translation may well begin with a token that stands in its source.
    same = [free[0], *source]
    expected = alone(translator, same, 1)
    assert tokens(run(made(translator), [Add("x", same, penalised, 0.0)])["x"])[:1] == expected


def test_ends_at_the_longest_target_and_not_at_the_sum(translators: dict[str, Any]) -> None:
    for name in ("transformer", "rnnsearch"):
        translator = translators[name]
        (source,) = sources(translator, (48,))
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        outputs = run(made(translator), [Add("x", source, params, 0.0)])["x"]
        assert len(tokens(outputs)) == 48
        assert outputs[-1].finish_reason == "length"


def test_what_cannot_be_is_a_sentence_and_others_go_on(translator: Any) -> None:
    engine = made(translator, blocks=20, max_num_batched_tokens=60, max_model_len=40)
    (source,) = sources(translator, (9,))
    adds = [
        Add("empty", [], GREEDY, 0.0),
        Add("long", [5] * 41, GREEDY, 0.0),
        Add("more", [5] * 30, replace(GREEDY, max_tokens=41), 0.0),
        Add("probabilities", [5] * 3, replace(GREEDY, prompt_logprobs=0), 0.0),
        Add("good", source, GREEDY, 0.0),
    ]
    outputs = run(engine, adds)
    assert tokens(outputs["good"]) == alone(translator, source, 20)
    for id in ("empty", "long", "more", "probabilities"):
        (output,) = outputs[id]
        assert output.finish_reason == "error"
        assert output.error is not None
        assert output.error.endswith(".")


def test_a_failed_step_ends_those_in_it_and_the_engine_goes_on(
    translator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(translator)
    (source,) = sources(translator, (9,))
    engine.add(Add("one", source, GREEDY, 0.0))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(translator.model, "step", lambda tokens, state: 1 / 0)
        engine.add(Add("two", source, GREEDY, 0.0))
        outputs = engine.step().outputs
    assert {output.id: output.error for output in outputs} == dict.fromkeys(
        ("one", "two"), "ZeroDivisionError: division by zero"
    )
    check(engine)
    assert tokens(run(engine, [Add("three", source, GREEDY, 0.0)])["three"]) == alone(translator, source, 20)


def test_bytes_of_a_row_grow_with_its_source(translator: Any) -> None:
    each = bytes_per_token(translator.model, translator.model.config.context)
    config = translator.model.config
    if config.architecture == "rnnsearch":  # an annotation of both directions, and its image under U_a
        assert each >= 4 * (2 * 24 + 24)
    else:
        assert each >= 4 * 2 * 2 * 32 * 0.9  # keys and values of two layers
    assert each < 2000


@pytest.mark.parametrize("name", ["transformer", "rnnsearch"])
def test_a_long_source_that_has_left_widens_nobody(translators: dict[str, Any], name: str) -> None:
    translator = translators[name]
    engine = made(translator)
    long, *short = sources(translator, (48, 6, 7, 8))
    params = replace(GREEDY, max_tokens=40, ignore_eos=True)

    def width() -> int:
        assert isinstance(engine.runner, RowsRunner)
        state = engine.runner._state
        return state.memory.keys[0].shape[2] if name == "transformer" else state.annotations.shape[1]

    engine.add(Add("long", long, replace(params, max_tokens=2), 0.0))
    engine.add(Add("0", short[0], params, 0.0))
    engine.step()
    assert width() == 48
    engine.step()
    engine.add(Add("1", short[1], params, 0.0))
    engine.step()
    assert width() == 7
    outputs = run(engine, [Add("2", short[2], params, 0.0)])
    assert tokens(outputs["2"]) == generate(translator.model, [short[2]], params)[0]
