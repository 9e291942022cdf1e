"""Which attention kernel ran, and that FlexAttention's masks are the explicit formula's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lm import DecoderLM, flex
from lm.attention import explicit_attention, may_attend

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
WRITTEN_OUT = "aten::_scaled_dot_product_attention_math"


def operators(run: Callable[[], object]) -> dict[str, int]:
    """How often each operator was called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return {event.key: event.count for event in seen.key_averages()}


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_heads": 2, "qk_norm": True}, {"window": 4, "window_pattern": "SL"}],
    ids=["full", "grouped", "windows"],
)
def test_training_runs_flash_attention_in_both_directions(make, tokens: Tensor, options: dict) -> None:
    model: DecoderLM = make(**options).train()
    counts = operators(lambda: model({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})[0].backward())
    assert counts.get(FORWARD) == model.config.layers
    assert counts.get(BACKWARD) == model.config.layers
    assert WRITTEN_OUT not in counts


def test_flash_attention_runs_in_half_precision_too(make, tokens: Tensor) -> None:
    model: DecoderLM = make(kv_heads=2).train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = model({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
        loss.backward()

    counts = operators(step)
    assert counts.get(FORWARD) == counts.get(BACKWARD) == model.config.layers
    assert WRITTEN_OUT not in counts


@torch.no_grad()
def test_decoding_runs_flash_attention(make, tokens: Tensor) -> None:
    model: DecoderLM = make(kv_heads=2)
    state = model.start(tokens)
    counts = operators(lambda: model.step(tokens[:, :1], state))
    assert counts.get(FORWARD) == model.config.layers
    assert WRITTEN_OUT not in counts


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_explicit_formula(window: int | None, packed: bool) -> None:
    """Forward only: torch has no backward of it on a CPU."""
    generator = torch.Generator().manual_seed(6)
    batch, length = 2, 150  # over one of its blocks of 128, and no multiple
    q = torch.randn(batch, length, 4, 16, generator=generator)
    k, v = (torch.randn(batch, length, 2, 16, generator=generator) for _ in "kv")
    documents = torch.randint(2, (batch, length), generator=generator).cumsum(1) // 20 if packed else None

    mask = flex.block_mask(batch, length, window, documents, q.device)
    out = flex.flex_causal_attention(q, k, v, mask)
    places = torch.arange(length)
    expected, _ = explicit_attention(q, k, v, may_attend(places, places, window, documents, documents))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"window": 20, "window_pattern": "S"}, {}], ids=["window", "documents"])
def test_on_a_gpu_the_compiled_flex_attention_trains_as_the_cpu_does(make, options: dict) -> None:
    tokens = torch.randint(50, (2, 49), generator=torch.Generator().manual_seed(7))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    if not options:
        batch["documents"] = (torch.arange(48) // 13).expand(2, 48).contiguous()
    here, there = make(**options), make(**options).cuda()
    loss, _ = here(batch)
    other, _ = there({name: tensor.cuda() for name, tensor in batch.items()})
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other.cpu(), rtol=1e-3, atol=1e-3)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=2e-2, atol=2e-2)
