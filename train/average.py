"""The mean of a run's last checkpoints: one model, usually a little better than each of them (arXiv 1706.03762, section
6.1, takes five of the base model and twenty of the big one)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.checkpoint import CheckpointError, verify


def whole(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Those of the checkpoints that are what was written, and a sentence for each of the others."""
    found, problems = [], []
    for folder in folders:
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            found.append(folder)
    return found, problems


def average(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the parameters in checkpoint folders, name by name, each in its own dtype; summed in float64, one
    checkpoint in memory at a time. Raises CheckpointError, a sentence, for one that cannot be read or is of another
    model, and where there is none.
    """
    if not folders:
        raise CheckpointError("there is no checkpoint to average")
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for folder in folders:
        try:
            weights = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read ({error}).") from None
        if sums and {name: tensor.shape for name, tensor in weights.items()} != {
            name: tensor.shape for name, tensor in sums.items()
        }:
            raise CheckpointError(f"{folder} holds another model than {folders[0]}; only one model's can be averaged.")
        for name, tensor in weights.items():
            sums[name] = sums[name].add_(tensor) if name in sums else tensor.double()
            dtypes[name] = tensor.dtype
    return {name: total.div_(len(folders)).to(dtypes[name]) for name, total in sums.items()}
