"""Model folders in Hugging Face layout: config.json, model.safetensors, generation_config.json.

A decoder whose mathematics is Llama's, Qwen3's or GPT-2's is saved under that architecture's own name and weight
names, so that
every tool reads it with no code of ours; any other decoder is saved as HeedForCausalLM. One two-way table a family:
how the config is written and read, and where each weight lies. Parameters are stored unfused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lm.config import ConfigError, DecoderConfig
from lm.decoder import DecoderLM

OWN_ARCHITECTURE = "HeedForCausalLM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FolderError(ValueError):
    """A model folder that cannot be read: one sentence that names the file, what it holds and what would be right."""


@dataclass(frozen=True)
class Family:
    """One architecture of other tools: `is_ours(config)` tells whether a decoder is one of it, `write` and `read` map
    the config, `pack` and `unpack` the weights (by name, our state dict to the file's and back)."""

    architecture: str
    is_ours: Callable[[DecoderConfig], bool]
    write: Callable[[DecoderConfig], dict[str, Any]]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    unpack: Callable[[dict[str, Tensor]], dict[str, Tensor]]


# ---------------------------------------------------------------- Llama and Qwen3


def _is_llama_like(config: DecoderConfig) -> bool:
    return (
        (config.positions, config.norm, config.activation) == ("rotary", "rms", "swiglu")
        and config.window is None
        and config.softcap is None
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    values = {
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv,
        "head_dim": config.dim,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    return values


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    values = _write_llama(config)
    del values["mlp_bias"]
    return values | {"model_type": "qwen3", "use_sliding_window": False}


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FolderError(f"rope_type is {kind!r}; the supported one is default.")
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise FolderError(f"partial_rotary_factor is {share!r}; it must be 1.")
    if raw.get("hidden_act", "silu") != "silu":
        raise FolderError(f"hidden_act is {raw['hidden_act']!r}; it must be silu.")
    if raw.get("use_sliding_window"):
        raise FolderError("use_sliding_window is true; sliding windows are read from our own folders only.")
    bias, mlp_bias = bool(raw.get("attention_bias", False)), bool(raw.get("mlp_bias", False))
    if bias != mlp_bias:
        raise FolderError(f"attention_bias is {bias} and mlp_bias is {mlp_bias}; they must be equal.")
    heads = raw["num_attention_heads"]
    return {
        "vocab_size": raw["vocab_size"],
        "context": raw["max_position_embeddings"],
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "mlp_width": raw["intermediate_size"],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "bias": bias,
    }


def _pack_llama(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in weights.items()}


def _unpack_llama(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


# ---------------------------------------------------------------- GPT-2


def _is_gpt2(config: DecoderConfig) -> bool:
    return (
        (config.positions, config.norm, config.activation) == ("learned", "layer", "gelu_tanh")
        and config.bias
        and config.tie_embeddings
        and not config.qk_norm
        and config.window is None
        and config.softcap is None
        and config.kv == config.heads
        and config.heads * config.dim == config.width
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": config.width,
        "n_inner": config.inner,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


def _read_gpt2(raw: dict[str, Any]) -> dict[str, Any]:
    activation = raw.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise FolderError(f"activation_function is {activation!r}; it must be gelu_new or gelu_pytorch_tanh.")
    for key, right in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if raw.get(key, right) is not right:
            raise FolderError(f"{key} is {raw[key]!r}; it must be {right}.")
    return {
        "vocab_size": raw["vocab_size"],
        "context": raw["n_positions"],
        "layers": raw["n_layer"],
        "width": raw["n_embd"],
        "heads": raw["n_head"],
        "mlp_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "activation": "gelu_tanh",
        "norm": "layer",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "bias": True,
    }


# Ours to GPT-2's inside a layer. Its linear maps are stored [in, out], and q, k, v as one.
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}


def _pack_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in _GPT2_TOP:
            packed[f"transformer.{_GPT2_TOP[module]}.{kind}"] = tensor
            continue
        _, layer, inside = module.split(".", 2)
        if inside in _GPT2_LAYER:
            turned = tensor.t() if kind == "weight" and tensor.dim() == 2 else tensor
            packed[f"transformer.h.{layer}.{_GPT2_LAYER[inside]}.{kind}"] = turned
        elif inside == "self_attn.q_proj":
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            together = torch.cat([part.t() if kind == "weight" else part for part in parts], dim=-1)
            packed[f"transformer.h.{layer}.attn.c_attn.{kind}"] = together
    return packed


def _unpack_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    ours_layer, ours_top = {v: k for k, v in _GPT2_LAYER.items()}, {v: k for k, v in _GPT2_TOP.items()}
    unpacked: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        module, _, kind = name.rpartition(".")
        if module in ours_top:
            unpacked[f"{ours_top[module]}.{kind}"] = tensor
        elif match := re.fullmatch(r"h\.(\d+)\.(.+)", module):
            layer, inside = match.groups()
            if inside in ours_layer:
                turned = tensor.t() if kind == "weight" and tensor.dim() == 2 else tensor
                unpacked[f"layers.{layer}.{ours_layer[inside]}.{kind}"] = turned
            elif inside == "attn.c_attn":
                if tensor.dim() != (2 if kind == "weight" else 1) or tensor.shape[-1] % 3:
                    have = tuple(tensor.shape)
                    raise FolderError(
                        f"the tensor transformer.{name} has shape {have}; it must be q, k and v side by side."
                    )
                for part, piece in zip("qkv", tensor.chunk(3, dim=-1), strict=True):
                    unpacked[f"layers.{layer}.self_attn.{part}_proj.{kind}"] = piece.t() if kind == "weight" else piece
            elif inside != "attn" or kind not in ("bias", "masked_bias"):  # old files carry the causal mask as a buffer
                unpacked[name] = tensor
        else:
            unpacked[name] = tensor
    return unpacked


# ---------------------------------------------------------------- ours


def _write_own(config: DecoderConfig) -> dict[str, Any]:
    general = {  # what generic tools look for, under the usual names
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return {"model_type": "heed", **asdict(config), **general}


def _read_own(raw: dict[str, Any]) -> dict[str, Any]:
    optional = {field.name for field in fields(DecoderConfig) if field.default is not MISSING}
    required = {field.name: raw[field.name] for field in fields(DecoderConfig) if field.name not in optional}
    return required | {name: value for name, value in raw.items() if name in optional}


FAMILIES = (
    Family(
        "Qwen3ForCausalLM",
        lambda config: _is_llama_like(config) and config.qk_norm and not config.bias,
        _write_qwen3,
        lambda raw: _read_llama(raw) | {"qk_norm": True},
        _pack_llama,
        _unpack_llama,
    ),
    Family(
        "LlamaForCausalLM",
        lambda config: _is_llama_like(config) and not config.qk_norm,
        _write_llama,
        _read_llama,
        _pack_llama,
        _unpack_llama,
    ),
    Family("GPT2LMHeadModel", _is_gpt2, _write_gpt2, _read_gpt2, _pack_gpt2, _unpack_gpt2),
    Family(OWN_ARCHITECTURE, lambda config: True, _write_own, _read_own, _pack_llama, _unpack_llama),
)


def family_of(config: DecoderConfig) -> Family:
    """The first family whose mathematics the decoder's is; ours is the last resort."""
    return next(family for family in FAMILIES if family.is_ours(config))


# ---------------------------------------------------------------- folders


def save(
    model: DecoderLM,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the folder, aside and renamed: a folder that exists is complete. `dtype` is the one it is meant to be
    served in.

    tokenizer: an lm.tokenizer.Tokenizer, saved beside the weights; its EOS and BOS ids go into the configs (none is
    legal). weights: the state dict to write in place of the model's own (gathered from shards, or averaged).
    """
    target = Path(folder)
    aside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    family = family_of(model.config)
    name = next(key for key, value in DTYPES.items() if value == dtype)
    special = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )  # said even when none, against foreign defaults
    if tokenizer is not None:
        tokenizer.save(aside)
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    values = {"architectures": [family.architecture], **family.write(model.config), **special, "dtype": name}
    _write_json(aside / "config.json", values)
    _write_json(aside / "generation_config.json", {key: value for key, value in special.items() if value is not None})
    packed = family.pack(model.state_dict() if weights is None else weights)
    save_file(
        {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in packed.items()},
        aside / "model.safetensors",
        metadata={"format": "pt"},
    )
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The decoder that a folder's config.json describes. Raises FolderError."""
    return _read_config(Path(folder))[0]


def load(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DecoderLM:
    """The folder's decoder, in `dtype` (None: the folder's own), ready for inference (`eval`). Raises FolderError."""
    path = Path(folder)
    config, family, raw = _read_config(path)
    if dtype is None:
        name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if not isinstance(name, str) or name not in DTYPES:
            raise FolderError(f"{path / 'config.json'}: dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
        dtype = DTYPES[name]
    try:
        with _Uninitialised():
            model = DecoderLM(config)
    except (MemoryError, RuntimeError):
        raise FolderError(f"{path}: the config's model does not fit into memory.") from None
    stored = _read_weights(path)
    try:
        unpacked = family.unpack(stored)
    except FolderError as error:
        raise FolderError(f"{path}: {error}") from None
    weights = {key: t.to(device, dtype).contiguous() for key, t in unpacked.items()}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    expected = model.state_dict()
    for missing in sorted(expected.keys() - weights.keys()):
        raise FolderError(f"{path}: the tensor {missing} is missing from the weights.")
    for extra in sorted(weights.keys() - expected.keys()):
        raise FolderError(
            f"{path}: the weights hold {extra}, which a {family.architecture} of this config does not have."
        )
    for key, tensor in expected.items():
        if weights[key].shape != tensor.shape:
            have, want = tuple(weights[key].shape), tuple(tensor.shape)
            raise FolderError(f"{path}: the tensor {key} has shape {have}; the config asks for {want}.")
    model.load_state_dict(weights, assign=True)
    model.positions = model.position_table(torch.device(device))
    return model.eval()


class _Uninitialised(TorchFunctionMode):
    """Leaves out what torch.nn.init does, for weights that are about to be replaced: their memory is never touched
    then.

    (The meta device would do as well, but its first operators import torch's compiler, which takes more than a second.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _read_config(path: Path) -> tuple[DecoderConfig, Family, dict[str, Any]]:
    file = path / "config.json"
    if not path.is_dir():
        raise FolderError(f"{path} is not a folder; a model is a folder with config.json and model.safetensors.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{path} has no config.json; a model is a folder with config.json and model.safetensors."
        ) from None
    except (ValueError, OSError) as error:
        raise FolderError(f"{file} cannot be read as JSON: {error}.") from None
    names = raw.get("architectures") if isinstance(raw, dict) else None
    by_name = {family.architecture: family for family in FAMILIES}
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or names[0] not in by_name:
        raise FolderError(f"{file}: architectures is {names!r}; the supported ones are {', '.join(sorted(by_name))}.")
    family = by_name[names[0]]
    try:
        return DecoderConfig(**family.read(raw)), family, raw
    except KeyError as error:
        raise FolderError(f"{file}: the key {error.args[0]} is missing; a {family.architecture} needs it.") from None
    except ConfigError as error:
        raise FolderError(f"{file}: {' '.join(error.problems)}") from None
    except FolderError as error:
        raise FolderError(f"{file}: {error}") from None
    except (AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise FolderError(f"{file}: a value has the wrong type ({error}).") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = sorted({Path(file).name for file in files})  # in this folder, whatever the index says
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise FolderError(f"{index} is not an index of safetensors files; it must hold a weight_map.") from None
    else:
        shards = ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for shard in shards:
        file = path / shard
        if not file.exists():
            raise FolderError(f"{file} is missing; the weights must lie there.")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no dictionary
                    weights[key] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{file} is not a readable safetensors file: {error}.") from None
    return weights


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
