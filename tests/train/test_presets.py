"""The papers' own models and training, as the recipes that are named after them say it: by arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config import Recipe, load
from train.schedule import factor

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def recipe(name: str) -> Recipe:
    return load(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize(("name", "longest", "updates"), [("rnnsearch-30", 30, 471_000), ("rnnsearch-50", 50, 288_000)])
def test_rnnsearch(name: str, longest: int, updates: int) -> None:
    """arXiv 1409.0473: sizes in appendix A.2.3, training in B.2, updates in table 2."""
    asked = recipe(name)
    counts = asked.model_config(30_000, 1).parameters()
    biases = 2 * 3 * 1000 + 3 * 1000 + 1000 + 1000 + 1000  # of the three units, W_s, alignment, deep output
    assert counts["total"] - biases == 80_401_000
    assert counts["embedding"] == 2 * 30_000 * 620
    assert (asked.data.longest, asked.total_steps, asked.tokenizer.kind) == (longest, updates, "words")
    assert (asked.optim.name, asked.optim.rho, asked.optim.eps, asked.optim.lr) == ("adadelta", 0.95, 1e-6, 1.0)
    assert (asked.optim.clip, asked.optim.weight_decay, asked.train.batch_sentences) == (1.0, 0.0, 80)
    assert (asked.model.dropout, asked.train.label_smoothing, asked.model.readout) == (0.0, 0.0, "previous")
    assert {factor(asked.schedule, step, updates) for step in (0, 1000, updates - 1)} == {1.0}


def test_rnnencdec_is_rnnsearch_without_its_alignment() -> None:
    fixed, other = recipe("rnnencdec-50"), recipe("rnnsearch-50")
    assert fixed.model_config(30_000, 1).parameters()["alignment"] == 0
    assert fixed.total_steps == 600_000
    ours, theirs = fixed.to_dict(), other.to_dict()
    differing = {
        f"{section}.{key}"
        for section, values in ours.items()
        for key, value in values.items()
        if theirs[section][key] != value
    }
    assert differing == {"run.dir", "model.alignment", "model.fixed_context", "train.steps"}


@pytest.mark.parametrize(
    ("name", "width", "peak", "steps", "averaged", "dropout"),
    [("transformer-base", 512, 6.99e-4, 100_000, 5, 0.1), ("transformer-big", 1024, 4.94e-4, 300_000, 20, 0.3)],
)
def test_transformer(name: str, width: int, peak: float, steps: int, averaged: int, dropout: float) -> None:
    """arXiv 1706.03762: table 3, and sections 5 and 6.1."""
    asked = recipe(name)
    shape = asked.model_config(37_000, 1)
    assert (shape.encoder_layers, shape.decoder_layers, shape.width, shape.key, shape.value) == (6, 6, width, 64, 64)
    assert (shape.heads, shape.mlp_width, shape.norm, shape.positions) == (width // 64, 4 * width, "post", "sinusoidal")
    assert (shape.dropout, shape.attention_dropout, shape.tie_embeddings, shape.activation) == (
        dropout,
        0,
        "all",
        "relu",
    )
    if name == "transformer-base":
        for vocab_size in (1000, 37_000):
            assert asked.model_config(vocab_size, 1).parameters()["total"] == 44_138_496 + 512 * vocab_size
    else:
        assert shape.parameters()["total"] == pytest.approx(213e6, rel=0.01)
    rates = [asked.optim.lr * factor(asked.schedule, step - 1, steps) for step in (1, 2000, 4000, 16_000, steps)]
    equation = [width**-0.5 * min(step**-0.5, step * 4000**-1.5) for step in (1, 2000, 4000, 16_000, steps)]
    assert rates == pytest.approx(equation, rel=1e-9)
    assert rates[2] == pytest.approx(peak, rel=1e-3)
    assert max(rates) == rates[2]
    assert (asked.optim.name, asked.optim.betas, asked.optim.eps) == ("adamw", (0.9, 0.98), 1e-9)
    assert (asked.optim.weight_decay, asked.optim.clip, asked.train.label_smoothing) == (0.0, None, 0.1)
    assert (asked.total_steps, asked.train.batch_tokens) == (steps, 25_000)
    assert (asked.checkpoint.average, asked.checkpoint.keep) == (averaged, averaged)
    assert (asked.eval.beam, asked.eval.length_penalty, asked.tokenizer.vocab_size) == (4, 0.6, 37_000)


def test_the_multi30k_recipes_are_one_comparison() -> None:
    """The same data, vocabulary, smoothing and number of target tokens; parameters within half as many again."""
    names = ("transformer", "rnnsearch", "rnnencdec", "lm", "prefix-lm")
    asked = {name: recipe(f"translate-multi30k-{name}") for name in names}
    first = asked["transformer"].to_dict()
    for one in asked.values():
        values = one.to_dict()
        assert (values["data"], values["tokenizer"]) == (first["data"], first["tokenizer"])
        assert values["schedule"] == first["schedule"]
        assert one.train.label_smoothing == asked["transformer"].train.label_smoothing
        assert one.train.steps * one.train.batch_tokens == 8000 * 2048
    counts = [one.model_config(5000, 1).parameters()["total"] for one in asked.values()]
    assert max(counts) / min(counts) < 1.55
    assert asked["prefix-lm"].model.prefix
    assert not asked["lm"].model.prefix
    six = recipe("translate-multi30k-transformer-6").model
    assert (six.encoder_layers, six.decoder_layers, six.heads) == (6, 6, 8)
