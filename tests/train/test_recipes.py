"""The recipes and the launcher's files: each passes a dry run, explains its keys and says where it has not run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm.architectures import ARCHITECTURES
from lm.pretrained import family_of
from train.__main__ import main
from train.config import check_launch, load, sections
from train.schema import key_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
# Whatever else there is has not, and says so in its first line.
HAVE_RUN = {
    "demo",
    "finetune",
    "shakespeare-char",
    "cpu",
    "cpus",
    "nodes-cpu",
    *(name for name in NAMES if name.startswith("translate-")),
}
# Where each key is explained with its default: these three hold all there are.
REFERENCES = ("demo", "translate-reverse", "translate-reverse-rnnsearch")


def keys_with_comments(path: Path) -> dict[str, str]:
    """`section.key` -> the comment above it; a key directly below another shares that one's."""
    found, section, comment, fresh = {}, "", "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"  # (.*)", line):
            comment = f"{comment} {match[1]}" if fresh else match[1]
            fresh = True
        elif match := re.match(r"  (\w+):", line):
            found[f"{section}.{match[1]}"] = comment
            fresh = False
        elif match := re.match(r"(\w+):", line):
            section, comment, fresh = match[1], "", False
    return found


def begun(path: Path, folder: Path) -> list[str]:
    """A recipe that continues from a model that another run makes continues from this one."""
    return [f"model.from={folder}"] if path.stem == "finetune" else []


def test_there_are_the_recipes_that_the_project_promises() -> None:
    assert set(NAMES) >= {"demo", "finetune", "shakespeare-char", "shakespeare-char-gpu"}
    assert set(NAMES) >= {"gpt2-124m", "llama-1b", "smollm-135m"}
    assert set(NAMES) >= {"rnnsearch-30", "rnnsearch-50", "rnnencdec-50", "transformer-base", "transformer-big"}
    kinds = ("transformer", "transformer-6", "rnnsearch", "rnnencdec", "lm", "prefix-lm")
    assert set(NAMES) >= {
        "translate-reverse",
        "translate-reverse-rnnsearch",
        *(f"translate-multi30k-{k}" for k in kinds),
    }
    assert {path.stem for path in LAUNCHERS} >= {"cpu", "gpu", "node-ddp", "node-fsdp2", "nodes-ddp", "nodes-fsdp2"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_dry_run_passes(
    path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status = main([str(path), *begun(path, tiny_folder), "--dry-run"])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    for line in ("parameters", "FLOPs", "memory", "steps", "text", "epochs", "time"):
        assert re.search(rf"^{line} +\S", captured.out, re.MULTILINE), captured.out


def test_a_dry_run_through_the_launcher_writes_nothing(tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "-q", "--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    command = [sys.executable, *launcher, "-m", "train", str(ROOT / "configs/demo.yaml"), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_key_is_explained_where_it_stands(path: Path, tiny_folder: Path) -> None:
    explained = keys_with_comments(path)
    written = {f"{section}.{key}" for section, keys in yaml.safe_load(path.read_text()).items() for key in keys}
    assert set(explained) == written
    assert [key for key, comment in explained.items() if len(comment) < 12] == []
    assert load(path, begun(path, tiny_folder)).run.dir == f"runs/{path.stem}"


def test_every_key_is_listed_with_its_true_default() -> None:
    """In one of the three recipes that are references, for every architecture."""
    listed: dict[tuple[str, str], str] = {}
    for name in REFERENCES:
        architecture = load(ROOT / f"configs/{name}.yaml").model.architecture
        text = (ROOT / f"configs/{name}.yaml").read_text()
        for key, comment in keys_with_comments(ROOT / f"configs/{name}.yaml").items():
            if re.search(rf"#[^\n]*\n  {key.partition('.')[2]}:", text) and re.search("No default|Default", comment):
                listed.setdefault((architecture if key.startswith("model.") else "", key), comment)
    for architecture in ARCHITECTURES:
        for section, cls in sections(architecture).items():
            for field in dataclasses.fields(cls):
                key = f"{section}.{key_of(field)}"
                if key in ("train.steps", "train.tokens", "data.text", "data.dataset", "run.dir"):
                    continue  # one of two, or made from the file's name
                own = architecture if section == "model" else ""
                if key in ("model.architecture", "model.from"):
                    own = {"model.architecture": "transformer", "model.from": "decoder"}[key]
                comment = listed.get((own, key))
                assert comment, f"{key} of a {architecture} is in no reference"
                if key != "model.architecture":
                    check_default(key, field, comment)


def check_default(key: str, field: dataclasses.Field, comment: str) -> None:
    says = re.search(r"(No default|Default (\[.*?\]|[^\s:]+))", comment)
    assert says, f"{key} does not say its default"
    if says[1] == "No default":
        assert field.default in (dataclasses.MISSING, None), key
        return
    value = yaml.safe_load(says[2].rstrip(".,"))
    value = {"none": (), "runs/NAME-OF-THIS-FILE": None}.get(value, value) if isinstance(value, str) else value
    value = float(value) if isinstance(field.default, float) else value
    assert (tuple(value) if isinstance(value, list) else value) == field.default, key


@pytest.mark.parametrize("path", [*RECIPES, *LAUNCHERS], ids=lambda path: path.stem)
def test_what_has_not_run_on_its_hardware_says_so(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# unverified: ") == (path.stem not in HAVE_RUN)


@pytest.mark.parametrize(
    ("name", "vocab_size", "total", "family"),
    [
        ("gpt2-124m", 50257, 124_439_808, "GPT2LMHeadModel"),
        ("smollm-135m", 49152, 134_515_008, "LlamaForCausalLM"),
        ("llama-1b", 128_256, 1_235_814_400 + 128_256 * 2048, "LlamaForCausalLM"),
        ("demo", 2048, None, "Qwen3ForCausalLM"),
    ],
)
def test_shapes_are_the_models_they_are_named_after(name: str, vocab_size: int, total: int | None, family: str) -> None:
    config = load(ROOT / f"configs/{name}.yaml").decoder_config(vocab_size)
    assert total in (None, config.parameters()["total"])
    assert family_of(config).architecture == family


def test_budgets_are_kept() -> None:
    small = load(ROOT / "configs/shakespeare-char.yaml")
    assert small.decoder_config(66).parameters()["total"] <= 810_000
    assert small.total_steps * small.train.batch_tokens == 1_536_000
    assert small.model.context == 64
    large = load(ROOT / "configs/shakespeare-char-gpu.yaml")
    assert large.decoder_config(66).parameters()["total"] <= 10_800_000
    assert large.total_steps * large.train.batch_tokens == 5_000 * 64 * 256


def test_the_sharded_recipe_can_be_sharded() -> None:
    check_launch(load(ROOT / "configs/llama-1b.yaml"), fsdp2=True)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_the_launcher_reads_its_files(path: Path) -> None:
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "the recipe's train.dtype decides"
    few = {"cpu": 1, "gpu": 1, "cpus": 2, "nodes-cpu": 2}
    assert config.num_processes == few.get(path.stem, 8 * config.num_machines)
    if "fsdp2" in path.stem:
        from lm.decoder import Block

        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == Block.__name__
