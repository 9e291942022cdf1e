"""DecoderConfig: what it counts is what is there, and what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import ConfigError, DecoderConfig, DecoderLM
from lm.attention import may_attend
from lm.config import ACTIVATIONS, BIASES, NORMS, POSITIONS, decoder_config

GOOD: dict[str, Any] = {"vocab_size": 50, "context": 32, "layers": 2, "width": 32, "heads": 4}


@st.composite
def shapes(draw: st.DrawFn) -> DecoderConfig:
    """Any legal small shape."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, half = kv_heads * group, draw(st.integers(1, 4))
    window = draw(st.none() | st.integers(1, 9))
    pattern = draw(st.text("SL", min_size=1, max_size=4).filter(lambda text: ("S" in text) == (window is not None)))
    return DecoderConfig(
        vocab_size=draw(st.integers(1, 40)),
        context=draw(st.integers(1, 20)),
        layers=draw(st.integers(1, 3)),
        width=heads * 2 * half,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.none() | st.sampled_from([2, 6])),
        mlp_width=draw(st.none() | st.integers(1, 30)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        norm=draw(st.sampled_from(NORMS)),
        positions=draw(st.sampled_from(POSITIONS)),
        qk_norm=draw(st.booleans()),
        window=window,
        window_pattern=pattern,
        tie_embeddings=draw(st.booleans()),
        bias=draw(st.booleans() | st.sampled_from(sorted(BIASES))),
    )


@settings(max_examples=80, deadline=None)
@given(shapes())
def test_parameters_are_counted_as_they_are(config: DecoderConfig) -> None:
    counted = {"embedding": 0, "layers": 0, "head": 0}
    for name, parameter in DecoderLM(config).named_parameters():
        part = "embedding" if name.startswith("embed") else "head" if name.startswith("lm_head") else "layers"
        counted[part] += parameter.numel()
    assert config.parameters() == counted | {"total": sum(counted.values())}


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(1, 20))
def test_flops_are_six_a_product_and_twelve_a_pair_that_attends(config: DecoderConfig, context: int) -> None:
    model = DecoderLM(config)
    inside = sum(p.numel() for name, p in model.layers.named_parameters() if name.endswith("proj.weight"))
    places = torch.arange(context)
    pairs = sum(int(may_attend(places, places, window).sum()) for window in config.windows())
    expected = 6 * (inside + config.vocab_size * config.width) + 12 * config.heads * config.dim * pairs / context
    assert config.flops_per_token(context) == pytest.approx(expected, abs=1)


def test_a_reader_always_sees_numbers() -> None:
    config = DecoderConfig(**GOOD)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (4, 8, 128)  # 8/3 x 32, up to a multiple of 64
    assert DecoderConfig(**GOOD, activation="gelu").mlp_width == 128
    assert DecoderConfig(**GOOD | {"layers": 5}, window=8, window_pattern="SSL").windows() == [8, 8, None, 8, 8]


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ({"width": 0}, ["width is 0; it must be at least 1."]),
        ({"layers": 2.5}, ["layers is 2.5; it must be int."]),
        ({"heads": True}, ["heads is True; it must be int."]),
        ({"heads": "4"}, ["heads is '4'; it must be int."]),
        ({"heads": 5}, ["heads is 5; it must divide width 32, or head_dim must be given."]),
        ({"kv_heads": 3}, ["kv_heads is 3; it must divide heads 4."]),
        ({"kv_heads": 0}, ["kv_heads is 0; it must be at least 1, or left out."]),
        ({"activation": "relu"}, ["activation is 'relu'; it must be one of swiglu, gelu, gelu_tanh, relu2."]),
        ({"norm": "batch"}, ["norm is 'batch'; it must be one of rms, layer."]),
        ({"positions": "alibi"}, ["positions is 'alibi'; it must be one of rotary, learned, sinusoidal, none."]),
        ({"head_dim": 7}, ["positions is 'rotary'; rotary needs an even head_dim, and it is 7."]),
        (
            {"width": 33, "heads": 3, "positions": "sinusoidal"},
            ["width is 33; sinusoidal positions need an even width."],
        ),
        ({"window": 4}, ["window is 4; window_pattern must name the layers that slide with an S."]),
        ({"window_pattern": "SL"}, ["window_pattern is 'SL'; its S layers need window, in tokens."]),
        (
            {"window_pattern": "SX", "window": 4},
            ["window_pattern is 'SX'; it must be made of S (sliding) and L (sees everything)."],
        ),
        ({"window_pattern": ""}, ["window_pattern is ''; it must be made of S (sliding) and L (sees everything)."]),
        ({"softcap": 0.0}, ["softcap is 0.0; it must be positive, or left out."]),
        ({"softcap": float("inf")}, ["softcap is inf; it must be positive, or left out."]),
        ({"rope_theta": -1}, ["rope_theta is -1; it must be positive."]),
        ({"rope_theta": float("nan")}, ["rope_theta is nan; it must be positive."]),
        ({"norm_eps": 0}, ["norm_eps is 0; it must lie between 0 and 1."]),
        ({"dropout": 1.0}, ["dropout is 1.0; it must be at least 0 and below 1."]),
        # Everything that is wrong is said at once.
        (
            {"width": 0, "norm": "x", "dropout": -0.1},
            [
                "width is 0; it must be at least 1.",
                "norm is 'x'; it must be one of rms, layer.",
                "dropout is -0.1; it must be at least 0 and below 1.",
            ],
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], sentences: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        DecoderConfig(**(GOOD | change))
    assert refused.value.problems == sentences


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"n_heads is not a key of a decoder; the keys are .*\bheads\b"):
        decoder_config(GOOD | {"n_heads": 4})
    assert decoder_config(GOOD) == DecoderConfig(**GOOD)
