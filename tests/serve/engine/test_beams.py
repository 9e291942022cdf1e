"""Beam search in the engine: what lm.beam finds alone, whoever else runs, for all that is served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm import SamplingParams
from lm.beam import VLLM, BeamParams, Hypothesis, beam_search
from lm.search import generate
from serve import LLM, BeamSearchParams
from serve.engine.engine import Engine
from serve.engine.messages import Add, AddBeam, Output

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


class Case:
    """A model with its tokenizer and ends, and prompts for it."""

    def __init__(self, model: Any, tokenizer: Any, eos: Sequence[int]) -> None:
        self.model, self.tokenizer, self.eos = model, tokenizer, list(eos)
        draw = random.Random(2)
        self.prompts = [[draw.randrange(3, 337) for _ in range(length)] for length in (9, 4, 17, 1, 12)]

    def engine(self, **settings: Any) -> Engine:
        defaults = {"eos": self.eos, "blocks": 300, "block_size": 4, "max_num_seqs": 16}
        return Engine(self.model, self.tokenizer, **{**defaults, **settings})

    def found(self, prompt: Sequence[int], params: BeamSearchParams) -> list[Hypothesis]:
        length = 1 if self.model.encoder_decoder else len(prompt)
        wanted = BeamParams(
            beam=params.beam_width,
            n_best=params.beam_width,
            scorer=VLLM(params.length_penalty, length),
            max_tokens=params.max_tokens,
        )
        return beam_search(self.model, [prompt], wanted, () if params.ignore_eos else self.eos)[0]


@pytest.fixture(params=["decoder", "transformer", "rnnsearch", "prefix"])
def case(request: pytest.FixtureRequest, model: Any, tokenizer: Any, translators: dict[str, Any]) -> Case:
    if request.param == "decoder":
        return Case(model, tokenizer, [tokenizer.eos_id, *range(40, 60)])
    made = translators[request.param]
    return Case(made.model, made.tokenizer, made.eos)


def add(id: str, prompt: list[int], params: BeamSearchParams) -> AddBeam:
    return AddBeam([f"{id}-{i}" for i in range(params.beam_width)], prompt, params, 0.0)


def run(engine: Engine, adds: Sequence[Any] = ()) -> dict[str, list[Output]]:
    for each in adds:
        engine.add(each)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.id, []).append(output)
        engine.blocks.check([request.table for request in engine.scheduler])
    assert engine.blocks.free == engine.blocks.count - 1
    assert not engine.beams._searches
    return outputs


def check(case: Case, outputs: dict[str, list[Output]], id: str, prompt: list[int], params: BeamSearchParams) -> None:
    for i, hypothesis in enumerate(case.found(prompt, params)):
        (output,) = outputs[f"{id}-{i}"]
        assert output.error is None, output.error
        assert output.tokens == hypothesis.ids
        assert output.text == case.tokenizer.decode(hypothesis.ids)
        assert output.finish_reason == ("length" if hypothesis.end is None else "stop")
        assert output.stop_reason == hypothesis.end
        assert output.cumulative_logprob == pytest.approx(hypothesis.logprob)


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=4, max_tokens=12),
        BeamSearchParams(beam_width=1, max_tokens=9),
        BeamSearchParams(beam_width=3, max_tokens=10, length_penalty=0.0),
        BeamSearchParams(beam_width=5, max_tokens=6, length_penalty=2.0, ignore_eos=True),
    ],
    ids=str,
)
def test_it_finds_what_lm_finds_alone_and_in_company(case: Case, params: BeamSearchParams) -> None:
    searches = [add(str(i), prompt, params) for i, prompt in enumerate(case.prompts)]
    company = [Add(f"greedy-{i}", prompt, GREEDY, 0.0) for i, prompt in enumerate(case.prompts)]
    mixed = [each for pair in zip(searches, company, strict=True) for each in pair]
    outputs = run(case.engine(), mixed)
    for i, prompt in enumerate(case.prompts):
        check(case, outputs, str(i), prompt, params)
        tokens = [token for output in outputs[f"greedy-{i}"] for token in output.tokens]
        assert tokens == generate(case.model, [prompt], GREEDY, case.eos)[0]


def test_the_others_get_a_token_in_each_step_of_a_search(case: Case) -> None:
    engine = case.engine()
    engine.add(add("beam", case.prompts[0], BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True)))
    engine.add(Add("other", case.prompts[1], replace(GREEDY, ignore_eos=True), 0.0))
    for _ in range(12):
        assert [output.id for output in engine.step().outputs if output.tokens] == ["other"]
    assert engine.scheduler.running[0].width == 4


def test_a_preempted_search_begins_anew_and_finds_the_same(case: Case) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    engine = case.engine(blocks=23, max_model_len=48)
    greedy = replace(GREEDY, max_tokens=30, ignore_eos=True)
    first = [Add(str(i), case.prompts[i], greedy, 0.0) for i in (0, 1)]
    outputs = run(engine, [*first, add("beam", case.prompts[0], params)])
    assert engine.scheduler.preemptions > 0
    check(case, outputs, "beam", case.prompts[0], params)
    for i in (0, 1):
        tokens = [token for output in outputs[str(i)] for token in output.tokens]
        assert tokens == generate(case.model, [case.prompts[i]], greedy)[0]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    work=st.lists(
        st.tuples(
            st.integers(0, 8),  # the step before which it comes
            st.integers(0, 4),  # which prompt
            st.integers(0, 3),  # the beam's width; 0: greedy
            st.one_of(st.none(), st.integers(1, 8)),  # steps until it is aborted
        ),
        min_size=2,
        max_size=7,
    ),
    blocks=st.integers(23, 50),
    seats=st.integers(3, 8),
)
def test_whoever_comes_or_leaves_the_others_find_the_same(
    case: Case, work: list[tuple[int, int, int, int | None]], blocks: int, seats: int
) -> None:
    engine = case.engine(blocks=blocks, max_num_seqs=seats, max_num_batched_tokens=24, max_model_len=48)
    outputs: dict[str, list[Output]] = {}
    step = 0
    while engine.has_work or any(begin >= step for begin, *_ in work):
        for i, (begin, number, width, patience) in enumerate(work):
            prompt = case.prompts[number]
            if begin == step and width:
                engine.add(add(str(i), prompt, BeamSearchParams(beam_width=width, max_tokens=10)))
            elif begin == step:
                engine.add(Add(f"{i}-0", prompt, replace(GREEDY, ignore_eos=True), 0.0))
            if patience is not None and begin + patience == step:
                engine.abort([f"{i}-0"])
        for output in engine.step().outputs if engine.has_work else ():
            outputs.setdefault(output.id, []).append(output)
        engine.blocks.check([request.table for request in engine.scheduler])
        step += 1
    assert engine.blocks.free == engine.blocks.count - 1
    assert not engine.beams._searches
    for i, (_, number, width, patience) in enumerate(work):
        prompt = case.prompts[number]
        if width and (patience is None or f"{i}-0" in outputs):
            check(case, outputs, str(i), prompt, BeamSearchParams(beam_width=width, max_tokens=10))
        elif not width:
            tokens = [token for output in outputs.get(f"{i}-0", []) for token in output.tokens]
            expected = generate(case.model, [prompt], replace(GREEDY, ignore_eos=True))[0]
            assert tokens == (expected if patience is None else expected[: len(tokens)])


def test_an_abort_frees_it_at_once(case: Case) -> None:
    engine = case.engine()
    params = BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True)
    engine.add(add("beam", case.prompts[0], params))
    engine.add(Add("other", case.prompts[1], GREEDY, 0.0))
    engine.step()
    engine.abort(["beam-2", "beam-3"])  # any of its sequences
    assert [request.id for request in engine.scheduler] == ["other"]
    assert not engine.beams._searches
    assert set(run(engine)) == {"other"}


def test_probabilities_at_each_token(case: Case) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8, logprobs=2, include_stop_str_in_output=True)
    outputs = run(case.engine(), [add("beam", case.prompts[0], params)])
    for i, hypothesis in enumerate(case.found(case.prompts[0], params)):
        (output,) = outputs[f"beam-{i}"]
        tokens = hypothesis.ids if hypothesis.end is None else [*hypothesis.ids, hypothesis.end]
        assert output.tokens == tokens
        assert output.logprobs is not None
        assert [entry.token for entry in output.logprobs] == tokens
        assert [entry.logprob for entry in output.logprobs] == pytest.approx(hypothesis.logprobs, abs=1e-4)
        assert all(len(entry.top) == 2 for entry in output.logprobs)
        assert output.text == case.tokenizer.decode(hypothesis.ids)


def test_what_cannot_be_fails_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine(blocks=30, max_num_seqs=4, max_model_len=40)
    good = BeamSearchParams(beam_width=3, max_tokens=6)
    wrong = {
        "seats": add("seats", [5], BeamSearchParams(beam_width=5, max_tokens=2)),
        "cache": add("cache", [5] * 20, BeamSearchParams(beam_width=4, max_tokens=20)),
        "vocabulary": add("vocabulary", [5], BeamSearchParams(beam_width=200, max_tokens=2)),
        "room": add("room", [5] * 30, BeamSearchParams(beam_width=2, max_tokens=41)),
        "empty": add("empty", [], good),
    }
    outputs = run(engine, [*wrong.values(), add("good", case.prompts[0], good), Add("x", [5, 6], GREEDY, 0.0)])
    check(case, outputs, "good", case.prompts[0], good)
    for message in wrong.values():
        for id in message.ids:
            (output,) = outputs[id]
            assert output.finish_reason == "error"
            assert output.error is not None
            assert output.error.endswith(".")

    monkeypatch.setattr(engine.beams, "advance", lambda share: 1 / 0)
    outputs = run(engine, [add("broken", case.prompts[0], good), Add("x", case.prompts[1], GREEDY, 0.0)])
    assert [outputs[f"broken-{i}"][0].error for i in range(3)] == ["ZeroDivisionError: division by zero"] * 3
    tokens = [token for output in outputs["x"] for token in output.tokens]
    assert tokens == generate(case.model, [case.prompts[1]], GREEDY, case.eos)[0]


def test_offline_with_vllms_names(folder: Any, model: Any, tokenizer: Any) -> None:
    llm = LLM(folder, kv_cache_memory_bytes=1 << 24)
    params = BeamSearchParams(beam_width=3, max_tokens=8, logprobs=1)
    case = Case(model, tokenizer, [tokenizer.eos_id])
    text, ids = llm.beam_search(["the fox", {"prompt_token_ids": [5, 6]}], params)
    for output, prompt in ((text, tokenizer.encode("the fox")), (ids, [5, 6])):
        for sequence, hypothesis in zip(output.sequences, case.found(prompt, params), strict=True):
            assert sequence.tokens == prompt + hypothesis.ids
            assert sequence.text == tokenizer.decode(sequence.tokens)
            assert sequence.cum_logprob == pytest.approx(hypothesis.logprob)
            assert sequence.logprobs is not None
            assert len(sequence.logprobs) == len(hypothesis.ids)
    with pytest.raises(ValueError, match="beam_width must be at least 1, got 0"):
        BeamSearchParams(beam_width=0, max_tokens=8)
    with pytest.raises(ValueError, match="300 tokens"):
        llm.beam_search([[1] * 300], params)
    with pytest.raises(RuntimeError, match=r"half of the vocabulary, 337\."):
        llm.beam_search("a", BeamSearchParams(beam_width=300, max_tokens=8))
    assert not llm.engine.has_work
