"""The decoder's forward: fused equals written out, nothing looks ahead, windows and documents bound what is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lm.linear
from lm import DecoderConfig, DecoderLM
from lm.attention import Attend, CausalAttend, ExplicitAttend
from lm.loss import IGNORE

Make = Callable[..., DecoderLM]
# Three documents in each row, cut at other places.
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 1 + [1] * 22 + [2], [0] * 12 + [1] * 6 + [2] * 6])


def hidden(model: DecoderLM, tokens: Tensor, documents: Tensor | None = None, kind: Any = CausalAttend) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.hidden(tokens, positions, kind(model.config.windows(), documents))


def batch_of(tokens: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
    """Next-token prediction, with a quarter of the targets not asked for."""
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) < 0.25] = IGNORE
    batch = {"tokens": tokens[:, :-1], "targets": targets}
    return batch if documents is None else batch | {"documents": documents[:, :-1]}


# ------------------------------------------------------------ against the written-out formula


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_the_fused_path_is_the_explicit_one(model: DecoderLM, tokens: Tensor, documents: Tensor | None) -> None:
    fused, explicit = hidden(model, tokens, documents), hidden(model, tokens, documents, ExplicitAttend)
    torch.testing.assert_close(fused, explicit, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_loss_and_gradients_are_cross_entropy_over_explicit_attention(
    model: DecoderLM, tokens: Tensor, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(tokens, documents)
    loss, count, _ = model(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    monkeypatch.setattr(lm.linear, "onednn_is_usable", lambda: False)
    logits = model.logits(hidden(model, batch["tokens"], batch.get("documents"), ExplicitAttend))
    expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
    expected.backward()
    assert int(count) == int((batch["targets"] != IGNORE).sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_recomputing_activations_changes_no_bit(model: DecoderLM, tokens: Tensor) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        model(batch_of(tokens))[0].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.recompute = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


# ------------------------------------------------------------ what a token can see


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("place", [0, 1, 7, 16, 23])
@torch.no_grad()
def test_a_token_changes_no_bit_before_it(
    model: DecoderLM, tokens: Tensor, place: int, documents: Tensor | None
) -> None:
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 50
    before, after = (model.logits(hidden(model, t, documents)) for t in (tokens, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])  # and it does change its own


@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
@torch.no_grad()
def test_a_window_is_exactly_as_long_as_it_says(make: Make, tokens: Tensor, positions: str) -> None:
    window, place = 5, 8
    model = make(layers=1, window=window, window_pattern="S", positions=positions)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 50
    before, after = hidden(model, tokens), hidden(model, changed)
    differs = (before != after).any(dim=(0, 2))
    assert differs.nonzero().flatten().tolist() == list(range(place, place + window))


@torch.no_grad()
def test_windows_add_up_over_layers(make: Make, tokens: Tensor) -> None:
    model = make(layers=3, window=3, window_pattern="S")
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50
    differs = (hidden(model, tokens) != hidden(model, changed)).any(dim=(0, 2))
    assert differs.nonzero().flatten().tolist() == list(range(4, 4 + 3 * 2 + 1))


@torch.no_grad()
def test_a_window_that_holds_everything_is_no_window(make: Make, tokens: Tensor) -> None:
    whole, wide = make(), make(window=24, window_pattern="S")
    assert torch.equal(hidden(whole, tokens), hidden(wide, tokens))


@torch.no_grad()
def test_a_packed_document_is_the_document_alone(model: DecoderLM, tokens: Tensor) -> None:
    packed = hidden(model, tokens, DOCUMENTS)
    for row in range(3):
        for document in range(3):
            places = (DOCUMENTS[row] == document).nonzero().flatten()
            attend = CausalAttend(model.config.windows())
            alone = model.hidden(tokens[row, places].unsqueeze(0), places.unsqueeze(0), attend)
            torch.testing.assert_close(packed[row, places], alone[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_only_the_distance_counts_under_rotary(make: Make, tokens: Tensor) -> None:
    model = make(qk_norm=True)
    attend: Attend = CausalAttend(model.config.windows())
    here, there = (model.hidden(tokens, torch.arange(24).unsqueeze(0) + shift, attend) for shift in (0, 20))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------ training mode


@torch.no_grad()
def test_dropout_is_off_outside_training(make: Make, tokens: Tensor) -> None:
    plain, dropping = make(), make(dropout=0.5)
    assert torch.equal(hidden(plain, tokens), hidden(dropping, tokens))
    dropping.train()
    first, second = hidden(dropping, tokens), hidden(dropping, tokens)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = hidden(dropping, tokens)
    torch.manual_seed(3)
    assert torch.equal(first, hidden(dropping, tokens))


@pytest.mark.parametrize("size", [{}, {"width": 128, "layers": 6, "vocab_size": 2000}], ids=["small", "larger"])
@torch.no_grad()
def test_an_untrained_model_knows_nothing(config: DecoderConfig, size: dict[str, int]) -> None:
    """Its loss is that of a guess, ln(vocabulary), within 0.05 nats on tokens without any order."""
    options = {field.name: getattr(config, field.name) for field in fields(config)} | size
    if size:
        options |= {"head_dim": None, "mlp_width": None}
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(**options))
    tokens = torch.randint(model.config.vocab_size, (64, 25), generator=torch.Generator().manual_seed(4))
    loss, count, _ = model({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    assert float(loss / count) == pytest.approx(math.log(model.config.vocab_size), abs=0.05)


def test_bf16_autocast_trains_on_the_same_loss_within_its_precision(model: DecoderLM, tokens: Tensor) -> None:
    exact, count, _ = model(batch_of(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = model(batch_of(tokens))
    loss.backward()
    assert loss.dtype == torch.float32
    assert float((loss - exact).detach().abs() / count) < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_model_in_bf16_runs_whole(model: DecoderLM, tokens: Tensor) -> None:
    with torch.no_grad():
        exact, count, _ = model(batch_of(tokens))
        loss, _, _ = model.to(torch.bfloat16)(batch_of(tokens))
    assert float((loss - exact).abs() / count) < 0.1
