"""Architectures of other tools, each as one two-way table: config keys, weight names, how weights are turned and split.

A decoder whose mathematics is one of theirs is saved under their name and read by every tool; any other is
HeedForCausalLM. The encoder-decoders have no relatives: HeedTransformer and HeedRNNSearch. `lm.pretrained` reads and
writes the files; this module touches none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lm.architectures import ARCHITECTURES, Architecture
from lm.config import ROPE_SCALINGS, DecoderConfig

OWN_ARCHITECTURE = ARCHITECTURES["decoder"].folder
Values = dict[str, Any]
Weights = dict[str, Tensor]


class FolderError(ValueError):
    """A model that cannot be read: one sentence that names the file, what it holds and what would be right."""


@dataclass(frozen=True)
class Family:
    """One architecture: `is_ours(config)` tells whether a decoder is one of it, `write` and `read` map the config,
    `pack` and `unpack` the weights (by name, our state dict to the file's and back). Reading raises FolderError or
    KeyError."""

    architecture: str  # as config.json names it
    is_ours: Callable[[Any], bool]
    write: Callable[[Any], Values]
    read: Callable[[Values], Values]
    pack: Callable[[Weights], Weights]
    unpack: Callable[[Weights], Weights]
    of: str = "decoder"  # which of lm.architectures it is


# ---------------------------------------------------------------- Llama and its relatives

# Ours to theirs.
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True)
class _Relative:
    """What sets a relative of Llama apart from the others."""

    model_type: str
    biases: tuple[str, ...] = ("none",)  # DecoderConfig.bias that it can have
    qk_norm: bool = False
    windows: str = "none"  # of its layers, which slide: none, all (or none), any
    own_head_dim: bool = True  # false: always width / heads
    width_in_heads: bool = False  # whether its width must be a multiple of its heads, whatever head_dim is
    rope_free: bool = False  # whether layers without rotation are possible
    defaults: Sequence[tuple[str, Any]] = ()  # of transformers' class, for keys that the file leaves out


def _relative(architecture: str, kind: _Relative) -> Family:
    return Family(
        architecture,
        lambda config: config.architecture == "decoder" and _is_relative(config, kind),
        lambda config: _write_relative(config, kind),
        lambda raw: _read_relative(dict(kind.defaults) | raw, kind),
        _pack_llama,
        _unpack_llama,
    )


def _is_relative(config: DecoderConfig, kind: _Relative) -> bool:
    slides = [window is not None for window in config.windows()]
    scaling = config.rope_scaling or {}
    beyond = scaling.get("rope_type") == "dynamic" and scaling["original_max_position_embeddings"] != config.context
    return (
        (config.positions, config.norm, config.activation) == ("rotary", "rms", "swiglu")
        and config.softcap is None
        and not config.prefix
        and config.qk_norm == kind.qk_norm
        and config.bias in kind.biases
        and (not any(slides) or kind.windows == "any" or (kind.windows == "all" and all(slides)))
        and (kind.own_head_dim or config.heads * config.dim == config.width)
        and not (kind.width_in_heads and config.width % config.heads)
        and all(config.rotates()) != kind.rope_free
        and not beyond  # theirs is always made for max_position_embeddings
    )


def _write_relative(config: DecoderConfig, kind: _Relative) -> Values:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | (config.rope_scaling or {})
    if rope["rope_type"] == "dynamic":
        del rope["original_max_position_embeddings"]
    values: Values = {"model_type": kind.model_type}
    ours = asdict(config)
    values |= {theirs: ours[name] for name, theirs in _LLAMA_KEYS.items()}
    values |= {"head_dim": config.dim, "hidden_act": "silu", "attention_dropout": 0.0}
    values |= {"rope_parameters": rope, "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:  # where tools of before transformers 5 look for it
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "attention" in kind.biases:
        values["attention_bias"] = config.bias in ("attention", "all")
    if "mlp" in kind.biases:
        values["mlp_bias"] = config.bias in ("mlp", "all")
    slides = [window is not None for window in config.windows()]
    if kind.windows != "none":
        values["sliding_window"] = config.window
    if kind.windows == "any":
        values["use_sliding_window"] = any(slides)
        values["max_window_layers"] = slides.index(True) if any(slides) else config.layers
        values["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if kind.rope_free:
        values["no_rope_layers"] = [int(turns) for turns in config.rotates()]
    return values


def _read_relative(raw: Values, kind: _Relative) -> Values:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise FolderError(f"hidden_act is {raw['hidden_act']!r}; it must be silu.")
    values = {name: raw[theirs] for name, theirs in _LLAMA_KEYS.items() if theirs in raw or name in _NEEDED}
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    values["kv_heads"] = raw.get("num_key_value_heads") or heads
    values["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    values["norm_eps"] = raw.get("rms_norm_eps", 1e-6)
    values["tie_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    values["qk_norm"] = kind.qk_norm
    attention, mlp = bool(raw.get("attention_bias", False)), bool(raw.get("mlp_bias", False))
    named = {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}
    if len(kind.biases) == 1:
        values["bias"] = kind.biases[0]
    else:
        values["bias"] = named[attention, mlp and "mlp" in kind.biases]
    values |= _read_rope(raw)
    turns = _no_rope_layers(raw, layers) if kind.rope_free else [True] * layers
    values["rope_pattern"] = pattern(["R" if turn else "N" for turn in turns])
    slides = _slides(raw, layers, kind, turns)
    if any(slides):
        values["window"] = raw["sliding_window"]
        values["window_pattern"] = pattern(["S" if slide else "L" for slide in slides])
    return values


_NEEDED = {"vocab_size", "context", "layers", "width", "heads", "mlp_width"}


def _read_rope(raw: Values) -> Values:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise FolderError("rope_parameters are given by kind of layer; they must be the same for all layers.")
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise FolderError(f"partial_rotary_factor is {share!r}; it must be 1.")
    theta = next(v for v in (rope.get("rope_theta"), raw.get("rope_theta"), 10_000.0) if v is not None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = sum(ROPE_SCALINGS[kind], ()) if isinstance(kind, str) and kind in ROPE_SCALINGS else ()
    if kind == "dynamic":
        known = ("factor",)  # theirs is always made for max_position_embeddings
    scaling = {"rope_type": kind} | {name: value for name, value in rope.items() if name in known}
    return {"rope_theta": float(theta), "rope_scaling": None if kind == "default" else scaling}


def _no_rope_layers(raw: Values, layers: int) -> list[bool]:
    turns = raw.get("no_rope_layers")
    if turns is None:
        interval = raw.get("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(turns) < layers:
        raise FolderError(f"no_rope_layers has {len(turns)} entries; it must have one for each of {layers} layers.")
    return [bool(turn) for turn in turns[:layers]]


def _slides(raw: Values, layers: int, kind: _Relative, turns: Sequence[bool]) -> list[bool]:
    """Which layers have a sliding window."""
    if kind.windows == "none" or raw.get("sliding_window") is None:
        return [False] * layers
    if kind.windows == "all":
        return [True] * layers
    if not raw.get("use_sliding_window", False):
        return [False] * layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return [not turn for turn in turns] if kind.rope_free else [layer >= first for layer in range(layers)]
    for name in types:
        if name not in ("sliding_attention", "full_attention"):
            raise FolderError(f"layer_types has {name!r}; the supported ones are sliding_attention, full_attention.")
    if len(types) != layers:
        raise FolderError(f"layer_types has {len(types)} entries; it must have one for each of {layers} layers.")
    return [name == "sliding_attention" for name in types]


def pattern(marks: Sequence[str]) -> str:
    """The shortest text that, repeated over the layers, gives `marks`."""
    for length in range(1, len(marks) + 1):
        if all(mark == marks[place % length] for place, mark in enumerate(marks)):
            return "".join(marks[:length])
    return "".join(marks)


def _pack_llama(weights: Weights) -> Weights:
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in weights.items()}


def _unpack_llama(weights: Weights) -> Weights:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if not name.endswith("rotary_emb.inv_freq")  # a table that old files carry
    }


# ---------------------------------------------------------------- GPT-2

_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# What would be other mathematics: the only value that is read.
_GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def _is_gpt2(config: DecoderConfig) -> bool:
    return (
        (config.positions, config.norm) == ("learned", "layer")
        and config.activation in _GPT2_ACTIVATIONS.values()
        and config.bias == "all"
        and not config.qk_norm
        and not config.prefix
        and not any(config.windows())
        and config.softcap is None
        and config.kv == config.heads
        and config.heads * config.dim == config.width
    )


def _write_gpt2(config: DecoderConfig) -> Values:
    ours = asdict(config)
    return {
        "model_type": "gpt2",
        **{theirs: ours[name] for name, theirs in _GPT2_KEYS.items()},
        "n_inner": config.inner,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_gpt2(raw: Values) -> Values:
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        right = ", ".join(_GPT2_ACTIVATIONS)
        raise FolderError(f"activation_function is {activation!r}; it must be one of {right}.")
    for key, fixed in _GPT2_FIXED.items():
        if raw.get(key, fixed) is not fixed:
            raise FolderError(f"{key} is {raw[key]!r}; it must be {fixed}.")
    return {name: raw[theirs] for name, theirs in _GPT2_KEYS.items()} | {
        "mlp_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "activation": _GPT2_ACTIVATIONS[activation],
        "norm": "layer",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "bias": "all",
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


def _pack_gpt2(weights: Weights) -> Weights:
    packed: Weights = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in _GPT2_TOP:
            packed[f"transformer.{_GPT2_TOP[module]}.{kind}"] = tensor
            continue
        if module == "lm_head":
            packed[name] = tensor
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


def _unpack_gpt2(weights: Weights) -> Weights:
    ours_layer, ours_top = {v: k for k, v in _GPT2_LAYER.items()}, {v: k for k, v in _GPT2_TOP.items()}
    unpacked: Weights = {}
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


def write_own(config: DecoderConfig) -> Values:
    """Our own config keys, and those by which generic tools find the shape."""
    general = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return {"model_type": ARCHITECTURES["decoder"].model_type, **asdict(config), **general}


def read_own(raw: Values) -> Values:
    """The DecoderConfig fields among the keys."""
    return _fields_among(raw, DecoderConfig)


def _fields_among(raw: Values, kind: Any) -> Values:
    required = {field.name for field in fields(kind) if field.default is MISSING}
    optional = {field.name for field in fields(kind)} - required
    return {name: raw[name] for name in required} | {name: raw[name] for name in optional if name in raw}


# The names under which transformers knows what an encoder-decoder's config says under ours.
_GENERAL = {"decoder_start_token_id": "start_id", "max_position_embeddings": "context"}


def _encoder_decoder(kind: Architecture) -> Family:
    def write(config: Any) -> Values:
        ours = asdict(config)
        general = {theirs: ours[name] for theirs, name in _GENERAL.items()}
        del ours["start_id"]
        return {"model_type": kind.model_type, "is_encoder_decoder": True, **ours, **general}

    def read(raw: Values) -> Values:
        if raw.get("is_encoder_decoder", True) is not True:
            raise FolderError(f"is_encoder_decoder is {raw['is_encoder_decoder']!r}; of a {kind.folder} it is true.")
        for theirs, name in _GENERAL.items():
            if name in raw and raw.get(theirs, raw[name]) != raw[name]:
                raise FolderError(f"{theirs} is {raw[theirs]!r} and {name} {raw[name]!r}; they must be the same.")
        named = {name: raw[theirs] for theirs, name in _GENERAL.items() if theirs in raw}
        if "decoder_start_token_id" not in raw and "start_id" not in raw:
            raise KeyError("decoder_start_token_id")
        return _fields_among(named | raw, kind.config_class)

    return Family(
        kind.folder,
        lambda config: config.architecture == kind.name,
        write,
        read,
        lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        of=kind.name,
    )


# ---------------------------------------------------------------- all of them

_QWEN = (("sliding_window", 4096), ("max_window_layers", 28))

FAMILIES = (
    _relative("LlamaForCausalLM", _Relative("llama", biases=("none", "attention", "mlp", "all"), width_in_heads=True)),
    _relative(
        "Qwen3ForCausalLM",
        _Relative(
            "qwen3",
            biases=("none", "attention"),
            qk_norm=True,
            windows="any",
            defaults=(*_QWEN, ("head_dim", 128)),
        ),
    ),
    _relative(
        "Qwen2ForCausalLM",
        _Relative("qwen2", biases=("qkv",), windows="any", own_head_dim=False, defaults=_QWEN),
    ),
    _relative(
        "MistralForCausalLM",
        _Relative("mistral", windows="all", defaults=(("num_key_value_heads", 8), ("sliding_window", 4096))),
    ),
    _relative(
        "SmolLM3ForCausalLM",
        _Relative(
            "smollm3",
            biases=("none", "attention", "mlp", "all"),
            windows="any",
            own_head_dim=False,
            rope_free=True,
            defaults=(("num_key_value_heads", 4), ("rope_theta", 2e6), ("tie_word_embeddings", True)),
        ),
    ),
    Family(
        "GPT2LMHeadModel",
        lambda config: config.architecture == "decoder" and _is_gpt2(config),
        _write_gpt2,
        _read_gpt2,
        _pack_gpt2,
        _unpack_gpt2,
    ),
    Family(
        OWN_ARCHITECTURE,
        lambda config: config.architecture == "decoder",
        write_own,
        read_own,
        lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()},
        _unpack_llama,
    ),
    *(_encoder_decoder(kind) for name, kind in ARCHITECTURES.items() if name != "decoder"),
)


def family_of(config: Any, preferred: str | None = None) -> Family:
    """The family of the architecture `preferred` if the model's mathematics is its, else the first whose it is; ours
    is the last resort.
    """
    possible = [family for family in FAMILIES if family.is_ours(config)]
    return next((family for family in possible if family.architecture == preferred), possible[0])
