"""`python -m lm convert`: folders and GGUF files, either way, through the command; transformers as the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm import DecoderLM
from lm.__main__ import main
from lm.attention import CausalAttend
from lm.pretrained import load, load_tokenizer, own_dtype, read_config, save, stop_ids
from lm.tokenizer import Tokenizer, train_bpe, train_characters

Make = Callable[..., DecoderLM]
TEXT = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind to suffer"]
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "beta_fast": 20.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "llama untied": {"tie_embeddings": False, "bias": "attention", "norm_eps": 1e-6, "rope_theta": 5e5},
    "llama biased": {"bias": "all", "head_dim": 16},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": YARN, "context": 64},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 12}},
    "qwen2": {"bias": "qkv", "kv_heads": 1},
    "qwen3": {"qk_norm": True, "kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
}


@torch.no_grad()
def logits(model: DecoderLM, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.logits(model.hidden(tokens, positions, CausalAttend(model.config.windows())))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXT, 300)


@pytest.fixture
def folder(make: Make, bpe: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """folder(**options): a model folder with a tokenizer."""

    def write(**options: Any) -> Path:
        save(make(**options, vocab_size=bpe.vocab_size), tmp_path / "model", tokenizer=bpe)
        return tmp_path / "model"

    return write


def convert(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) + len(captured.err.splitlines()) == 1
    return status, captured.out.strip(), captured.err.strip()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_there_and_back_is_the_same_model(
    name: str, folder: Callable[..., Path], tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(**MODELS[name])
    model = load(source)
    status, said, _ = convert(capsys, source, tmp_path / "a.gguf")
    total = model.config.parameters()["total"]
    assert (status, said) == (0, f"{tmp_path / 'a.gguf'}: a GGUF file of float32, {total:,} parameters.")
    assert convert(capsys, tmp_path / "a.gguf", tmp_path / "back")[0] == 0
    back = load(tmp_path / "back")
    expected = model.config
    if name == "dynamic":  # scales nothing up to the context, and GGUF has no word for it
        assert back.config.rope_scaling is None
    else:
        assert back.config == expected
    for path in (tmp_path / "a.gguf", tmp_path / "back"):
        other = load(path).state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in model.state_dict().items())
        torch.testing.assert_close(logits(load(path), tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
        tokenizer = load_tokenizer(path)
        assert [tokenizer.encode(text) for text in TEXT] == [load_tokenizer(source).encode(text) for text in TEXT]
        assert stop_ids(path, tokenizer) == stop_ids(source, tokenizer)


@pytest.mark.parametrize("name", ["llama", "llama untied", "qwen2", "qwen3"])
def test_transformers_reads_our_gguf(
    name: str, folder: Callable[..., Path], tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By code that is not ours: q and k turned back, biases, QK-norm. (It knows no attention_bias and no llama3 scaling
    in such a file, and takes every Qwen3 head for 128 wide.)"""
    from transformers import AutoModelForCausalLM

    options = MODELS[name] | {"qwen3": {"head_dim": 128}, "llama untied": {"bias": False}}.get(name, {})
    source = folder(**options)
    assert convert(capsys, source, tmp_path / "a.gguf")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, logits(load(source), tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_narrower_files_are_near(
    dtype: str, folder: Callable[..., Path], tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(mlp_width=64)
    assert convert(capsys, source, tmp_path / "a.gguf", "--dtype", dtype)[0] == 0
    expected = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}[dtype]
    assert own_dtype(tmp_path / "a.gguf") == expected
    other = load(tmp_path / "a.gguf", torch.float32).state_dict()
    for key, tensor in load(source).state_dict().items():
        error = (tensor - other[key]).abs().max() / tensor.abs().max()
        assert error < {"f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}[dtype], key


def test_a_foreign_folder_becomes_ours(tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """A sharded bf16 folder by transformers, with several ends of text, its template beside it."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=bpe.vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
    )
    source = tmp_path / "theirs"
    theirs = Qwen2ForCausalLM(config).to(torch.bfloat16)
    theirs.generation_config = GenerationConfig(eos_token_id=[3, 5], temperature=0.7, do_sample=True)
    theirs.save_pretrained(source, max_shard_size="10KB")
    bpe.save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert len(list(source.glob("*.safetensors"))) > 1
    capsys.readouterr()
    status, said, _ = convert(capsys, source, tmp_path / "ours", "--dtype", "float32")
    assert status == 0
    assert said.startswith(f"{tmp_path / 'ours'}: a Qwen2ForCausalLM folder of float32, ")
    assert read_config(tmp_path / "ours") == read_config(source)
    ours, original = load(tmp_path / "ours").state_dict(), load(source).state_dict()
    assert all(torch.equal(tensor.float(), ours[key]) for key, tensor in original.items())
    said_by = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert (said_by["eos_token_id"], said_by["temperature"]) == ([3, 5], 0.7)
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert tokenizer.settings["chat_template"] == "{{ messages[0].content }}"
    assert {3, 5} <= set(stop_ids(tmp_path / "ours", tokenizer))


def test_a_folder_without_a_tokenizer(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(make(), tmp_path / "model")
    for dest in ("a.gguf", "folder"):
        status, said, _ = convert(capsys, tmp_path / "model", tmp_path / dest)
        assert status == 0
        assert ", without a tokenizer, " in said
    assert convert(capsys, tmp_path / "a.gguf", tmp_path / "again")[0] == 0


@pytest.mark.parametrize(
    ("options", "arguments", "sentence"),
    [
        (
            {},
            ["gone", "DEST"],
            "TMP/gone is not a folder; a model is a folder with config.json and model.safetensors, ",
        ),
        ({}, ["model", "model"], "TMP/model is there already; it must be a new name."),
        ({}, ["model", "DEST", "--dtype", "q8_0"], "--dtype is q8_0 and TMP/DEST is a folder; q8_0 is for GGUF files."),
        ({"softcap": 9.0}, ["model", "a.gguf"], "The model is a HeedForCausalLM; what can be written as GGUF are "),
        (
            {"window": 4, "window_pattern": "S"},
            ["model", "a.gguf"],
            "The model is a MistralForCausalLM; what can be written as GGUF are LlamaForCausalLM, Qwen2ForCausalLM, "
            "Qwen3ForCausalLM without sliding windows.",
        ),
        ({"qk_norm": True, "bias": "attention"}, ["model", "a.gguf"], "The model is a Qwen3ForCausalLM; what can be "),
        (
            {"rope_scaling": YARN | {"truncate": False}},
            ["model", "a.gguf"],
            "rope_scaling has truncate; GGUF has no key for it.",
        ),
        (
            {"mlp_width": 40},
            ["model", "a.gguf", "--dtype", "q8_0"],
            "The matrices have rows of [32, 40]; for q8_0 they must be multiples of 32.",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_2(
    options: dict[str, Any],
    arguments: list[str],
    sentence: str,
    folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder(**options)
    paths = [str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]]
    status, _, said = convert(capsys, *paths)
    assert status == 2
    assert said.startswith(sentence.replace("TMP", str(tmp_path)))
    assert not (tmp_path / "a.gguf").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_of_characters_has_no_gguf(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_characters(TEXT)
    save(make(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer=tokenizer)
    status, _, said = convert(capsys, tmp_path / "model", tmp_path / "a.gguf")
    assert status == 2
    assert said.startswith("The tokenizer is WordLevel behind a pre-tokenizer that GGUF has no name for; ")


def test_generate_takes_a_gguf_file(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder()
    convert(capsys, source, tmp_path / "a.gguf")
    texts = []
    for model in (source, tmp_path / "a.gguf"):
        assert main(["generate", str(model), "To be", "--temperature", "0", "--max-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("To be")
