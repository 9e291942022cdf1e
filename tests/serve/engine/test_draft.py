"""Speculation changes what is computed together, never what is drawn; proposals are what followed last time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import DecoderLM, SamplingParams
from lm.params import RepetitionDetectionParams
from lm.tokenizer import Tokenizer
from serve.engine.draft import PromptLookup, Speculation
from serve.engine.engine import Engine
from serve.engine.messages import Add, Output, Stats
from serve.engine.served import ServedLM, serve_model

SPECULATION = Speculation(tokens=4, longest=3, shortest=1)


@pytest.fixture(scope="module")
def served(model: DecoderLM) -> ServedLM:
    """The model as a server has it: what a token gets does not depend on how many are computed with it."""
    return serve_model(deepcopy(model))


def reference(tokens: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """What `propose` gives, found by going through the sequence."""
    for size in range(longest, shortest - 1, -1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[-size:]:
                whole = list(tokens)
                for _ in range(count):
                    whole.append(whole[begin + size + len(whole) - len(tokens)])
                return whole[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=30),
    split=st.integers(0, 30),
    count=st.integers(0, 5),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_what_followed_last_time_is_proposed(tokens: list[int], split: int, count: int, sizes: tuple[int, int]) -> None:
    longest, shortest = max(sizes), min(sizes)
    prompt, output = tokens[:split], tokens[split:]
    lookup = PromptLookup(prompt, longest, shortest)
    for length in range(len(output) + 1):
        lookup.follow(output[:length])
        assert lookup.propose(count) == reference(prompt + output[:length], count, longest, shortest)


def run(engine: Engine, adds: Sequence[Add]) -> tuple[dict[str, list[Output]], Stats]:
    """All outputs by id, and the sums of what the steps count."""
    for add in adds:
        engine.add(add)
    outputs: dict[str, list[Output]] = {add.id: [] for add in adds}
    total = Stats()
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            assert output.error is None
            outputs[output.id].append(output)
        for name in ("drafts", "drafted", "accepted", "generated", "preemptions"):
            setattr(total, name, getattr(total, name) + getattr(step.stats, name))
        counts = step.stats.accepted_at
        assert sum(counts) == step.stats.accepted
        assert counts == sorted(counts, reverse=True)  # a token holds only where those before it do
        engine.blocks.check([request.table for request in engine.scheduler])
    assert engine.blocks.free == engine.blocks.count - 1
    return outputs, total


def joined(outputs: Sequence[Output]) -> tuple:
    """All that a client sees of a sequence, however many steps it came in."""
    return (
        "".join(output.text for output in outputs),
        [token for output in outputs for token in output.tokens],
        [entry for output in outputs for entry in output.logprobs or []],
        outputs[-1].finish_reason,
        outputs[-1].stop_reason,
    )


FEW = (40, 41, 42, 43)  # tokens; a model of random weights repeats itself only where it has no choice
SETTINGS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"min_tokens": 12, "stop_token_ids": FEW[:2]},
    {"repetition_penalty": 1.3, "logprobs": 0},
    {"frequency_penalty": 0.4, "presence_penalty": -0.3},
    {"frequency_penalty": -0.5, "logit_bias": {41: 3.0, 42: -2.0}, "bad_words": (" q",)},
    {"stop_token_ids": FEW[3:]},
    {"repetition_detection": RepetitionDetectionParams(max_pattern_size=4, min_count=3)},
]


def requests(sampled: dict[str, Any]) -> list[Add]:
    """Prompts that repeat themselves, so that much is proposed, under all that looks at the output so far."""
    drawn = random.Random(1)
    adds = []
    for i, changes in enumerate(SETTINGS):
        words = [drawn.choice(FEW) for _ in range(3 + i)]
        params = SamplingParams(max_tokens=40, ignore_eos=True, allowed_token_ids=FEW, **sampled, **changes)
        adds.append(Add(str(i), words * 3, params, 0.0))
    return adds


@pytest.mark.parametrize(
    "sampled",
    [{"temperature": 0.0}, {"temperature": 0.7, "seed": 3}, {"temperature": 0.3, "top_p": 0.9, "top_k": 9, "seed": 4}],
    ids=str,
)
@pytest.mark.parametrize(("blocks", "budget"), [(200, 2048), (30, 40)])
def test_the_answers_are_the_same_with_speculation_and_without(
    served: ServedLM, tokenizer: Tokenizer, sampled: dict[str, Any], blocks: int, budget: int
) -> None:
    """To the bit, log-probabilities and all."""
    if not served.invariant:
        pytest.skip("without the compiled kernels, sums may come in another order in a larger step")
    adds = requests(sampled)

    def answers(speculation: Speculation | None) -> tuple[dict[str, tuple], Stats]:
        engine = Engine(
            served,
            tokenizer,
            blocks=blocks,
            block_size=16,
            max_model_len=100,
            max_num_batched_tokens=budget,
            speculation=speculation,
        )
        outputs, total = run(engine, adds)
        return {id: joined(each) for id, each in outputs.items()}, total

    plain, none = answers(None)
    fast, some = answers(SPECULATION)
    assert (none.drafts, none.drafted, none.accepted) == (0, 0, 0)
    assert some.drafted >= some.drafts > 0
    assert 0 < some.accepted <= some.drafted
    assert fast == plain
    assert some.generated == none.generated


def test_a_stop_inside_what_was_accepted_ends_there(served: ServedLM, tokenizer: Tokenizer) -> None:
    """A sequence that goes round has all of a draft accepted; limits and stops cut it at the same place as without."""

    def answer(**changes: Any) -> list[Output]:
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, allowed_token_ids=FEW, frequency_penalty=-2.0, **changes
        )
        engine = Engine(served, tokenizer, blocks=200, speculation=SPECULATION)
        return run(engine, [Add("x", list(FEW) * 4, params, 0.0)])[0]["x"]

    whole = answer(max_tokens=30)
    assert max(len(output.tokens) for output in whole) == 1 + SPECULATION.tokens
    text, ids, *_ = joined(whole)
    for length in range(1, 30):
        assert joined(answer(max_tokens=length))[1] == ids[:length]
    for stop in (text[7:9], text[-2:]):
        cut = joined(answer(max_tokens=30, stop=stop))
        assert cut[0] == text[: text.find(stop)]
        assert cut[3:] == ("stop", stop)
