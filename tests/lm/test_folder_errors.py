"""A folder that cannot be read is a FolderError of one sentence, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lm import DecoderLM
from lm.pretrained import FolderError, load, save

Make = Callable[..., DecoderLM]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "qwen3": {"qk_norm": True},
    "gpt2": {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh"},
    "heed": {"softcap": 9.0},
}


@pytest.fixture(scope="module")
def originals(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good folder of each family."""
    root = tmp_path_factory.mktemp("folders")
    for name, options in KINDS.items():
        save(make(**options), root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture
def folder(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """folder(kind): a copy to break."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(originals[kind], tmp_path / "model"))

    return copy


def change(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None as `...` leaves one out."""
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def refused(folder: Path) -> str:
    """The sentence with which `load` refuses a folder; "" where it does not. No other exception is caught."""
    try:
        load(folder)
    except FolderError as error:
        said = str(error)
    else:
        return ""
    assert said.endswith(".")
    assert "\n" not in said
    return said


Break = Callable[[Path], Any]
ROPE = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 5e5}
CASES: list[tuple[str, str, Break, str]] = [
    # what, family, how, the sentence (FOLDER stands for its path)
    ("no folder", "llama", shutil.rmtree, "FOLDER is not a folder; a model is a folder with config.json and "),
    ("no config", "llama", lambda f: (f / "config.json").unlink(), "FOLDER has no config.json; a model is a folder "),
    ("bad JSON", "llama", lambda f: (f / "config.json").write_text("{"), "FOLDER/config.json cannot be read as JSON: "),
    (
        "not UTF-8",
        "llama",
        lambda f: (f / "config.json").write_bytes(b"\xff{}"),
        "FOLDER/config.json cannot be read as",
    ),
    ("a list", "llama", lambda f: (f / "config.json").write_text("[1]"), "FOLDER/config.json: architectures is None; "),
    ("a folder", "llama", lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], "FOLDER/config.json "),
    (
        "none",
        "llama",
        lambda f: change(f, architectures=...),
        "FOLDER/config.json: architectures is None; the supported",
    ),
    (
        "another",
        "llama",
        lambda f: change(f, architectures=["MambaForCausalLM"]),
        "FOLDER/config.json: architectures is ['MambaForCausalLM']; the supported ones are GPT2LMHeadModel, "
        "HeedForCausalLM, HeedRNNSearch, HeedTransformer, LlamaForCausalLM, MistralForCausalLM, Qwen2",
    ),
    ("nested", "llama", lambda f: change(f, architectures=[["x"]]), "FOLDER/config.json: architectures is [['x']]; "),
    (
        "missing key",
        "llama",
        lambda f: change(f, hidden_size=...),
        "FOLDER/config.json: the key hidden_size is missing",
    ),
    ("missing key", "gpt2", lambda f: change(f, n_embd=...), "FOLDER/config.json: the key n_embd is missing; a GPT2LM"),
    ("missing key", "heed", lambda f: change(f, width=...), "FOLDER/config.json: the key width is missing; a HeedFor"),
    ("text", "llama", lambda f: change(f, hidden_size="32", head_dim=...), "FOLDER/config.json: a value has the wrong"),
    ("half", "llama", lambda f: change(f, vocab_size=2.5), "FOLDER/config.json: vocab_size is 2.5; it must be int."),
    (
        "zero",
        "llama",
        lambda f: change(f, num_hidden_layers=0),
        "FOLDER/config.json: layers is 0; it must be at least 1.",
    ),
    ("no heads", "llama", lambda f: change(f, num_attention_heads=0, head_dim=...), "FOLDER/config.json: "),
    (
        "activation",
        "llama",
        lambda f: change(f, hidden_act="gelu"),
        "FOLDER/config.json: hidden_act is 'gelu'; it must ",
    ),
    (
        "activation",
        "gpt2",
        lambda f: change(f, activation_function="relu"),
        "FOLDER/config.json: activation_function is",
    ),
    (
        "scores",
        "gpt2",
        lambda f: change(f, scale_attn_weights=False),
        "FOLDER/config.json: scale_attn_weights is False; ",
    ),
    (
        "rope",
        "llama",
        lambda f: change(f, rope_parameters=ROPE),
        "FOLDER/config.json: rope_type is 'longrope'; the supported ones are default, linear, dynamic, llama3, yarn.",
    ),
    (
        "old rope",
        "qwen3",
        lambda f: change(f, rope_parameters=..., rope_scaling={"type": "linear"}),
        "FOLDER/config.json: rope_scaling of type linear lacks factor.",
    ),
    (
        "quantised",
        "llama",
        lambda f: change(f, quantization_config={"quant_method": "gptq"}),
        "FOLDER/config.json: quantization_config is given; weights must be float32, ",
    ),
    (
        "bytes",
        "llama",
        lambda f: weights(f, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "FOLDER/model.safetensors: model.norm.weight is int8; weights must be float32, ",
    ),
    ("rope is text", "llama", lambda f: change(f, rope_parameters="yarn"), "FOLDER/config.json: a value has the wrong"),
    (
        "partial rope",
        "llama",
        lambda f: change(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "FOLDER/config.json: partial_rotary_factor is 0.5; it must be 1.",
    ),
    (
        "windows",
        "qwen3",
        lambda f: change(f, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "chunked"]),
        "FOLDER/config.json: layer_types has 'chunked'; the supported ones are sliding_attention, full_attention.",
    ),
    (
        "biases",
        "qwen3",
        lambda f: change(f, attention_bias=True),
        "FOLDER: the tensor layers.0.self_attn.k_proj.bias is missing from the weights.",
    ),
    (
        "dtype",
        "llama",
        lambda f: change(f, dtype="int4"),
        "FOLDER/config.json: dtype is 'int4'; it must be one of float3",
    ),
    (
        "dtype is a list",
        "llama",
        lambda f: change(f, dtype=["a"]),
        "FOLDER/config.json: dtype is ['a']; it must be one of",
    ),
    (
        "too large",
        "llama",
        lambda f: change(f, vocab_size=10**15),
        "FOLDER: the config asks for 64000000000032928 parameters in 2 layers; the weights hold ",
    ),
    (
        "no weights",
        "llama",
        lambda f: (f / "model.safetensors").unlink(),
        "FOLDER/model.safetensors is missing; the wei",
    ),
    (
        "truncated",
        "llama",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "FOLDER/model.safetensors is not a readable safetensors file: ",
    ),
    (
        "empty",
        "llama",
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "FOLDER/model.safetensors is not a readable",
    ),
    (
        "a tensor less",
        "llama",
        lambda f: weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "FOLDER: the tensor layers.1.mlp.up_proj.weight is missing from the weights.",
    ),
    (
        "no head",
        "llama",
        lambda f: weights(f, lambda w: w.pop("lm_head.weight")),
        "FOLDER: the tensor lm_head.weight is",
    ),
    (
        "a tensor more",
        "llama",
        lambda f: weights(f, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)})),
        "FOLDER: the weights hold layers.2.mlp.up_proj.weight, which a LlamaForCausalLM of this config does not have.",
    ),
    (
        "another shape",
        "llama",
        lambda f: change(f, vocab_size=51),
        "FOLDER: the tensor embed_tokens.weight has shape (50, 32); the config asks for (51, 32).",
    ),
    (
        "q, k, v in no three parts",
        "gpt2",
        lambda f: weights(f, lambda w: w.update({"transformer.h.0.attn.c_attn.weight": torch.ones(32, 4)})),
        "FOLDER: the tensor transformer.h.0.attn.c_attn.weight has shape (32, 4); ",
    ),
    (
        "q, k, v in no matrix",
        "gpt2",
        lambda f: weights(f, lambda w: w.update({"transformer.h.0.attn.c_attn.weight": torch.ones(())})),
        "FOLDER: the tensor transformer.h.0.attn.c_attn.weight has shape (); ",
    ),
    (
        "no shard",
        "llama",
        lambda f: index(f, {"weight_map": {"a": "gone.safetensors"}}),
        "FOLDER/gone.safetensors is mis",
    ),
    (
        "no map",
        "llama",
        lambda f: index(f, {}),
        "FOLDER/model.safetensors.index.json is not an index of safetensors fi",
    ),
    (
        "bad map",
        "llama",
        lambda f: index(f, {"weight_map": {"a": 5}}),
        "FOLDER/model.safetensors.index.json is not an ",
    ),
    ("bad map", "llama", lambda f: index(f, {"weight_map": ["a"]}), "FOLDER/model.safetensors.index.json is not an "),
    (
        "bad index",
        "llama",
        lambda f: (f / "model.safetensors.index.json").write_text("?"),
        "FOLDER/model.safetensors.ind",
    ),
]


@pytest.mark.parametrize(("what", "kind", "how", "sentence"), CASES, ids=[f"{case[1]}: {case[0]}" for case in CASES])
def test_what_is_wrong_is_said(what: str, kind: str, how: Break, sentence: str, folder: Callable[[str], Path]) -> None:
    path = folder(kind)
    how(path)
    assert refused(path).startswith(sentence.replace("FOLDER", str(path)))


def test_a_shard_is_looked_for_in_the_folder_alone(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("llama")
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index(path, {"weight_map": {"a": "../outside.safetensors"}})
    with pytest.raises(FolderError, match=r"outside\.safetensors is missing"):
        load(path)


# ------------------------------------------------------------ whatever is wrong

values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_value_in_the_config_leads_to_another_exception(
    kind: str, data: st.DataObject, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A changed key is either refused in a sentence or makes no difference to what is loaded."""
    path = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(originals[kind], path)
    keys = sorted(json.loads((path / "config.json").read_text()))
    change(path, **data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2)))
    refused(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_the_weights_leads_to_another_exception(
    data: st.DataObject, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(originals["gpt2"], path)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    file.write_bytes(content)
    refused(path)
