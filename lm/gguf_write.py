"""A GGUF file from a model folder's parts, for llama.cpp and what is built on it: Llama, Qwen2 and Qwen3 decoders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.config import DecoderConfig
from lm.decoder import DecoderLM
from lm.families import FolderError, family_of
from lm.gguf import ARCHITECTURES, LAYER, OWN_SCALING, ROPE_FACTORS, TOP, neighbours
from lm.gguf_tokenizer import metadata
from lm.positions import rotary_frequencies
from lm.tokenizer import Tokenizer

# dtype -> the library's name for it, and for a file that is mostly of it.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_NAMES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def write(model: DecoderLM, tokenizer: Tokenizer | None, file: str | os.PathLike[str], dtype: str, name: str) -> None:
    """Write the file, aside and renamed. `dtype` (of DTYPES) is that of the matrices; vectors are float32.

    q8_0 rounds blocks of 32 numbers, so rows must be multiples of 32. Raises FolderError for a decoder that GGUF has no
    name for, TokenizerError for such a tokenizer.
    """
    import gguf

    target = Path(file)
    architecture = _architecture(model.config)
    kind, file_type = DTYPES[dtype]
    widths = {parameter.shape[-1] for parameter in model.parameters() if parameter.dim() == 2}
    if dtype == "q8_0" and any(width % 32 for width in widths):
        raise FolderError(f"The matrices have rows of {sorted(widths)}; for q8_0 they must be multiples of 32.")
    extra = metadata(tokenizer, model.config.vocab_size) if tokenizer is not None else {}
    aside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    writer = gguf.GGUFWriter(aside, architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in _values(model.config).items():
            _add(writer, f"{architecture}.{key}", value)
        if (model.config.rope_scaling or {}).get("rope_type") == "llama3":
            for key, value in (model.config.rope_scaling or {}).items():
                if key != "rope_type":
                    _add(
                        writer, OWN_SCALING + key, float(value) if key != "original_max_position_embeddings" else value
                    )
        for key, value in extra.items():
            _add(writer, f"tokenizer.{key}", value)
        for key, tensor in _tensors(model, ARCHITECTURES[architecture]):
            values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
            writer.add_tensor(key, gguf.quantize(values, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _architecture(config: DecoderConfig) -> str:
    name = _NAMES.get(family_of(config).architecture)
    if name is None or any(config.windows()) or (name == "qwen3" and config.bias != "none"):
        raise FolderError(
            f"The model is a {family_of(config).architecture}; what can be written as GGUF are "
            f"{', '.join(_NAMES)} without sliding windows."
        )
    if (config.rope_scaling or {}).get("rope_type") == "yarn":
        known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        if other := sorted(set(config.rope_scaling or {}) - known):
            raise FolderError(f"rope_scaling has {', '.join(other)}; GGUF has no key for it.")
    return name


def _values(config: DecoderConfig) -> dict[str, Any]:
    """The architecture's own keys."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.inner,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv,
        "attention.key_length": config.dim,
        "attention.value_length": config.dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.dim,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        values["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if name in scaling:
                values[f"rope.scaling.yarn_{name}"] = float(scaling[name])
    return values


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def _tensors(model: DecoderLM, turned: bool) -> Iterator[tuple[str, Tensor]]:
    """The file's names and tensors; `turned`: q and k go into llama.cpp's order."""
    config = model.config
    theirs = {ours: name for name, ours in (TOP | LAYER).items()}
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain = rotary_frequencies(config.dim, config.rope_theta, None, config.context)[0]
        scaled = rotary_frequencies(config.dim, config.rope_theta, config.rope_scaling, config.context)[0]
        yield ROPE_FACTORS, plain / scaled
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in theirs:
            yield f"{theirs[module]}.{kind}", tensor
            continue
        _, layer, inside = module.split(".", 2)
        if turned and inside in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = neighbours(tensor, config.heads if inside == "self_attn.q_proj" else config.kv)
        yield f"blk.{layer}.{theirs[inside]}.{kind}", tensor
