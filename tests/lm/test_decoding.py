"""Stepwise decoding is the whole forward, for any prompts, chunks, and any rows selected, repeated, dropped and joined.

Tolerance 2e-5 in fp32: attention over a cache adds in another order than attention over a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import DecoderLM
from lm.attention import CausalAttend
from lm.search import pad
from lm.state import DecoderState


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def forced(model: DecoderLM, ids: list[int]) -> Tensor:
    """Logits [T, vocab] after each token of one sequence, by one forward over it."""
    positions = torch.arange(len(ids)).unsqueeze(0)
    return model.logits(model.hidden(torch.tensor([ids]), positions, CausalAttend(model.config.windows())))[0]


def sequence(length: int, seed: int) -> list[int]:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def test_steps_are_the_whole_forward(model: DecoderLM) -> None:
    ids = sequence(48, 0)  # to the end of the context
    expected = forced(model, ids)
    state = model.start(torch.tensor([ids[:5]]))
    assert state.first.tolist() == [ids[4]]
    for place in range(4, 48):
        logits, state = model.step(torch.tensor([[ids[place]]]), state)
        close(logits[0, 0], expected[place])
    with pytest.raises(ValueError, match="a sequence would have 49 tokens; the model's context is 48"):
        model.step(torch.tensor([[0]]), state)


@torch.no_grad()
def test_ragged_prompts_step_as_each_does_alone(model: DecoderLM) -> None:
    prompts = [sequence(length, seed) for seed, length in enumerate((1, 20, 7, 13))]
    state = model.start(*pad(prompts))
    tokens = state.first.unsqueeze(1)
    assert tokens.flatten().tolist() == [prompt[-1] for prompt in prompts]
    rows = [list(prompt) for prompt in prompts]
    for _ in range(6):
        logits, state = model.step(tokens, state)
        for row, ids in enumerate(rows):
            close(logits[row, -1], forced(model, ids)[-1])
        tokens = logits[:, -1].argmax(dim=-1, keepdim=True)
        for ids, token in zip(rows, tokens.flatten().tolist(), strict=True):
            ids.append(token)


chunks = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4), steps=chunks)
@pytest.mark.parametrize("name", ["qwen3", "windows", "gpt2"])
def test_rows_selected_and_joined_go_on_as_they_were(
    named: Callable[[str], DecoderLM], name: str, data: st.DataObject, lengths: list[int], steps: list[int]
) -> None:
    model = named(name)
    with torch.no_grad():
        known = [sequence(length, seed) for seed, length in enumerate(lengths)]
        state = model.start(*pad(known))
        fed = [ids[:-1] for ids in known]  # what the cache holds
        for number, size in enumerate(steps):
            keep = data.draw(st.lists(st.integers(0, len(fed) - 1), min_size=1, max_size=4), label="select")
            state = state.select(torch.tensor(keep))
            fed = [list(fed[row]) for row in keep]
            if data.draw(st.booleans(), label="join"):
                other = sequence(data.draw(st.integers(1, 12), label="length"), 90 + number)
                alone = model.start(torch.tensor([other]))
                front = data.draw(st.booleans(), label="in front")
                state = DecoderState.join([alone, state] if front else [state, alone])
                fed.insert(0 if front else len(fed), other[:-1])
            chunk = [sequence(size, 1000 * number + row) for row in range(len(fed))]
            logits, state = model.step(torch.tensor(chunk), state)
            for row, new in enumerate(chunk):
                fed[row] += new
                close(logits[row], forced(model, fed[row])[-size:])
            assert state.lengths.tolist() == [len(ids) for ids in fed]
