"""The model card of a translator: README.md of its folder, as train/card.py writes a language model's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from lm import __version__
from lm.architectures import ARCHITECTURES
from train import metrics
from train.card import code, fenced, figures, licence, table
from train.config import Recipe
from train.pair_prepare import PreparedPairs
from train.pairs import Pairs

NAMES = {
    "transformer": "An encoder-decoder Transformer (arXiv 1706.03762)",
    "rnnsearch": "A recurrent encoder-decoder with a learned soft alignment, RNNsearch (arXiv 1409.0473)",
    "decoder": "A decoder-only Transformer that reads a source and goes on with its translation",
}


def write(recipe: Recipe, config: Any, data: PreparedPairs, run_dir: Path, step: int) -> str:
    """The card of the model as it is after update `step` of the run in `run_dir`; Markdown with YAML in front."""
    architecture = ARCHITECTURES[config.architecture].folder
    front: dict[str, Any] = {} if recipe.run.license is None else {"license": recipe.run.license}
    # transformers reads our decoders alone
    front |= {"library_name": "transformers"} if config.architecture == "decoder" else {}
    front |= {"pipeline_tag": "translation", "tags": ["heed"]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {Path(recipe.run.dir).name}",
        f"{_what(config)} ({architecture}), trained from random weights with Heed {__version__}. It translates texts "
        "like those it was trained on; nothing but what is written here was measured.",
        "## Model\n\n" + table(_shape(config)),
        "## Data\n\n" + table(_data(recipe, data)),
        "## Figures\n\n" + figures(metrics.read(run_dir / metrics.FILE), step) + _bleu(run_dir, step),
        "## Use\n\n" + fenced('echo "a sentence" | python -m lm translate FOLDER\npython -m serve FOLDER', "bash"),
        "## Recipe\n\n" + fenced(recipe.to_yaml(), "yaml"),
        "## Licence\n\n" + licence(recipe),
    ]
    return "\n\n".join(sections) + "\n"


def _what(config: Any) -> str:
    if getattr(config, "fixed_context", False):
        return "A recurrent encoder-decoder with a fixed context, RNNencdec (arXiv 1409.0473)"
    return NAMES[config.architecture]


def _shape(config: Any) -> list[tuple[str, str]]:
    counts = config.parameters()
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total" and count)
    rows = [("parameters", f"{counts['total']:,} ({parts})")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            rows.append((field.name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)))
    return rows


def _data(recipe: Recipe, data: PreparedPairs) -> list[tuple[str, str]]:
    source = recipe.data
    if source.synthetic is not None:
        pairs = f"synthetic: {source.synthetic} up to {source.length} numbers below {source.symbols}"
    elif source.dataset is not None:
        pairs = f"{code(source.dataset)}, {code(str(source.source_key))} to {code(str(source.target_key))}"
    elif source.pairs is not None:
        pairs = code(Path(source.pairs).name)
    else:
        pairs = f"{code(Path(str(source.source)).name)} to {code(Path(str(source.target)).name)}"
    kinds = {"bpe": "byte-level BPE of both languages", "words": "words of both languages", "folder": "another model's"}
    return [
        ("pairs", pairs),
        ("trained on", _amount(data.train)),
        ("held out", "nothing" if data.validation is None else _amount(data.validation)),
        ("tokenizer", f"{kinds[recipe.tokenizer.kind]}, {data.tokenizer.vocab_size:,} entries"),
        ("fingerprint of the pairs", code(data.fingerprint)),
    ]


def _amount(pairs: Pairs) -> str:
    return f"{len(pairs):,} pairs, {len(pairs.source):,} source and {len(pairs.target):,} target tokens"


def _bleu(run_dir: Path, step: int) -> str:
    """The last BLEU up to `step`, with its signature."""
    rows = [row for row in metrics.read(run_dir / metrics.FILE) if row["step"] <= step and row.get("validation_bleu")]
    if not rows:
        return ""
    row = rows[-1]
    return (
        f"\n\nHeld-out BLEU {row['validation_bleu']:.2f} ({code(row['bleu_signature'])}) and chrF "
        f"{row['validation_chrf']:.2f} ({code(row['chrf_signature'])}) at update {row['step']:,}."
    )
