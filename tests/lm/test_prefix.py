"""Source and target as one sequence: no holes, no loss on the source, and who sees whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.attention import may_attend
from lm.config import ConfigError, DecoderConfig
from lm.decoder import DecoderLM
from lm.loss import IGNORE
from lm.prefix import PrefixAttend, join, sees_prefix
from lm.pretrained import load, save
from lm.search import pad

BOS, EOS = 1, 2
SMALL: dict[str, Any] = {"vocab_size": 40, "context": 32, "layers": 2, "width": 32, "heads": 4}
SENTENCES = st.lists(
    st.tuples(st.lists(st.integers(3, 39), max_size=6), st.lists(st.integers(3, 39), max_size=6)),
    min_size=1,
    max_size=5,
)


def make(**options: Any) -> DecoderLM:
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(**(SMALL | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    src, src_mask = pad([[*src, BOS] for src, _ in pairs])
    tgt_input = pad([[BOS, *tgt] for _, tgt in pairs])[0]
    tgt_output, real = pad([[*tgt, EOS] for _, tgt in pairs])
    return {
        "src": src,
        "src_mask": src_mask,
        "tgt_input": tgt_input,
        "tgt_output": tgt_output.masked_fill(~real, IGNORE),
    }


def test_rows_that_fit_fit_together() -> None:
    """A long source in one row and a long target in another: each has room, both in one row would not."""
    long, short = list(range(3, 31)), [5]
    batch = batch_of([(long, short), (short, long)])
    assert batch["src"].shape[1] - 1 + batch["tgt_input"].shape[1] > SMALL["context"]
    assert int(make()(batch).targets) == len(long) + len(short) + 2


@given(SENTENCES)
def test_a_row_is_source_separator_target(pairs: list[tuple[list[int], list[int]]]) -> None:
    tokens, targets, prefix = join(batch_of(pairs), SMALL["context"])
    longest = max(len(src) + 1 + len(tgt) for src, tgt in pairs)
    assert tokens.shape == targets.shape == (len(pairs), longest)
    for row, (src, tgt) in enumerate(pairs):
        sequence = [*src, BOS, *tgt]
        assert tokens[row].tolist() == sequence + [0] * (longest - len(sequence))
        wanted = [IGNORE] * len(src) + [*tgt, EOS]
        assert targets[row].tolist() == wanted + [IGNORE] * (longest - len(sequence))
        assert int(prefix[row]) == len(src)


@given(st.integers(1, 8), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_a_key_of_the_prefix_is_seen_by_all_and_any_other_by_what_follows_it(length: int, prefixes: list[int]) -> None:
    positions = torch.arange(length)
    mask = sees_prefix(may_attend(positions, positions, None).unsqueeze(0), torch.tensor(prefixes))
    for row, prefix in enumerate(prefixes):
        for query in range(length):
            for key in range(length):
                assert bool(mask[row, query, key]) == (key < prefix or key <= query)
    assert torch.equal(PrefixAttend(torch.tensor(prefixes), length).mask, mask)


@torch.no_grad()
def test_a_translation_is_the_language_models_loss_on_the_target() -> None:
    """Causal, joining is all there is to it: the same as a batch of tokens and targets."""
    model, batch = make(), batch_of([([5, 6, 7], [8, 9]), ([4], [10, 11, 12])])
    tokens, targets, _ = join(batch, SMALL["context"])
    asked = model({"tokens": tokens, "targets": targets})
    found = model(batch)
    assert torch.equal(found.total, asked.total)
    assert int(found.targets) == 3 + 4


@torch.no_grad()
def test_the_visible_prefix_is_what_makes_the_difference() -> None:
    """A later source token changes what an earlier one's hidden state is, and only with a visible prefix."""
    causal, visible = make(), make(prefix=True)
    visible.load_state_dict(causal.state_dict())
    long, short = [([5, 6, 7, 8], [9])], [([5], [9])]
    assert not torch.equal(causal(batch_of(long)).total, visible(batch_of(long)).total)
    # One source token sees itself either way.
    torch.testing.assert_close(causal(batch_of(short)).total, visible(batch_of(short)).total)

    def first_key(model: DecoderLM, last: int) -> torch.Tensor:
        state = model.start(torch.tensor([[5, 6, last, BOS]]))
        return state.keys[1][0, 0]

    assert torch.equal(first_key(causal, 7), first_key(causal, 8))
    assert not torch.allclose(first_key(visible, 7), first_key(visible, 8))


@torch.no_grad()
def test_the_separator_is_not_part_of_the_prefix() -> None:
    """The source must not see that it ends: its keys are the same whatever the last token of the prompt is."""
    model = make(prefix=True)
    one, other = (model.start(torch.tensor([[5, 6, 7, last]])) for last in (BOS, 9))
    for a, b in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert torch.equal(a[:, :3], b[:, :3])


@torch.no_grad()
def test_plain_text_is_causal_whatever_the_config_says() -> None:
    causal, visible = make(), make(prefix=True)
    visible.load_state_dict(causal.state_dict())
    tokens = torch.randint(3, 40, (2, 9))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    assert torch.equal(causal(batch).total, visible(batch).total)


def test_a_pair_beyond_the_context_is_one_sentence() -> None:
    batch = batch_of([([5] * 20, [6] * 12)])
    with pytest.raises(ValueError, match=r"^a source and its target have 33 tokens; the model's context is 32\.$"):
        make()(batch)
    make()(batch_of([([5] * 20, [6] * 11)]))


def test_a_window_and_a_visible_prefix_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^prefix is True; a visible prefix needs layers without a window\.$"):
        DecoderConfig(**SMALL, prefix=True, window=4, window_pattern="SL")
    with pytest.raises(ConfigError, match=r"^prefix is 'yes'; it must be bool\.$"):
        DecoderConfig(**SMALL, prefix="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu"}])
def test_no_other_family_has_a_visible_prefix(options: dict[str, Any], tmp_path: Path) -> None:
    """Another tool would compute something else without a word."""
    save(make(**options), tmp_path / "causal")
    save(make(**options, prefix=True), tmp_path / "visible")
    raw = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("causal", "visible")}
    assert raw["causal"]["architectures"] != ["HeedForCausalLM"]
    assert raw["visible"]["architectures"] == ["HeedForCausalLM"]
    assert raw["visible"]["prefix"] is True
    assert load(tmp_path / "visible").config.prefix
    assert not load(tmp_path / "causal").config.prefix
