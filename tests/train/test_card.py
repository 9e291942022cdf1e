"""The model card: what the hub reads in front, what was measured behind, and code that runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from train import card
from train.config import Recipe, load
from train.data import Tokens
from train.prepare import Prepared, prepare

ROOT = Path(__file__).resolve().parents[2]


def front(text: str) -> dict[str, Any]:
    """The front matter as the hub's own client reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)


def test_every_saved_folder_has_its_card(tiny: Any, tiny_yaml: Path, tmp_path: Path) -> None:
    rows = tiny("eval.every=4", "run.license=apache-2.0", "optim.lr=1", "model.softcap=9")
    run = tiny.folder / "run"
    best, last = (run / "model" / "README.md").read_text(), (run / "model-last" / "README.md").read_text()
    for text in (best, last):
        assert front(text) == {
            "license": "apache-2.0",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["heed"],
        }
        assert "random weights" in text
        assert "apache-2.0, as stated by" in text
        assert prepare(tiny.recipe(), progress=False).fingerprint in text
        assert "`text.txt`" in text
        assert str(tiny_yaml.parent) not in text.split("## Recipe")[0]
        ((_, recipe),) = blocks(text, "yaml")
        (tmp_path / "again.yaml").write_text(recipe)
        assert load(tmp_path / "again.yaml") == load(run / "config.yaml")

    held = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    step = min(held, key=lambda step: held[step])
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert f"| updates | {step} |" in best
    assert f"| training loss | {losses[step]:.4f} nats a token" in best
    assert f"| best held-out loss | {held[step]:.4f} nats a token, " in best
    assert "| updates | 12 |" in last
    assert f"| tokens trained on | {12 * 96:,} |" in last
    assert f"| training loss | {losses[12]:.4f} nats a token" in last
    assert f"| held-out loss | {held[12]:.4f} nats a token, " in last
    assert f"| best held-out loss | {held[step]:.4f} nats a token, " in last
    assert "HeedForCausalLM" in last
    assert "\nimport lm " in last


@pytest.mark.parametrize("ours", [False, True], ids=["LlamaForCausalLM", "HeedForCausalLM"])
def test_the_code_of_a_card_runs(ours: bool, tiny: Any) -> None:
    tiny("train.steps=1", "data.validation=null", *(["model.softcap=9"] if ours else []))
    folder = tiny.folder / "run" / "model"
    text = (folder / "README.md").read_text()
    assert "None was stated" in text
    assert "license" not in front(text)
    assert "| held-out loss | not measured |" in text
    ((_, code),) = blocks(text, "python")
    assert ("import lm" in code) == ours, "LlamaForCausalLM needs nothing of ours"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def prepared(recipe: Recipe) -> Prepared:
    return dataclasses.replace(prepare(recipe, progress=False), validation=Tokens([np.zeros(9, dtype=np.uint16)]))


def test_what_comes_from_the_hub_is_named_for_the_hub(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    made = prepared(tiny.recipe())
    config = tiny.recipe().decoder_config(made.tokenizer.vocab_size)

    def of(**data: Any) -> str:
        recipe = tiny.recipe()
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))
        return card.write(recipe, config, made, tmp_path, 3)

    named = of(text=None, dataset="owner/name", dataset_config="small")
    assert front(named)["datasets"] == ["owner/name"]
    assert "`owner/name`, configuration `small`, split `train`" in named
    assert "datasets" not in front(of(text=None, dataset=str(tmp_path))), "a folder is no name on the hub"
    assert "datasets" not in front(of(text=("a.txt",)))
    strange = of(text=("a|b`c\n.txt",))
    assert "`a\\|b'c .txt`" in strange

    cached = tmp_path / "hub" / "models--Owner--Small-1.5B" / "snapshots" / "0a1b"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(tiny_folder)
    begun = tiny.recipe("model.from=" + str(cached), "model.context=16")
    text = card.write(begun, begun.decoder_config(0), prepared(begun), tmp_path, 3)
    assert front(text)["base_model"] == "Owner/Small-1.5B"
    assert "trained further from the weights of `Owner/Small-1.5B`" in text
    assert "that of the model it was begun from" in text


@pytest.mark.parametrize(
    ("noted", "name"),
    [("owner/model-1.5", "owner/model-1.5"), ("runs/demo/model", None), ("/a/b", None), ("", None), (3, None)],
)
def test_a_base_model_is_a_name_on_the_hub_or_none(noted: Any, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": noted}))
    assert card.hub_name(str(tmp_path)) == name
    assert card.hub_name(str(tmp_path / "none")) is None
    assert card.hub_name("runs/demo/model") is None


def test_a_recipe_that_holds_a_fence_stays_in_its_block(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("eval.prompts=['```python', '````']", "log.tags=['---']")
    made = prepared(recipe)
    text = card.write(recipe, recipe.decoder_config(made.tokenizer.vocab_size), made, tmp_path, 0)
    ((_, block),) = blocks(text, "yaml")
    assert yaml.safe_load(block) == recipe.to_dict()
    assert front(text)["library_name"] == "transformers"
