"""Held-out loss: the mean over every token but the first, however it is cut into batches and shared among ranks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm import DecoderConfig, DecoderLM
from lm.attention import ExplicitAttend
from train import evaluate as evaluation
from train.data import Tokens
from train.evaluate import Held, evaluate

CONTEXT = 16
IDS = np.random.default_rng(0).integers(1, 40, 16 * 9 + 6).astype(np.uint16)
IDS[[3, 20, 21, 60, 100]] = 0  # ends of text


@pytest.fixture
def model() -> DecoderLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 40, "context": CONTEXT, "layers": 2, "width": 32, "heads": 4}
    return DecoderLM(DecoderConfig(**shape, dropout=0.3))


def rank(number: int = 0, world: int = 1) -> Any:
    """As much of a Launch as is asked of it; its sum is its own part."""
    accelerator = SimpleNamespace(autocast=nullcontext)
    return SimpleNamespace(
        rank=number,
        world=world,
        device=torch.device("cpu"),
        accelerator=accelerator,
        sum=lambda values: values,
        check=lambda: None,
    )


def by_definition(model: DecoderLM, count: int, masked: bool = False) -> float:
    """Window after window of 16 inputs; each target from what stands before it in its window (and document)."""
    model.eval()
    total = 0.0
    for start in range(0, count, CONTEXT):
        ids = torch.tensor(IDS[start : min(start + CONTEXT, count) + 1].astype(np.int64))
        inputs, targets = ids[:-1].unsqueeze(0), ids[1:]
        documents = (inputs == 0).cumsum(1) if masked else None
        attend = ExplicitAttend(model.config.windows(), documents)
        with torch.no_grad():
            logits = model.logits(model.hidden(inputs, torch.arange(len(targets)).unsqueeze(0), attend))[0]
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / count


@pytest.mark.parametrize("logits", [1, 40 * CONTEXT * 2, 1 << 23], ids=["row by row", "two rows", "all at once"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
def test_every_token_but_the_first_counts_once(
    model: DecoderLM, logits: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LOGITS", logits)
    split = Tokens([IDS[:50], IDS[50:]], bytes_total=3 * len(IDS))
    held = evaluate(model, rank(), split, context=CONTEXT, eos_id=0, document_mask=masked)
    assert held.tokens == len(IDS) - 1
    assert held.loss == pytest.approx(by_definition(model, len(IDS) - 1, masked), rel=1e-5)
    assert held.bits_per_byte == pytest.approx(held.loss / math.log(2) / 3)


@pytest.mark.parametrize("limit", [1, 15, 16, 40, 10_000])
def test_a_limit_stops_after_as_many_targets(model: DecoderLM, limit: int) -> None:
    held = evaluate(model, rank(), Tokens([IDS]), context=CONTEXT, limit=limit)
    assert held.tokens == min(limit, len(IDS) - 1)
    assert held.loss == pytest.approx(by_definition(model, held.tokens), rel=1e-5)
    assert held.bits_per_byte is None


@pytest.mark.parametrize("world", [2, 3, 16])
def test_ranks_share_the_batches_and_run_equally_many(
    model: DecoderLM, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LOGITS", 1)  # a row a batch: ten batches
    sums, calls = [], []
    forward = DecoderLM.forward
    monkeypatch.setattr(DecoderLM, "forward", lambda self, batch: calls.append(1) or forward(self, batch))
    for number in range(world):
        here = rank(number, world)
        here.sum = lambda values: sums.append(list(values)) or [1.0, 1.0]
        before = len(calls)
        evaluate(model, here, Tokens([IDS]), context=CONTEXT)
        assert len(calls) - before == -(-10 // world)
    loss, tokens = (sum(values) for values in zip(*sums, strict=True))
    assert tokens == len(IDS) - 1
    assert loss / tokens == pytest.approx(by_definition(model, len(IDS) - 1), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_no_random_number_is_drawn(model: DecoderLM, training: bool) -> None:
    model.train(training)
    before = torch.random.get_rng_state()
    first = evaluate(model, rank(), Tokens([IDS]), context=CONTEXT)
    assert isinstance(first, Held)
    assert first == evaluate(model, rank(), Tokens([IDS]), context=CONTEXT)  # no dropout
    assert model.training is training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_two_tokens_are_enough(model: DecoderLM) -> None:
    assert evaluate(model, rank(), Tokens([IDS[:2]]), context=CONTEXT).tokens == 1
