"""Scaled rotary positions: transformers' frequencies, within and beyond the original length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm import ConfigError, DecoderConfig, DecoderLM
from lm.positions import ROWS, rotary_frequencies, rotary_table, rotate

SHAPE: dict[str, Any] = {"vocab_size": 50, "layers": 2, "width": 32, "heads": 2, "context": 128}
ORIGINAL = 32
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3 | {"original_max_position_embeddings": ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 0.7},
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
]
IDS = [scaling["rope_type"] + "-" + str(number) for number, scaling in enumerate(SCALINGS)]


def theirs(scaling: dict[str, Any], theta: float, head_dim: int, context: int, length: int) -> tuple[Any, float]:
    """transformers' frequencies for a sequence of `length` tokens."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=length)


@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
@pytest.mark.parametrize("head_dim", [4, 16, 64])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_are_transformers(scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    context = 128
    ours, attention = rotary_frequencies(head_dim, theta, scaling, context)
    expected, factor = theirs(scaling, theta, head_dim, context, context)
    torch.testing.assert_close(ours.float(), expected, rtol=2e-6, atol=0)
    assert attention == pytest.approx(factor)


def test_dynamic_is_that_of_a_sequence_as_long_as_the_context() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    ours, _ = rotary_frequencies(16, 1e4, scaling, 128)
    expected, _ = theirs({"rope_type": "dynamic", "factor": 4.0}, 1e4, 16, ORIGINAL, 128)
    torch.testing.assert_close(ours.float(), expected, rtol=2e-6, atol=0)
    within, _ = rotary_frequencies(16, 1e4, scaling, ORIGINAL)
    assert torch.equal(within, rotary_frequencies(16, 1e4, None, ORIGINAL)[0])


@given(
    scaling=st.sampled_from(SCALINGS),
    factor=st.floats(1, 64),
    original=st.integers(2, 10_000),
    theta=st.floats(2, 1e7),
    half=st.integers(2, 64),
)
def test_frequencies_are_transformers_for_any_parameters(
    scaling: dict[str, Any], factor: float, original: int, theta: float, half: int
) -> None:
    scaling = scaling | {"factor": factor}
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = original
    ours, attention = rotary_frequencies(2 * half, theta, scaling, 4 * original)
    expected, times = theirs(scaling, theta, 2 * half, 4 * original, 4 * original)
    # fp32 over there: what is left of a difference of two near numbers (the ramps) is known to 1e-5
    torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-9)
    assert attention == pytest.approx(times)


@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
def test_logits_are_transformers_beyond_the_original_length(
    scaling: dict[str, Any], make: Callable[..., DecoderLM], tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    from lm.attention import CausalAttend
    from lm.pretrained import load, save

    model = make(**SHAPE, rope_scaling=scaling)
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").config == model.config
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.randint(50, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.hidden(tokens, torch.arange(128).unsqueeze(0), CausalAttend(model.config.windows()))
        torch.testing.assert_close(model.logits(hidden), other(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_table_is_the_formula_row_by_row() -> None:
    table = rotary_table(ROWS + 3, 8, 1e4)
    for position in (0, 1, ROWS - 1, ROWS, ROWS + 2):
        angles = position * 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        assert torch.equal(table[position, 0], torch.cat((angles.cos(), angles.cos())).float())
        assert torch.equal(table[position, 1], torch.cat((-angles.sin(), angles.sin())).float())


def test_a_scaled_rotation_has_its_own_gradient() -> None:
    """Yarn's factor makes it more than a rotation: the way back must carry it, too."""
    table = rotary_table(5, 8, 1e4, scaling=SCALINGS[3]).double()
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))


def test_layers_without_rotation_do_not_see_positions(make: Callable[..., DecoderLM]) -> None:
    config = make(layers=4, rope_pattern="RRRN").config
    assert config.rotates() == [True, True, True, False]
    model = make(rope_pattern="N")
    tokens = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(1))
    from lm.attention import CausalAttend

    attend = CausalAttend(model.config.windows())
    here, elsewhere = (model.hidden(tokens, torch.arange(9).unsqueeze(0) + shift, attend) for shift in (0, 7))
    assert torch.equal(here, elsewhere)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "rope_type is 'longrope'; the supported ones are default, linear, dynamic, llama3, yarn.",
        ),
        ({"rope_scaling": {}}, "rope_type is None; the supported ones are default, linear, dynamic, llama3, yarn."),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type is ['yarn']; the supported ones are default, "),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be keys with their values or left out."),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear lacks factor."),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
            "rope_scaling.factor is '4'; it must be a number.",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5; it must be at least 1"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4, "beta_fast": 1}},
            "rope_scaling has beta_fast, which linear does not know; its keys are factor.",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "rope_scaling.low_freq_factor is 4.0; it must be below high_freq_factor, 4.0.",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 1}},
            "rope_scaling.truncate is 1; it must be true or false.",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_theta": 1.0},
            "rope_theta is 1.0; yarn needs it above 1.",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4}, "positions": "learned"},
            "it belongs to rotary, and positions is learned.",
        ),
        ({"rope_pattern": "RX"}, "rope_pattern is 'RX'; it must be made of R (rotates) and N (does not)."),
        ({"rope_pattern": "N", "positions": "none"}, "rope_pattern is 'N'; it belongs to rotary, and positions is "),
        ({"bias": "some"}, "bias is 'some'; it must be true, false or one of none, qkv, attention, mlp, all."),
        ({"bias": 1}, "bias is 1; it must be bool or str."),
        ({"context": 2**25}, "context is 33554432; it must be at most 16777216."),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        DecoderConfig(**(SHAPE | change))
    (problem,) = refused.value.problems
    assert sentence in problem


def test_scaling_is_complete_for_a_reader() -> None:
    config = DecoderConfig(**SHAPE, rope_scaling={"rope_type": "yarn", "factor": 4, "beta_fast": None})
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}
    assert DecoderConfig(**SHAPE, rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert {DecoderConfig(**SHAPE, bias=bias).bias for bias in (True, "all")} == {"all"}
    assert {DecoderConfig(**SHAPE, bias=bias).bias for bias in (False, "none")} == {"none"}
    assert hash(config) == hash(DecoderConfig(**SHAPE))
