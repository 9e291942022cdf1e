"""Continuing prompts: where a row stops, that a batch is its rows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import DecoderLM, SamplingParams
from lm.search import generate, pad, stream

Named = Callable[[str], DecoderLM]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 3]]


def one_by_one(model: DecoderLM, prompt: list[int], tokens: int) -> list[int]:
    """Greedy by definition: the whole sequence through the model again for each token."""
    ids = list(prompt)
    for _ in range(tokens):
        logits, _ = model.step(torch.tensor([ids[-1:]]), model.start(torch.tensor([ids])))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["qwen3", "windows", "gpt2"])
@torch.no_grad()
def test_greedy_is_the_likeliest_token_each_time(named: Named, name: str) -> None:
    model = named(name)
    assert generate(model, PROMPTS, GREEDY) == [one_by_one(model, prompt, 20) for prompt in PROMPTS]


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    stops=st.sets(st.integers(0, 49), max_size=12),
    top_p=st.sampled_from([0.7, 1.0]),
)
def test_a_batch_that_loses_rows_is_its_rows_one_by_one(
    named: Named, prompts: list[list[int]], seed: int, stops: set[int], top_p: float
) -> None:
    """Rows end at different steps and leave; those that stay get the tokens that they would get alone."""
    model = named("qwen3")
    params = SamplingParams(temperature=1.0, top_p=top_p, max_tokens=12, seed=seed)
    together = generate(model, prompts, params, stops)
    for row, prompt in enumerate(prompts):
        assert [together[row]] == generate(model, [prompt], replace(params, seed=seed + row), stops)


def test_a_row_stops_at_its_stop_token_which_it_keeps(named: Named) -> None:
    model = named("gpt2")
    free = generate(model, [[1, 2]], SamplingParams(max_tokens=30, seed=5))[0]
    assert len(free) == 30
    stop = free[7]
    end = free.index(stop) + 1
    asked = SamplingParams(max_tokens=30, seed=5)
    assert generate(model, [[1, 2]], asked, [stop]) == [free[:end]]
    assert generate(model, [[1, 2]], replace(asked, stop_token_ids=(stop,))) == [free[:end]]
    assert generate(model, [[1, 2]], replace(asked, ignore_eos=True), [stop]) == [free]
    assert len(generate(model, [[1, 2]], replace(asked, min_tokens=end + 1), [stop])[0]) > end


def test_no_stop_token_is_legal_and_the_context_ends_the_row(named: Named) -> None:
    model = named("llama")
    params = SamplingParams(max_tokens=None, seed=1)
    outputs = generate(model, [[1], [1] * 47, [1] * 20], params)
    assert [len(output) for output in outputs] == [47, 1, 28]
    assert [len(output) for output in generate(model, [[1], [2, 3]], replace(params, max_tokens=1))] == [1, 1]


def test_tokens_come_step_by_step(named: Named) -> None:
    model = named("llama")
    steps = list(stream(model, [[1], [1] * 46], SamplingParams(max_tokens=4, seed=1)))
    assert [[row for row, _ in produced] for produced in steps] == [[0, 1], [0, 1], [0], [0]]
    assert [next(token for row, token in produced if row == 0) for produced in steps] == generate(
        model, [[1]], SamplingParams(max_tokens=4, seed=1)
    )[0]


def test_the_same_seed_is_the_same_text_and_none_is_another(named: Named) -> None:
    model = named("llama")
    seeded, free = SamplingParams(max_tokens=20, seed=3), SamplingParams(max_tokens=20)
    assert generate(model, PROMPTS, seeded) == generate(model, PROMPTS, seeded)
    assert generate(model, PROMPTS, seeded) != generate(model, PROMPTS, replace(seeded, seed=4))
    assert generate(model, PROMPTS, free) != generate(model, PROMPTS, free)
    before = torch.random.get_rng_state()
    generate(model, PROMPTS, free)
    assert torch.equal(before, torch.random.get_rng_state())  # a sample in the middle of training changes nothing there


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([[1], []], "prompt 1: the prompt is empty; it must hold at least one token."),
        ([[1] * 48], "prompt 0: the prompt has 48 tokens; the model's context of 48 leaves no room to continue it."),
    ],
)
def test_what_cannot_be_continued_is_refused(named: Named, prompts: list[list[int]], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        generate(named("llama"), prompts, GREEDY)
    assert str(refused.value) == sentence


def test_pad_puts_the_mask_where_the_ids_are() -> None:
    ids, mask = pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
