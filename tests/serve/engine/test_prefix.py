"""An answer is the same to the bit whether its beginning was computed for it, found in the cache, or lost."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import DecoderLM, SamplingParams
from lm.tokenizer import Tokenizer
from serve.engine.draft import Speculation
from serve.engine.engine import Engine
from serve.engine.messages import Add
from serve.engine.prefix import block_hash, root
from serve.engine.served import ServedLM, serve_model

STEM = [(7 * i) % 300 for i in range(40)]


def prompts(count: int) -> list[list[int]]:
    """Beginnings in common, of various lengths; some are equal."""
    return [STEM[: 8 + 11 * (i % 4)] + [10 + i % 5] * (i % 3) for i in range(count)]


def answers(engine: Engine, given: list[list[int]], *, apart: int = 0, salts: int = 1) -> list[Any]:
    """Tokens and their log-probabilities, of requests that come so many steps apart."""
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
    made: dict[str, list[Any]] = {}

    def step() -> None:
        for output in engine.step().outputs:
            assert output.error is None
            made[output.id] += output.logprobs or []
        engine.blocks.check([request.table for request in engine.scheduler])

    for i, prompt in enumerate(given):
        made[str(i)] = []
        engine.add(Add(str(i), prompt, params, 0.0, priority=-i % 3, cache_salt=str(i % salts) if salts > 1 else None))
        for _ in range(apart):
            step()
    while engine.has_work:
        step()
    assert engine.blocks.free == engine.blocks.count - 1
    return list(made.values())


@pytest.fixture(scope="module")
def served(model: DecoderLM) -> ServedLM:
    made = serve_model(deepcopy(model))
    if not made.invariant:
        pytest.skip("only through the kernels are bits the same")
    return made


@pytest.fixture(scope="module")
def expected(served: ServedLM, tokenizer: Tokenizer) -> list[Any]:
    """Each alone in an engine that keeps nothing."""
    engine = Engine(served, tokenizer, blocks=100, prefix_caching=False, max_num_seqs=1)
    return answers(engine, prompts(8))


@given(
    size=st.sampled_from([16, 32]),
    blocks=st.integers(6, 30),
    budget=st.sampled_from([5, 33, 2048]),
    seats=st.integers(1, 8),
    apart=st.integers(0, 6),
    salts=st.integers(1, 2),
    policy=st.sampled_from(["fcfs", "priority"]),
    tokens=st.integers(0, 3),
)
@settings(max_examples=8, deadline=None)
def test_caching_changes_no_bit_of_any_answer(
    served: ServedLM,
    tokenizer: Tokenizer,
    expected: list[Any],
    size: int,
    blocks: int,
    budget: int,
    seats: int,
    apart: int,
    salts: int,
    policy: str,
    tokens: int,
) -> None:
    engine = Engine(
        served,
        tokenizer,
        max_model_len=80,
        blocks=blocks,
        block_size=size,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        policy=policy,
        speculation=Speculation(tokens, 3, 1) if tokens else None,
    )
    assert answers(engine, prompts(8), apart=apart, salts=salts) == expected
    if blocks > 20 and salts == 1:
        assert engine.scheduler.prefixes.hits > 0


@pytest.mark.parametrize("error", [MemoryError, lambda: torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_lack_of_memory_costs_time_alone(
    served: ServedLM, tokenizer: Tokenizer, expected: list[Any], error: Callable[[], Exception]
) -> None:
    engine = Engine(served, tokenizer, blocks=100)
    run, steps = engine.runner.run, 0

    def runs_out(shares: Any) -> Any:
        nonlocal steps
        steps += 1
        if len(shares) > 2 and steps % 3 == 0:
            raise error()
        return run(shares)

    engine.runner.run = runs_out  # type: ignore[method-assign]
    assert answers(engine, prompts(8), apart=1) == expected
    assert engine.scheduler.seats < 8
    assert engine.scheduler.preemptions > 0


def test_the_hash_is_a_chain_of_sha256_from_the_salt() -> None:
    """Written out: a cache that outlives a process, or another's, would have to agree on it."""
    tokens = [1, 2, 2**40]
    first = hashlib.sha256(hashlib.sha256(b"salt").digest() + struct.pack("<3q", *tokens)).digest()
    assert block_hash(root("salt"), tokens) == first
    assert block_hash(first, [5]) == hashlib.sha256(first + struct.pack("<q", 5)).digest()
    assert root(None) == bytes(32) != root("")
