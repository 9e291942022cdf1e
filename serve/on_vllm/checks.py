"""What runs on vLLM: whether a folder can, with what numbers, and whether vLLM is here. No here is one sentence."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from lm import pretrained
from lm.config import DecoderConfig
from serve.engine.build import half_on_cpu
from serve.on_vllm.flags import CommandLine

RELEASE = "0.32"
GROUP, PLUGIN = "vllm.general_plugins", "heed"
INSTEAD = "the native engine serves it: leave --engine vllm out"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on a CPU


class Unfit(ValueError):
    """It cannot run on vLLM: one sentence that says why and what can."""


@dataclass(frozen=True)
class VLLM:
    """The vLLM of this environment."""

    version: str
    device: str  # cpu or gpu: what it was built for


@dataclass(frozen=True)
class Fit:
    """A folder that can run on vLLM."""

    config: DecoderConfig
    dtype: torch.dtype  # the one it is meant to be served in
    own: bool  # through our plugin


def installed() -> VLLM:
    """Raises Unfit with the command that would install it."""
    python = sys.executable
    try:
        version = metadata.version("vllm") if util.find_spec("vllm") else None
    except metadata.PackageNotFoundError:
        version = None
    if version is None:
        raise Unfit(
            f"vLLM is not installed for {python}: `{python} -m pip install 'vllm=={RELEASE}.*'` installs it where "
            "there is a GPU; docs/production.md has the way without one."
        )
    if not version.startswith(f"{RELEASE}."):
        raise Unfit(
            f"vLLM is {version} and must be {RELEASE}: `{python} -m pip install 'vllm=={RELEASE}.*'` installs that."
        )
    if "cpu" in version:
        return VLLM(version, "cpu")
    if not torch.accelerator.is_available():
        raise Unfit(
            f"vLLM {version} is a build for GPUs, and torch finds none here: docs/production.md has the build for a "
            f"CPU, and {INSTEAD}."
        )
    return VLLM(version, "gpu")


def check_plugin() -> None:
    """Raises Unfit where vLLM's processes would not find our plugin."""
    if all(point.name != PLUGIN for point in metadata.entry_points(group=GROUP)):
        raise Unfit(
            f"vLLM would not find the plugin that this model needs: `{sys.executable} -m pip install --no-deps .` in "
            "the repository installs it."
        )


def check_folder(line: CommandLine) -> Fit:
    """Whether vLLM can run the model. Raises Unfit or lm.pretrained.FolderError, one sentence."""
    path = Path(line.model)
    if path.is_file():
        raise Unfit(
            f"{path} is a GGUF file, which vLLM {RELEASE} does not read: `python -m lm convert {path} FOLDER` makes a "
            f"folder of it, and {INSTEAD}."
        )
    config, own = pretrained.read_config(path), pretrained.read_architecture(path) == pretrained.OWN_ARCHITECTURE
    if config.architecture != "decoder":
        kind = {"rnnsearch": "an RNNsearch", "transformer": "a Transformer of encoder and decoder"}[config.architecture]
        raise Unfit(f"{path} is {kind}, and vLLM {RELEASE} runs only decoders of text; {INSTEAD}.")
    if config.prefix:
        raise Unfit(f"{path} sees its prompt as a whole (prefix is true), and vLLM's attention is causal; {INSTEAD}.")
    elsewhere = any(line.get(name) is not None for name in ("--tokenizer", "--skip-tokenizer-init"))
    if not elsewhere and not (path / "tokenizer.json").is_file():
        raise Unfit(f"{path} has no tokenizer.json; --tokenizer FOLDER names another folder that has one.")
    if not own:
        _check_relative(path, config)
    return Fit(config, pretrained.own_dtype(path), own)


def check_heads(path: str, config: DecoderConfig, device: str) -> None:
    """Raises Unfit where vLLM has no attention for heads of this size."""
    if device == "cpu" and config.dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise Unfit(f"{path} has heads of {config.dim}; on a CPU vLLM has attention for {sizes} alone; {INSTEAD}.")


def check_stages(line: CommandLine, device: str) -> None:
    """Raises Unfit for pipeline stages on a CPU: vLLM's runner there ends on the first request, whatever the model."""
    stages = line.number("--pipeline-parallel-size", 1)
    if device == "cpu" and stages > 1:
        raise Unfit(
            f"--pipeline-parallel-size is {stages}, and vLLM {RELEASE} fails with stages on a CPU; "
            "--tensor-parallel-size works there."
        )


def _check_relative(path: Path, config: DecoderConfig) -> None:
    """What vLLM's own models of these families compute otherwise, or not at all."""
    if len({window is None for window in config.windows()}) > 1 and all(config.rotates()):
        raise Unfit(f"{path} has windows in some of its layers, which vLLM's model of this family refuses; {INSTEAD}.")
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "yarn":
        reach = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        if config.context > reach:
            raise Unfit(
                f"{path} has a context of {config.context}, and vLLM has yarn's angles for {reach} positions, the "
                f"factor times the original context; {INSTEAD}."
            )


def serving_dtype(own: torch.dtype, device: str) -> str:
    """As the native engine chooses: the folder's dtype; on a CPU halves as bfloat16, or float32 where that is slow."""
    if device == "cpu" and own is not torch.float32:
        own = half_on_cpu(whole=False)
    return str(own).removeprefix("torch.")


def check_ranks(config: DecoderConfig, line: CommandLine) -> int:
    """The number of processes that share the model; raises Unfit where it cannot be cut into so many."""
    tensor, stages = line.number("--tensor-parallel-size", 1), line.number("--pipeline-parallel-size", 1)
    shares = config.kv % tensor == 0 or tensor % config.kv == 0
    if config.heads % tensor or config.inner % tensor or not shares:
        raise Unfit(
            f"--tensor-parallel-size is {tensor}, which must divide the {config.heads} heads and the MLP's width "
            f"{config.inner}, and divide the {config.kv} key-value heads or be a multiple of them."
        )
    if stages > config.layers:
        raise Unfit(f"--pipeline-parallel-size is {stages}; the model has {config.layers} layers.")
    return tensor * stages
