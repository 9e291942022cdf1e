"""The paper's sizes by arithmetic, against the modules; and what a config refuses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.rnnsearch import RNNSearch
from lm.rnnsearch_config import RNNSearchConfig

TINY: dict[str, Any] = {"vocab_size": 11, "context": 9, "start_id": 1, "hidden": 6, "embedding": 5, "maxout": 4}


def test_the_paper_has_80_million_parameters() -> None:
    """n = 1000, m = 620, l = 500, n' = 1000 (appendix A.2.3), 30,000 words a side, no biases."""
    counts = RNNSearchConfig(vocab_size=30_000, context=50, start_id=1, bias=False).parameters()
    assert counts == {
        "embedding": 37_200_000,
        "encoder": 9_720_000,
        "decoder": 10_860_000 + 1_000_000,  # and W_s
        "alignment": 3_001_000,
        "readout": 3_620_000,
        "head": 15_000_000,
        "total": 80_401_000,
    }
    assert RNNSearchConfig(vocab_size=30_000, context=50, start_id=1).parameters()["total"] == 80_401_000 + 12_000


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    bias=st.booleans(),
    share=st.booleans(),
    fixed=st.booleans(),
    target=st.sampled_from([None, 7]),
)
def test_the_module_has_what_the_arithmetic_says(
    sizes: list[int], bias: bool, share: bool, fixed: bool, target: int | None
) -> None:
    names = ("hidden", "embedding", "maxout", "alignment", "vocab_size")
    options = TINY | dict(zip(names, sizes, strict=True)) | {"bias": bias, "share_embeddings": share, "start_id": 0}
    options |= {"fixed_context": fixed, "target_vocab_size": None if share else target}
    if fixed:
        del options["alignment"]
    config = RNNSearchConfig(**options)
    with torch.device("meta"):
        model = RNNSearch(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters()["total"]
    assert RNNSearchConfig(**asdict(config)) == config


def test_flops_are_those_of_the_products() -> None:
    """Counted by hand at n = 6, m = 5, l = 4, n' = 3 over 11 words, 8 source tokens for 2 target tokens."""
    config = RNNSearchConfig(**TINY, alignment=3)
    reading = 8 * (2 * 3 * (6 * 5 + 6 * 6) + 3 * 12)  # both directions, U_a
    writing = 2 * (3 * (6 * 5 + 6 * 6 + 6 * 12) + 3 * 6 + 8 * (6 + 5 + 12) + 11 * 4) + 6 * 6  # unit, W_a, output; W_s
    meeting = 8 * 2 * (3 + 12)  # v^T tanh, and the mean of annotations of 12 numbers
    assert 2 * config.flops_per_token(8, 2) == 6 * (reading + writing + meeting)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hidden": 0}, "hidden is 0; it must be at least 1."),
        ({"alignment": 0}, "alignment is 0; it must be at least 1, or left out."),
        ({"readout": "next"}, "readout is 'next'; it must be one of previous, current."),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1."),
        ({"start_id": 11}, "start_id is 11; it must be a target token, of 11, from 0."),
        ({"start_id": 8, "target_vocab_size": 8}, "start_id is 8; it must be a target token, of 8, from 0."),
        (
            {"fixed_context": True, "alignment": 4},
            "alignment is 4; it must be left out, for fixed_context aligns nothing.",
        ),
        (
            {"share_embeddings": True, "target_vocab_size": 8},
            "target_vocab_size is 8; it must be vocab_size, 11, for share_embeddings makes both tables one.",
        ),
        ({"maxout": "4"}, "maxout is '4'; it must be int."),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RNNSearchConfig(**TINY | options)
    assert refusal.value.problems == [sentence]
