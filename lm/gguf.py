"""GGUF files (llama.cpp's): the header, the decoder that it describes, and its weights.

The header is read here and not by the library's reader, which takes seconds for a vocabulary and believes every length
it reads: each is held against the size of the file first, so that a broken file costs a sentence and nothing else. What
the bytes of a tensor mean is the library's: `gguf.dequantize`.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.config import BIASES, ConfigError, DecoderConfig
from lm.families import FolderError
from lm.positions import rotary_frequencies

# General.Type in the file -> how a number of it is packed.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # at most, of a tensor
GROUP = 2304  # elements in a row that gguf.dequantize is given: it takes 16 rows at a time, which then fit the cache


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file: torch's shape, the file's type, the first byte and the number of bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A file's header: metadata by key (numbers, strings, bools and lists of them), tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own: get("block_count") of a llama is llama.block_count."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """The same, which must be there. Raises FolderError."""
        value = self.get(key)
        if value is None:
            raise FolderError(f"{self.path}: the key {self.architecture}.{key} is missing; a decoder needs it.")
        return value


# ---------------------------------------------------------------- the header


def read(path: str | os.PathLike[str]) -> GGUF:
    """The header of a GGUF file. Raises FolderError."""
    path = Path(path)
    try:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if opened.read(4) != b"GGUF":
                raise FolderError(f"{path} is no GGUF file; a file of a model must be one, else it is a folder.")
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        with data:
            return _header(path, _Cursor(data, 4, size))
    except _Broken as error:
        raise FolderError(f"{path} is not a readable GGUF file: {error}.") from None


class _Broken(ValueError):
    pass


class _Cursor:
    """Reads what comes next; never more than there is."""

    def __init__(self, data: mmap.mmap, place: int, size: int):
        self.data, self.place, self.size = data, place, size

    def take(self, count: int) -> int:
        """Moves on by `count` bytes; where they begin."""
        begin = self.place
        if count > self.size - begin:
            raise _Broken(f"byte {begin} begins {count} bytes, and the file has {self.size}")
        self.place = begin + count
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken(f"the text at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            return _short(self.number(code)) if code == "f" else self.number(code)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Broken(f"byte {self.place} has a value of type {kind}, which there is not")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            if count > (self.size - self.place) // 8:
                raise _Broken(f"byte {self.place} begins {count} texts, and the file has {self.size} bytes")
            return [self.string() for _ in range(count)]
        if inner not in _NUMBERS:
            raise _Broken(f"byte {self.place} begins a list of type {inner}, which is not read")
        code = _NUMBERS[inner]
        begin = self.take(struct.calcsize(code) * count)
        return list(struct.unpack_from(f"<{count}{code}", self.data, begin))


def _short(value: float) -> float:
    """A float32 as the shortest decimal that it stands for: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _header(path: Path, cursor: _Cursor) -> GGUF:
    version = cursor.number("I")
    if version not in (2, 3):
        big = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
        raise _Broken(f"its version is {version}{big}, and those that are read are 2 and 3, little-endian")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    for count, least, what in ((keys, 13, "keys"), (tensors, 28, "tensors")):
        if count > cursor.size // least:
            raise _Broken(f"it claims {count} {what}, and the file has {cursor.size} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.string()
        if name in metadata:
            raise _Broken(f"the key {name} is there twice")
        metadata[name] = cursor.value(cursor.number("I"))
    infos = []
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > _DIMENSIONS:
            raise _Broken(f"the tensor {name} has {dimensions} dimensions, and there are {_DIMENSIONS} at most")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        infos.append((name, shape[::-1], cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {alignment!r}, and it must be a power of two")
    begin = -(-cursor.place // alignment) * alignment
    return GGUF(path, metadata, _tensors(infos, begin, cursor.size))


def _tensors(infos: Iterable[tuple[str, tuple[int, ...], int, int]], begin: int, size: int) -> dict[str, Stored]:
    import gguf

    found: dict[str, Stored] = {}
    total = 0
    for name, shape, kind, offset in infos:
        if name in found:
            raise _Broken(f"the tensor {name} is there twice")
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _Broken(f"the tensor {name} is of type {kind}, which there is not") from None
        if not shape or shape[-1] % block or 0 in shape:
            raise _Broken(f"the tensor {name} has shape {shape}, and its rows come in blocks of {block}")
        length = math.prod(shape) // block * width
        total += length
        if begin + offset + length > size or total > size:  # of all together: no bytes are read twice
            raise _Broken(f"the tensor {name} ends at byte {begin + offset + length}, and the file has {size}")
        found[name] = Stored(shape, kind, begin + offset, length)
    return found


# ---------------------------------------------------------------- the decoder

# The file's names for ours; those in a layer stand after blk.N. there and after layers.N. here.
TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # what each frequency is divided by: llama3's scaling, written out
OWN_SCALING = "heed.rope_scaling."  # its parameters, where the file was written by lm.gguf_write

# Whether q and k are stored in llama.cpp's order of components, which turns neighbours and not halves.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}


def decoder_config(file: GGUF) -> DecoderConfig:
    """The decoder that the metadata and the names of the tensors describe. Raises FolderError."""
    if file.architecture not in ARCHITECTURES:
        raise FolderError(
            f"{file.path}: general.architecture is {file.metadata.get('general.architecture')!r}; "
            f"the supported ones are {', '.join(ARCHITECTURES)}."
        )
    if "token_embd.weight" not in file.tensors:
        raise FolderError(f"{file.path}: the tensor token_embd.weight is missing from the weights.")
    try:
        return DecoderConfig(**_values(file))
    except ConfigError as error:
        raise FolderError(f"{file.path}: {' '.join(error.problems)}") from None
    except FolderError:
        raise
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise FolderError(f"{file.path}: a value has the wrong type ({error}).") from None


def _values(file: GGUF) -> dict[str, Any]:
    heads = file.need("attention.head_count")
    width = file.need("embedding_length")
    head_dim = file.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(key, head_dim) != head_dim:
            raise FolderError(
                f"{file.path}: {file.architecture}.{key} is {file.get(key)!r}; it must be a head's, {head_dim}."
            )
    parts = {"qkv": "attn_q", "o": "attn_output", "mlp": "ffn_up"}
    there = {part for part, name in parts.items() if f"blk.0.{name}.bias" in file.tensors}
    bias = next((name for name, has in BIASES.items() if has - {"norm"} == there), None)
    if bias is None:
        raise FolderError(f"{file.path}: biases are on {', '.join(sorted(there))}; that is no decoder of ours.")
    context, theta = file.need("context_length"), file.get("rope.freq_base", 10_000.0)
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "context": context,
        "layers": file.need("block_count"),
        "width": width,
        "heads": heads,
        "kv_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_width": file.need("feed_forward_length"),
        "norm_eps": file.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _scaling(file, head_dim, theta, context),
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "tie_embeddings": "output.weight" not in file.tensors,
        "bias": bias,
    }


def _scaling(file: GGUF, head_dim: int, theta: float, context: int) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, head_dim, theta)
    kind = file.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise FolderError(f"{file.path}: rope.scaling.type is {kind!r}; the supported ones are none, linear, yarn.")
    scaling = {"rope_type": kind, "factor": file.need("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = file.get("rope.scaling.original_context_length", context)
    for name in ("beta_fast", "beta_slow"):
        if (value := file.get(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = value
    for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        if file.get(f"rope.scaling.{name}", 1.0 if name != "yarn_log_multiplier" else 0.0) not in (0.0, 1.0):
            raise FolderError(f"{file.path}: rope.scaling.{name} is {file.get(f'rope.scaling.{name}')!r}; not read.")
    times = file.get("rope.scaling.attn_factor", 1.0)
    if times != 1.0:  # on top of the factor that llama.cpp computes from the scale
        scaling["attention_factor"] = times * (0.1 * math.log(scaling["factor"]) + 1)
    return scaling


def _llama3(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """The parameters whose divisors lie in the file: those that it names, else Llama 3's own with the file's factor."""
    stored = _dequantize(file, file.tensors[ROPE_FACTORS], ROPE_FACTORS).double()
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    given = {name: file.metadata.get(OWN_SCALING + name) for name in names}
    guess: dict[str, Any] = {"factor": _short(float(stored.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    guess["original_max_position_embeddings"] = 8192
    scaling = {"rope_type": "llama3"} | (guess if None in given.values() else given)
    plain = rotary_frequencies(head_dim, theta, None, 1)[0]
    expected = plain / rotary_frequencies(head_dim, theta, scaling, 1)[0]
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-4):
        raise FolderError(f"{file.path}: {ROPE_FACTORS} is no scaling that is known; the supported one is llama3's.")
    return scaling


def own_dtype(file: GGUF) -> torch.dtype:
    """The dtype that most elements are stored in; float32 where that is quantised."""
    counts: dict[int, int] = {}
    for stored in file.tensors.values():
        counts[stored.kind] = counts.get(stored.kind, 0) + math.prod(stored.shape)
    return {1: torch.float16, 30: torch.bfloat16}.get(max(counts, key=lambda kind: counts[kind]), torch.float32)


def stop_ids(file: GGUF) -> list[int]:
    """The tokens that end a text or a turn, of those that the metadata name."""
    names = ("eos", "eot", "eom")
    ids = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    return [id for id in ids if isinstance(id, int)]


# ---------------------------------------------------------------- weights


def weights(file: GGUF, config: DecoderConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor under our name, in `dtype`. Raises FolderError, for a tensor that no decoder has among others."""
    jobs = [(name, *_our_name(file, name)) for name in file.tensors if name != ROPE_FACTORS]

    def one(job: tuple[str, str, bool]) -> tuple[str, Tensor]:
        name, ours, turned = job
        tensor = _dequantize(file, file.tensors[name], name)
        if turned:
            heads = config.heads if ".attn_q." in name else config.kv
            if tensor.shape[0] != heads * config.dim:
                raise FolderError(
                    f"{file.path}: the tensor {name} has {tensor.shape[0]} rows; the config asks for "
                    f"{heads * config.dim}."
                )
            tensor = halves(tensor, heads)
        return ours, tensor.to(dtype)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, 8)) as pool:  # numpy lets go of the lock
        return dict(pool.map(one, jobs))


def _our_name(file: GGUF, name: str) -> tuple[str, bool]:
    """Our name for the file's, and whether it holds rows in llama.cpp's order."""
    module, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if module in TOP:
            return f"{TOP[module]}.{kind}", False
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if match and match[2] in LAYER:
            turned = ARCHITECTURES[file.architecture] and match[2] in ("attn_q", "attn_k")
            return f"layers.{match[1]}.{LAYER[match[2]]}.{kind}", turned
    raise FolderError(f"{file.path}: the weights hold {name}, which a {file.architecture} of ours does not have.")


def halves(rows: Tensor, heads: int) -> Tensor:
    """q or k from llama.cpp's order, where components 2i and 2i + 1 turn together, to ours, i and i + D/2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """The way back."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _dequantize(file: GGUF, stored: Stored, name: str) -> Tensor:
    """fp32, of the tensor's shape."""
    import gguf

    kind = gguf.GGMLQuantizationType(stored.kind)
    data = np.fromfile(file.path, dtype=np.uint8, count=stored.size, offset=stored.start)
    if len(data) != stored.size:
        raise FolderError(f"{file.path} became shorter while it was read.")
    rows = math.prod(stored.shape[:-1])
    together = max(1, GROUP // stored.shape[-1])
    while rows % together:
        together -= 1
    try:
        with np.errstate(all="ignore"):  # of broken scales come inf and nan, and no warnings
            values = gguf.dequantize(data.reshape(rows // together, -1), kind)
    except NotImplementedError:
        raise FolderError(f"{file.path}: the tensor {name} is {kind.name}, which cannot be dequantised.") from None
    if values.dtype != np.float32:
        raise FolderError(f"{file.path}: the tensor {name} is {kind.name}; weights must be floats or quantised floats.")
    return torch.from_numpy(values.reshape(stored.shape))
