"""Other tools' architectures with every option of their configs: read, trained and given back to equal logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import DecoderLM
from lm.attention import CausalAttend
from lm.families import family_of, pattern
from lm.pretrained import FolderError, load, read_config, save

EXAMPLES = 6  # of each family
PLAIN = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}


@torch.no_grad()
def ours(model: DecoderLM, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.logits(model.hidden(tokens, positions, CausalAttend(model.config.windows())))


@torch.no_grad()
def theirs(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """The name of the class that transformers takes for a folder, and its logits in fp32."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return type(model).__name__, model.eval()(tokens).logits


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-4, of the largest logit where that is above 1."""
    torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, float(a.abs().max())), rtol=0)


def foreign(architecture: str, values: dict[str, Any]) -> Any:
    """A model of transformers' own, with no value left at what it is initialised to."""
    import transformers

    config = getattr(transformers, architecture).config_class(**values)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------ configs


@st.composite
def ropes(draw: st.DrawFn, context: int) -> dict[str, Any]:
    """rope_parameters as new configs have them, or rope_theta and rope_scaling as old ones have."""
    factor, original = draw(st.floats(1, 8)), draw(st.integers(8, context))
    scaling = draw(
        st.sampled_from(
            [
                None,
                {"rope_type": "linear", "factor": factor},
                {"rope_type": "dynamic", "factor": factor},
                {"rope_type": "yarn", "factor": factor},
                {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 9.0},
                {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                },
            ]
        )
    )
    theta = draw(st.sampled_from([1e4, 5e5, 123.0]))
    if draw(st.booleans()):
        return {"rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta}}
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


@st.composite
def relatives(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """Any config of Llama, Qwen2, Qwen3, Mistral or SmolLM3, small."""
    kv, group, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    heads, context, layers = kv * group, draw(st.integers(8, 40)), draw(st.integers(1, 4))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 60)),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": context,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_dropout": 0.1,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        **draw(ropes(context)),
    }
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"):
        values["head_dim"] = draw(st.sampled_from([head_dim, 6, 16]))
    if architecture in ("LlamaForCausalLM", "SmolLM3ForCausalLM", "Qwen3ForCausalLM"):
        values["attention_bias"] = draw(st.booleans())
    if architecture in ("LlamaForCausalLM", "SmolLM3ForCausalLM"):
        values["mlp_bias"] = draw(st.booleans())
    if architecture == "MistralForCausalLM":
        values["sliding_window"] = draw(st.none() | st.integers(1, 9))
    kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM") and draw(st.booleans()):
        values |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 9))}
        if draw(st.booleans()):
            values["layer_types"] = draw(kinds)
        elif architecture != "SmolLM3ForCausalLM":
            values["max_window_layers"] = draw(st.integers(0, layers))
    if architecture == "SmolLM3ForCausalLM":
        if draw(st.booleans()):
            values["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
        else:
            values["no_rope_layer_interval"] = draw(st.integers(1, 3))
    return values


@st.composite
def gpt2s(draw: st.DrawFn) -> dict[str, Any]:
    """Any config of GPT-2, small."""
    heads = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(5, 60)),
        "n_positions": draw(st.integers(8, 40)),
        "n_embd": heads * draw(st.sampled_from([4, 7])),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_inner": draw(st.none() | st.integers(1, 40)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu_pytorch_tanh", "gelu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "attn_pdrop": draw(st.sampled_from([0.0, 0.1])),
        "bos_token_id": None,
        "eos_token_id": 0,
    }


ARCHITECTURES = {
    **{
        name: relatives(name)
        for name in (
            "LlamaForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "MistralForCausalLM",
            "SmolLM3ForCausalLM",
        )
    },
    "GPT2LMHeadModel": gpt2s(),
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would load hundreds of models
)
@given(data=st.data())
def test_any_config_comes_in_is_trained_and_goes_out(
    architecture: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Equal logits on the way in; a step of training changes them; equal logits on the way out, by transformers."""
    values = data.draw(ARCHITECTURES[architecture])
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    folder = tmp_path_factory.mktemp("families")
    shards = {"max_shard_size": "5KB"} if data.draw(st.booleans()) else {}
    original = foreign(architecture, values)
    for parameter in original.parameters():
        parameter.data = parameter.to(dtype).float()
    copy.deepcopy(original).to(dtype).save_pretrained(folder / "theirs", **shards)

    assert all(p.dtype == dtype for p in load(folder / "theirs").parameters())
    model = load(folder / "theirs", torch.float32)
    config = model.config
    tokens = torch.randint(config.vocab_size, (2, min(config.context, 30)), generator=torch.Generator().manual_seed(1))
    before = ours(model, tokens)
    with torch.no_grad():
        close(before, original(tokens).logits)

    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    loss, count, _ = model({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    (loss / count).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    after = ours(model.eval(), tokens)
    assert not torch.equal(before, after)

    save(model, folder / "ours", shard_bytes=data.draw(st.sampled_from([2_000, 10**9])))
    assert read_config(folder / "ours") == config
    assert torch.equal(ours(load(folder / "ours"), tokens), after)
    name, logits = theirs(folder / "ours", tokens)
    close(logits, after)
    # The same family again, unless it is another's mathematics as well: a SmolLM3 that rotates in every layer, say.
    assert name == family_of(config).architecture
    assert name == architecture or architecture in ("SmolLM3ForCausalLM", "MistralForCausalLM")


# ------------------------------------------------------------ what decides


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"bias": "mlp"}, "LlamaForCausalLM"),
        ({"bias": "all"}, "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "LlamaForCausalLM"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 24}},
            "HeedForCausalLM",
        ),
        ({"width": 30, "head_dim": 8}, "MistralForCausalLM"),  # transformers' Llama refuses such a width
        ({"bias": "qkv"}, "Qwen2ForCausalLM"),
        ({"bias": "qkv", "window": 4, "window_pattern": "LS"}, "Qwen2ForCausalLM"),
        ({"bias": "qkv", "head_dim": 16}, "HeedForCausalLM"),
        ({"bias": "qkv", "qk_norm": True}, "HeedForCausalLM"),
        ({"qk_norm": True, "window": 4, "window_pattern": "SL"}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "bias": "attention"}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "bias": "all"}, "HeedForCausalLM"),
        ({"window": 4, "window_pattern": "S"}, "MistralForCausalLM"),
        ({"window": 4, "window_pattern": "SL"}, "HeedForCausalLM"),
        ({"rope_pattern": "RN"}, "SmolLM3ForCausalLM"),
        ({"rope_pattern": "RN", "window": 4, "window_pattern": "LS"}, "SmolLM3ForCausalLM"),
        ({"rope_pattern": "RN", "qk_norm": True}, "HeedForCausalLM"),
    ],
)
def test_the_mathematics_decides(options: dict[str, Any], architecture: str, make: Callable[..., DecoderLM]) -> None:
    assert family_of(make(**options).config).architecture == architecture


@given(st.text("SL", min_size=1, max_size=4), st.integers(1, 5))
def test_a_pattern_is_the_shortest_that_repeats(text: str, times: int) -> None:
    found = pattern(list(text * times))
    assert len(found) <= len(text)
    assert (found * len(text * times))[: len(text * times)] == text * times


# ------------------------------------------------------------ defaults and refusals


def write(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_keys_that_old_files_leave_out_are_what_transformers_takes_for_them(tmp_path: Path) -> None:
    plain = PLAIN | {"max_position_embeddings": 64}
    llama = read_config(write(tmp_path / "a", architectures=["LlamaForCausalLM"], **plain))
    assert (llama.kv, llama.dim, llama.norm_eps, llama.rope_theta) == (4, 8, 1e-6, 1e4)
    assert (llama.tie_embeddings, llama.bias, llama.window) == (False, "none", None)
    qwen3 = read_config(write(tmp_path / "b", architectures=["Qwen3ForCausalLM"], **plain))
    assert (qwen3.dim, qwen3.window) == (128, None)
    mistral = read_config(write(tmp_path / "c", architectures=["MistralForCausalLM"], **plain, num_key_value_heads=2))
    assert (mistral.window, mistral.window_pattern) == (4096, "S")
    smollm3 = read_config(
        write(tmp_path / "d", architectures=["SmolLM3ForCausalLM"], **plain | {"num_hidden_layers": 8})
    )
    assert (smollm3.rope_pattern, smollm3.rope_theta, smollm3.tie_embeddings) == ("RRRN", 2e6, True)
    old = read_config(
        write(
            tmp_path / "e",
            architectures=["LlamaForCausalLM"],
            **plain,
            rope_theta=5e5,
            rope_scaling={"type": "yarn", "factor": 2.0, "finetuned": True},  # before transformers 4.45
        )
    )
    assert old.rope_theta == 5e5
    assert old.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "values", "sentence"),
    [
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries; it must have one for each of 2"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "a value has the wrong type (integer modulo by zero)"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            "layer_types has 1 entries; it must have one for each of 2 layers.",
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": "4", "max_window_layers": 0},
            "window is '4'; it must be int or left out.",
        ),
        ("MistralForCausalLM", {"sliding_window": -1}, "window is -1; it must be at least 1, or left out."),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters are given by kind of layer; they must be the same for all layers.",
        ),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "su"}}, "rope_type is 'su'; the supported ones are default, "),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": 4}}, "rope_type is 4; the supported ones are default, "),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    architecture: str, values: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    plain = PLAIN | {"max_position_embeddings": 64, "num_key_value_heads": 2}
    with pytest.raises(FolderError) as refused:
        read_config(write(tmp_path / "model", architectures=[architecture], **plain | values))
    assert str(refused.value).startswith(f"{tmp_path / 'model' / 'config.json'}: {sentence}")


def test_a_large_folder_is_sharded(make: Callable[..., DecoderLM], tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "model", shard_bytes=40_000)
    names = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    assert all(file.stat().st_size < 50_000 for file in (tmp_path / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.config.parameters()["total"]
    assert set(index["weight_map"].values()) == set(names)
    other = load(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
