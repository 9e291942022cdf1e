"""`model.from`: a run begins where a folder ends, and what it saves is a folder of the same kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm import DecoderConfig, DecoderLM, pretrained
from lm.convert import convert
from lm.tokenizer import Tokenizer, train_bpe, train_characters
from train.__main__ import main
from train.config import RecipeError, load
from train.data import Batches
from train.prepare import prepare

CONTEXT, PADDED, TEMPLATE = 48, 11, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "mistral": {**LLAMA, "sliding_window": None, "head_dim": 8},  # whose mathematics is Llama's too
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
}


@pytest.fixture(scope="session")
def bases(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASES/{llama, mistral, qwen2, gpt2, heed}: folders as others have them, with more vocabulary than the tokenizer
    has, a chat template, and two tokens that end a text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe([(tiny_yaml.parent / "text.txt").read_text()], 280)
    tokenizer.settings["chat_template"] = TEMPLATE
    size = tokenizer.vocab_size + PADDED
    torch.manual_seed(7)
    for kind, shape in SHAPES.items():
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=size, **ids, **shape))
        model.generation_config.eos_token_id = [tokenizer.eos_id, 5]
        model.save_pretrained(root / kind)
        tokenizer.save(root / kind)
    ours = DecoderConfig(vocab_size=size, context=CONTEXT, layers=2, width=32, heads=4, softcap=20.0, dropout=0.3)
    generation = {"eos_token_id": [tokenizer.eos_id, 5]}
    pretrained.save(DecoderLM(ours), root / "heed", tokenizer=tokenizer, generation=generation, dtype=torch.bfloat16)
    return root


@pytest.mark.parametrize("kind", [*SHAPES, "heed"])
def test_a_run_begins_with_the_folders_weights_and_leaves_a_folder_of_its_kind(
    kind: str, bases: Path, tiny: Any, figures: Any
) -> None:
    base = bases / kind
    rows = tiny(f"model.from={base}", "train.steps=8", "eval.every=8")
    losses = figures(rows)
    recipe = tiny.recipe(f"model.from={base}")
    assert recipe.model.context == 16 < recipe.decoder_config(0).context == CONTEXT

    prepared = prepare(recipe, progress=False)
    first = Batches(prepared.train, context=16, batch_tokens=96, seed=recipe.run.seed).batch(0)
    with torch.no_grad():
        loss, count, _ = pretrained.load(base, torch.float32)(first)
    assert losses[0] == pytest.approx(float(loss / count), rel=1e-5)
    assert losses[-1] < losses[0] - 0.2

    made, trained = tiny.folder / "run" / "model", pretrained.load(tiny.folder / "run" / "model")
    before, after = json.loads((base / "config.json").read_text()), json.loads((made / "config.json").read_text())
    for key in ("architectures", "model_type", "vocab_size", "max_position_embeddings", "n_positions"):
        assert after.get(key) == before.get(key), key
    assert trained.config.context == CONTEXT
    assert trained.config.vocab_size == prepared.tokenizer.vocab_size + PADDED
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [prepared.tokenizer.eos_id, 5]
    assert Tokenizer.load(made).settings["chat_template"] == TEMPLATE
    assert Tokenizer.load(made).fingerprint() == Tokenizer.load(base).fingerprint()
    assert "trained further from" in (made / "README.md").read_text()
    assert {p.dtype for p in trained.parameters()} == {torch.float32}, "trained in fp32, whatever the folder's dtype"

    if kind != "heed":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        whole = prepared.train[0:CONTEXT].astype("int64")[None]
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(made)(torch.from_numpy(whole)).logits
            ours, _ = trained.step(torch.from_numpy(whole), empty(trained))
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert AutoTokenizer.from_pretrained(made).chat_template == TEMPLATE


def empty(model: DecoderLM) -> Any:
    from lm.state import DecoderState

    return DecoderState.empty(model.config, 1, torch.zeros(1, dtype=torch.int64), torch.float32)


def test_a_gguf_file_is_as_good_as_the_folder(
    bases: Path, tiny: Any, figures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    convert(str(bases / "qwen2"), str(file))
    from_folder = figures(tiny(f"model.from={bases / 'qwen2'}", "train.steps=3", name="folder"))
    assert figures(tiny(f"model.from={file}", "train.steps=3", name="file")) == pytest.approx(from_folder, rel=1e-5)
    made = tiny.folder / "file" / "model"
    assert json.loads((made / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert Tokenizer.load(made).settings["chat_template"] == TEMPLATE
    kept, given = (pretrained.stop_ids(model, pretrained.load_tokenizer(model)) for model in (made, file))
    assert kept == given
    said = []
    for model in (bases / "qwen2", file):
        assert main(["evaluate", str(model), "--text", str(tiny.file.parent / "text.txt"), "--tokens", "300"]) == 0
        said.append(re.findall(r"[\d.]+ nats", capsys.readouterr().out))
    assert said[0] == said[1]


def test_a_stopped_run_goes_on_as_it_would_have(bases: Path, tiny: Any) -> None:
    overrides = [f"model.from={bases / 'gpt2'}", "model.dropout=0.2"]
    tiny(*overrides, "train.steps=8", "schedule.kind=constant", name="whole")
    tiny(*overrides, "train.steps=4", "schedule.kind=constant", name="halves")
    tiny(*overrides, "train.steps=8", "schedule.kind=constant", name="halves")
    whole, halves = (pretrained.load(tiny.folder / name / "model").state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_recipe_that_ran_can_be_run(bases: Path, tiny: Any) -> None:
    tiny(f"model.from={bases / 'qwen2'}", "train.steps=4")
    written = tiny.folder / "run" / "config.yaml"
    again = load(written)
    assert again == tiny.recipe(f"model.from={bases / 'qwen2'}", "train.steps=4")
    assert set(yaml.safe_load(written.read_text())["model"]) == {"from", "context", "dropout"}
    assert again.model.kv_heads == 2
    assert again.model.bias == "qkv"


def test_the_context_is_the_folders_where_none_is_given(bases: Path, tmp_path: Path) -> None:
    recipe = {
        "data": {"text": "a.txt"},
        "model": {"from": str(bases / "llama")},
        "train": {"steps": 5, "batch_tokens": 2 * CONTEXT},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    made = load(tmp_path / "a.yaml")
    assert (made.model.context, made.tokenizer.folder) == (CONTEXT, str(bases / "llama"))
    assert made.decoder_config(3).rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_equal_ids_do_not_bring_another_models_template(bases: Path, tiny: Any, tmp_path: Path) -> None:
    """The tokens in the cache are shared by all tokenizers with equal ids; the chat template is the folder's own."""
    other = tmp_path / "other"
    shutil.copytree(bases / "llama", other)
    tokenizer = Tokenizer.load(other)
    tokenizer.settings["chat_template"] = "another"
    tokenizer.save(other)
    for folder, template in ((bases / "llama", TEMPLATE), (other, "another")):
        prepared = prepare(tiny.recipe(f"model.from={folder}"), progress=False)
        assert prepared.tokenizer.settings["chat_template"] == template


def test_a_dry_run_says_what_it_begins_with(
    bases: Path, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([str(tiny_yaml), f"run.dir={tmp_path / 'run'}", f"model.from={bases / 'mistral'}", "--dry-run"])
    out = capsys.readouterr().out
    assert status == 0
    assert f"from         {bases / 'mistral'}" in out
    assert f"context {CONTEXT}" in out
    assert "6 sequences of 16" in out
    total = sum(p.numel() for p in pretrained.load(bases / "mistral").parameters())
    assert f"parameters   {total:,}" in out


# ------------------------------------------------------------ what is refused


def problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(recipe, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.from=3", "model.from is 3; it must be text or null."),
        ("model.from=none", 'model.from is "none": none is not a folder;'),
        ("model.layers=2", "that folder decides the model's shape; leave out model.layers."),
        ("model.width=null", "leave out model.width."),
        ("model.context=49", "model.context is 49; it must be at most that of model.from, which is 48."),
        ("model.context=0", "model.context is 0; it must be a whole number of at least 1."),
        ("tokenizer.kind=characters", 'tokenizer.kind is "characters"; model.from is'),
        ("tokenizer.folder=elsewhere", "which differs: leave the tokenizer section out."),
        ("run.dir=BASES", "which lies in run.dir, and the run would write over it; give another run.dir."),
    ],
)
def test_one_mistake_gets_one_sentence(override: str, sentence: str, bases: Path, tiny_yaml: Path) -> None:
    begun = [] if override.startswith("model.from") else [f"model.from={bases / 'llama'}"]
    whole = ["train.batch_tokens=98"] if "context=49" in override else []
    (problem,) = problems(tiny_yaml, *begun, *whole, override.replace("BASES", str(bases)))
    assert sentence in problem


def test_a_file_that_sets_a_shape_too_is_refused_in_one_sentence(bases: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_yaml.read_text())
    recipe["model"]["from"] = str(bases / "llama")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    shape, tokenizer = problems(tmp_path / "a.yaml")
    assert shape.endswith("leave out model.heads, model.layers, model.width.")
    assert tokenizer.startswith('tokenizer.kind is "characters"; model.from is')


def test_a_tokenizer_with_equal_ids_is_no_other(bases: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    Tokenizer.load(bases / "llama").save(tmp_path / "same")
    given = ["tokenizer.kind=folder", f"tokenizer.folder={tmp_path / 'same'}"]
    load(tiny_yaml, [f"model.from={bases / 'llama'}", *given])
    train_characters(["abc"]).save(tmp_path / "same")
    assert "which differs" in problems(tiny_yaml, f"model.from={bases / 'llama'}", *given)[0]


@pytest.mark.parametrize("damage", ["vocabulary", "no tokenizer", "weights", "shape"])
def test_a_folder_that_does_not_fit_together_is_refused(
    damage: str, bases: Path, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases / "llama", folder)
    if damage == "vocabulary":
        train_bpe(["".join(map(chr, range(40, 3000)))] * 4, 900).save(folder)
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"\x00" * 90)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    overrides = [f"model.from={folder}", f"run.dir={tmp_path / 'run'}"]
    assert main([str(tiny.file), *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'model.from is "{folder}": ')
    if damage == "vocabulary":
        assert "the model must have at least as many" in line
    assert not (tmp_path / "run").exists()
    if damage != "weights":
        assert main([str(tiny.file), *overrides, "--dry-run"]) == 2
