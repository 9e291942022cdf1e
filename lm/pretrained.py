"""Models on disk: Hugging Face folders (config.json, model.safetensors, generation_config.json) and GGUF files.

A decoder whose mathematics is another family's is saved under that family's name and weight names (lm.families), so
that every tool reads it with no code of ours; any other decoder is saved as HeedForCausalLM, the encoder-decoders as
HeedTransformer and HeedRNNSearch. Parameters are stored unfused. GGUF files are read by lm.gguf.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from lm.architectures import ARCHITECTURES, make_config, make_model
from lm.config import ConfigError
from lm.families import FAMILIES, OWN_ARCHITECTURE, Family, FolderError, Values, Weights, family_of

if TYPE_CHECKING:
    from lm.tokenizer import Tokenizer

__all__ = [
    "DTYPES",
    "FAMILIES",
    "OWN_ARCHITECTURE",
    "FolderError",
    "family_of",
    "load",
    "load_tokenizer",
    "own_dtype",
    "read_architecture",
    "read_config",
    "save",
    "stop_ids",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9  # a file of weights is split above this size, as the hub likes it


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    weights: Weights | None = None,
    generation: Values | None = None,
    architecture: str | None = None,
    extra: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's folder, aside and renamed: a folder that exists is complete. `dtype` is the one it is meant to be
    served in.

    tokenizer: saved beside the weights; its EOS and BOS ids go into the configs (none is legal). weights: the state
    dict to write in place of the model's own (gathered from shards, or averaged). generation: keys for
    generation_config.json, such as several ids of eos_token_id; they win over the tokenizer's. architecture: the family
    to save as where the decoder is one of it (read_architecture), else the first that it is one of. extra: further text
    files by name, such as README.md.
    """
    target = Path(folder)
    aside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    family = family_of(model.config, architecture)
    name = next(key for key, value in DTYPES.items() if value == dtype)
    # Said even when there is none, against foreign defaults.
    special: Values = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        tokenizer.save(aside)
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    values = {"architectures": [family.architecture], **family.write(model.config), **special, "dtype": name}
    _write_json(aside / "config.json", values)
    said = {key: value for key, value in special.items() if value is not None} | (generation or {})
    _write_json(aside / "generation_config.json", said)
    for file, text in (extra or {}).items():
        (aside / file).write_text(text, encoding="utf-8")
    packed = family.pack(model.state_dict() if weights is None else weights)
    _write_weights(aside, {key: tensor.detach() for key, tensor in packed.items()}, dtype, shard_bytes)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    only: str | None = None,
) -> Any:
    """The model of a folder or a GGUF file, in `dtype` (None: own_dtype), ready for inference (`eval`). Raises
    FolderError; also, where `only` names one of lm.architectures, for a model of another.
    """
    path = Path(path)
    if path.is_file():
        from lm import gguf

        _check_architecture(path, "decoder", "a GGUF file", only)
        file = gguf.read(path)
        config = gguf.decoder_config(file)
        weights = gguf.weights(file, config, dtype or gguf.own_dtype(file))
        kind = f"a GGUF file of {file.architecture}"
    else:
        config, family, raw = _read_config(path, only)
        stored = _read_weights(path, dtype or _dtype(path, raw))
        try:
            weights = family.unpack(stored)
        except FolderError as error:
            raise FolderError(f"{path}: {error}") from None
        kind = f"a {family.architecture}"
    return _assemble(path, config, weights, device, kind)


def read_config(path: str | os.PathLike[str], *, only: str | None = None) -> Any:
    """The config of the model that a folder's config.json, or a GGUF file's metadata, describes. Raises FolderError;
    also, where `only` names one of lm.architectures, for a model of another."""
    path = Path(path)
    if path.is_file():
        from lm import gguf

        _check_architecture(path, "decoder", "a GGUF file", only)
        return gguf.decoder_config(gguf.read(path))
    return _read_config(path, only)[0]


def read_architecture(path: str | os.PathLike[str]) -> str | None:
    """The family that a folder's config.json names; None for a GGUF file, which does not say. Raises FolderError."""
    path = Path(path)
    return None if path.is_file() else _read_config(path)[1].architecture


def own_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that a folder is meant to be served in, or in which a GGUF file's larger part is stored (float32 where
    that is quantised). Raises FolderError."""
    path = Path(path)
    if path.is_file():
        from lm import gguf

        return gguf.own_dtype(gguf.read(path))
    return _dtype(path, _read_config(path)[2])


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder or a GGUF file; its chat template, if any, is settings["chat_template"]. Raises
    FolderError or TokenizerError."""
    path = Path(path)
    if path.is_file():
        from lm import gguf, gguf_tokenizer

        return gguf_tokenizer.tokenizer(gguf.read(path))
    from lm.tokenizer import Tokenizer

    return Tokenizer.load(path)


def stop_ids(path: str | os.PathLike[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: the tokenizer's EOS first, then those that generation_config.json or a GGUF file's
    metadata name. Empty where there is none."""
    path = Path(path)
    if path.is_file():
        from lm import gguf

        named: Any = gguf.stop_ids(gguf.read(path))
    else:
        named = read_generation(path).get("eos_token_id")
    ids = [tokenizer.eos_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(id for id in ids if isinstance(id, int)))


def read_generation(folder: str | os.PathLike[str]) -> Values:
    """What generation_config.json holds; empty where it is missing or no JSON object."""
    try:
        values = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


# ---------------------------------------------------------------- from a config and weights to a model


def _assemble(path: Path, config: Any, weights: Weights, device: torch.device | str, kind: str) -> Any:
    if config.architecture == "decoder" and config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    _check_size(path, config, weights)
    try:
        with _Uninitialised():
            model = make_model(config)
    except (MemoryError, RuntimeError):
        raise FolderError(f"{path}: the config's model does not fit into memory.") from None
    expected = model.state_dict()
    for missing in sorted(expected.keys() - weights.keys()):
        raise FolderError(f"{path}: the tensor {missing} is missing from the weights.")
    for extra in sorted(weights.keys() - expected.keys()):
        raise FolderError(f"{path}: the weights hold {extra}, which {kind} of this config does not have.")
    for key, tensor in expected.items():
        if weights[key].shape != tensor.shape:
            have, want = tuple(weights[key].shape), tuple(tensor.shape)
            raise FolderError(f"{path}: the tensor {key} has shape {have}; the config asks for {want}.")
    model.load_state_dict({key: t.to(device).contiguous() for key, t in weights.items()}, assign=True)
    for name, table in model.named_buffers():  # of positions, which are computed and in no file
        setattr(model, name, table.to(device))
    return model.eval()


def _check_size(path: Path, config: Any, weights: Weights) -> None:
    """Refuse a shape far beyond what is stored before anything of its size is made: a broken file must cost nothing."""
    asked, stored = config.parameters()["total"], sum(tensor.numel() for tensor in weights.values())
    layers = sum(getattr(config, name, 0) for name in ("layers", "encoder_layers", "decoder_layers"))
    if asked > 2 * stored + 10**6 or layers > len(weights):
        raise FolderError(
            f"{path}: the config asks for {asked} parameters in {layers} layers; the weights hold {stored}."
        )
    positions = getattr(config, "positions", "none")
    width = {"rotary": lambda: config.dim, "sinusoidal": lambda: config.width}.get(positions, lambda: 0)()
    table = 10 * config.context * width
    if table > 2**30 and table > _free_bytes():
        raise FolderError(f"{path}: context is {config.context}; its table of positions does not fit into memory.")


def _free_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


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


# ---------------------------------------------------------------- a folder's files


def _read_config(path: Path, only: str | None = None) -> tuple[Any, Family, Values]:
    file = path / "config.json"
    if not path.is_dir():
        raise FolderError(
            f"{path} is not a folder; a model is a folder with config.json and model.safetensors, or a GGUF file."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{path} has no config.json; a model is a folder with config.json and model.safetensors."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise FolderError(f"{file} cannot be read as JSON: {error}.") from None
    names = raw.get("architectures") if isinstance(raw, dict) else None
    by_name = {family.architecture: family for family in FAMILIES}
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or names[0] not in by_name:
        raise FolderError(f"{file}: architectures is {names!r}; the supported ones are {', '.join(sorted(by_name))}.")
    if raw.get("quantization_config") is not None:
        raise FolderError(f"{file}: quantization_config is given; weights must be {', '.join(DTYPES)}.")
    family = by_name[names[0]]
    _check_architecture(path, family.of, f"a {family.architecture}", only)
    try:
        return make_config(family.of, family.read(raw)), family, raw
    except KeyError as error:
        raise FolderError(f"{file}: the key {error.args[0]} is missing; a {family.architecture} needs it.") from None
    except ConfigError as error:
        raise FolderError(f"{file}: {' '.join(error.problems)}") from None
    except FolderError as error:
        raise FolderError(f"{file}: {error}") from None
    except (AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise FolderError(f"{file}: a value has the wrong type ({error}).") from None


def _check_architecture(path: Path, architecture: str, name: str, only: str | None) -> None:
    if only not in (None, architecture):
        is_a, wanted = ARCHITECTURES[architecture].title, ARCHITECTURES[only].title
        raise FolderError(f"{path} is {name}, {is_a}; it must be {wanted}.")


def _dtype(path: Path, raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise FolderError(f"{path / 'config.json'}: dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _read_weights(path: Path, dtype: torch.dtype) -> Weights:
    """Every tensor of the folder, under its stored name, as `dtype`."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = sorted({Path(file).name for file in files})  # in this folder, whatever the index says
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise FolderError(f"{index} is not an index of safetensors files; it must hold a weight_map.") from None
    else:
        shards = ["model.safetensors"]
    weights: Weights = {}
    for shard in shards:
        file = path / shard
        if not file.exists():
            raise FolderError(f"{file} is missing; the weights must lie there.")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no dictionary
                    tensor = opened.get_tensor(key)
                    if tensor.dtype not in (*DTYPES.values(), torch.float64):
                        # Integers and bytes are quantised weights, or the mask buffers of old files.
                        if not key.endswith((".attn.bias", ".attn.masked_bias")):
                            have = str(tensor.dtype).removeprefix("torch.")
                            raise FolderError(f"{file}: {key} is {have}; weights must be {', '.join(DTYPES)}.")
                    else:
                        tensor = tensor.to(dtype)
                    weights[key] = tensor
        except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that torch does not have
            raise FolderError(f"{file} is not a readable safetensors file: {error}.") from None
    return weights


def _write_weights(folder: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int) -> None:
    """One model.safetensors, or shards of at most `shard_bytes` (and one tensor at least) with their index."""
    shards: list[Weights] = [{}]
    filled = total = 0
    for key, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled, total = filled + size, total + size
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        ready = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in shard.items()}
        save_file(ready, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # the library's is for its user's eyes alone
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
