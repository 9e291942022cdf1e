"""The model card: README.md of a saved model folder, which `push_to_hub` puts on the model's page.

It says what was done and measured, and nothing else: the shape, the data with its fingerprint, the figures in
metrics.jsonl up to the step that was saved, and the whole recipe. The front matter is the hub's
(https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lm import __version__
from lm.config import DecoderConfig
from lm.pretrained import OWN_ARCHITECTURE, family_of
from train import metrics, origin
from train.config import Recipe
from train.data import Tokens
from train.prepare import Prepared


def write(recipe: Recipe, config: DecoderConfig, data: Prepared, run_dir: Path, step: int) -> str:
    """The card of the model as it is after update `step` of the run in `run_dir`; Markdown with YAML in front."""
    architecture = family_of(config, origin.kept(recipe, data.tokenizer).get("architecture")).architecture
    sections = [
        f"---\n{yaml.safe_dump(_front(recipe), sort_keys=False)}---",
        f"# {Path(recipe.run.dir).name}",
        _what(recipe, architecture),
        "## Model\n\n" + table(_shape(config, architecture)),
        "## Data\n\n" + table(_data(recipe, data)),
        "## Figures\n\n" + figures(metrics.read(run_dir / metrics.FILE), step),
        "## Use\n\n" + _use(config, architecture),
        "## Recipe\n\n" + fenced(recipe.to_yaml(), "yaml"),
        "## Licence\n\n" + licence(recipe),
    ]
    return "\n\n".join(sections) + "\n"


def hub_name(folder: str) -> str | None:
    """The hub's name (owner/model) of a folder that was downloaded from there; None for any other.

    The hub refuses a card whose base_model is no such name. It stands in the path of the hub's cache, or in
    config.json, where transformers notes what a model was loaded from.
    """
    cached = re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/", Path(folder).absolute().as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}"
    try:
        noted = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    named = isinstance(noted, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", noted) and not Path(noted).exists()
    return noted if named else None


def _front(recipe: Recipe) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if recipe.run.license is not None:
        front["license"] = recipe.run.license
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["heed"]}
    if recipe.data.dataset is not None and not Path(recipe.data.dataset).exists():
        front["datasets"] = [recipe.data.dataset]
    base = hub_name(recipe.model.from_) if recipe.model.from_ is not None else None
    if base is not None:
        front["base_model"] = base
    return front


def _what(recipe: Recipe, architecture: str) -> str:
    begun = "trained from random weights"
    if recipe.model.from_ is not None:
        known = hub_name(recipe.model.from_)
        begun = f"trained further from the weights of {code(known or recipe.model.from_)}"
    return (
        f"A decoder-only language model ({architecture}), {begun} with Heed {__version__}. It continues text as its "
        "data would; nothing but what is written here was measured."
    )


def _shape(config: DecoderConfig, architecture: str) -> list[tuple[str, str]]:
    parts = config.parameters()
    tied = ", which is the output head too" if config.tie_embeddings else f", output head {parts['head']:,}"
    rows = [
        ("architecture", architecture),
        ("parameters", f"{parts['total']:,} (embedding {parts['embedding']:,}{tied}; layers {parts['layers']:,})"),
        ("layers, width", f"{config.layers}, {config.width}"),
        ("heads", f"{config.heads} of {config.dim}, {config.kv} for keys and values"),
        ("MLP", f"{config.activation}, width {config.inner}"),
        ("norm, positions", f"{config.norm}, {config.positions}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.context:,} tokens"),
    ]
    return rows


def _data(recipe: Recipe, data: Prepared) -> list[tuple[str, str]]:
    source = recipe.data
    if source.dataset is not None:
        configured = "" if source.dataset_config is None else f", configuration {code(source.dataset_config)}"
        text = f"{code(source.dataset)}{configured}, split {code(source.split)}"
    else:
        text = ", ".join(code(Path(name).name) for name in source.text or ())
    held = "nothing" if data.validation is None else _amount(data.validation)
    return [
        ("text", text),
        ("trained on", _amount(data.train)),
        ("held out", held),
        ("tokenizer", _tokenizer(recipe, data)),
        ("fingerprint of the tokens", code(data.fingerprint)),
    ]


def _tokenizer(recipe: Recipe, data: Prepared) -> str:
    kind = {"bpe": "byte-level BPE", "characters": "characters", "folder": "that of another model"}
    begun = "that of the model it was begun from" if recipe.origin is not None else kind[recipe.tokenizer.kind]
    return f"{begun}, {data.tokenizer.vocab_size:,} entries"


def _amount(tokens: Tokens) -> str:
    return f"{len(tokens):,} tokens" + (f", {tokens.bytes_total:,} bytes of text" if tokens.bytes_total else "")


def figures(rows: list[dict[str, Any]], step: int) -> str:
    """What metrics.jsonl says of the run up to `step`."""
    rows = [row for row in rows if row["step"] <= step]
    trained = [row for row in rows if row.get("loss") is not None]
    held = [row for row in rows if row.get("validation_loss") is not None]
    found = [("updates", f"{step:,}")]
    if trained:
        last = trained[-1]
        found.append(("tokens trained on", f"{last['tokens']:,}"))
        figure = _loss(last["loss"], last.get("bits_per_byte"))
        found.append(("training loss", f"{figure} (at update {last['step']:,})"))
    if held:
        best = min(held, key=lambda row: row["validation_loss"])
        for name, row in (("held-out loss", held[-1]), ("best held-out loss", best)):
            figure = _loss(row["validation_loss"], row.get("validation_bits_per_byte"))
            found.append((name, f"{figure} (at update {row['step']:,})"))
    else:
        found.append(("held-out loss", "not measured"))
    return table(found)


def _loss(nats: float, bits: float | None) -> str:
    return f"{nats:.4f} nats a token" + ("" if bits is None else f", {bits:.4f} bits a byte")


def _use(config: DecoderConfig, architecture: str) -> str:
    more = min(50, max(1, config.context // 2))  # what any prompt of a few tokens leaves room for
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if architecture == OWN_ARCHITECTURE:
        lines = ["import lm  # Heed: tells transformers about HeedForCausalLM", *lines]
    lines += [
        'folder = "."  # where this file lies, or its name on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        'inputs = tokenizer("Once", return_tensors="pt")',
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={more})[0]))",
    ]
    served = "Heed serves it through an API that is compatible with OpenAI's and vLLM's:"
    return f"{fenced(chr(10).join(lines), 'python')}\n\n{served}\n\n{fenced('python -m serve FOLDER', 'bash')}"


def licence(recipe: Recipe) -> str:
    if recipe.run.license is None:
        return "None was stated for these weights."
    return f"{recipe.run.license}, as stated by who trained it."


def table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def code(text: str) -> str:
    """Text of the user's as Markdown code inside a table."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'")
    return f"`{plain}`"


def fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
