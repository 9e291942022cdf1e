"""Checkpoints: RUN/checkpoints/step-N/{model.safetensors, optimizer.safetensors, state.json}, complete or absent.

Written aside and renamed, so that a folder named step-N is whole; the newest is the one a run resumes from; older ones
are removed only after a newer one stands. Data order and dropout are functions of the step, so there is no other state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.optim import STATE

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one sentence with its path."""


@dataclass
class Progress:
    """What a run knows beside its tensors."""

    step: int = 0  # updates done
    tokens: int = 0  # target tokens trained on
    skipped: int = 0  # updates left out because a gradient was not finite
    seconds: float = 0.0  # spent training, over all sessions
    best_loss: float | None = None  # lowest validation loss, nats a token
    best_step: int | None = None
    data: str | None = None  # the fingerprint of the tokens it trains on


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / "state.json").exists():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def save(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int, *, main: bool
) -> None:
    """Write step-N of the bare `model` (no wrapper) and its optimizer. All ranks call it (shards are gathered);
    `main` writes.
    """
    weights = gather(dict(model.named_parameters()), main)
    moments = gather(_flat_state(model, optimizer), main)
    if not main:
        return
    folder = run_dir / "checkpoints" / f"step-{progress.step}"
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(weights, aside / "model.safetensors")
    save_file(moments, aside / "optimizer.safetensors")
    state = {"format": FORMAT, **asdict(progress)}
    (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in aside.iterdir():  # on the disk before it has its name
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in checkpoints(run_dir)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.parent.glob(".step-*.writing-*"):
        shutil.rmtree(stale, ignore_errors=True)


def read_progress(folder: Path) -> Progress:
    """The state.json of a checkpoint. Raises CheckpointError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.pop("format") > FORMAT:
            raise CheckpointError(f"{folder} was written by a newer version of Heed; this one reads format {FORMAT}.")
        return Progress(**state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'state.json'} cannot be read ({error}).") from None


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint into the bare model and its optimizer, sharded as they are. Raises CheckpointError."""
    progress = read_progress(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}).") from None
    parameters = dict(model.named_parameters())
    if {name: t.shape for name, t in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise CheckpointError(f"{folder} holds the weights of another model than the recipe's.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(weights[name], parameter))
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, _, part = key.rpartition("/")
        states.setdefault(name, {})[part] = tensor
    kinds = {parameter: STATE[group["kind"]] for group in optimizer.param_groups for parameter in group["params"]}
    if any(name not in parameters or parts.keys() != kinds[parameters[name]] for name, parts in states.items()):
        raise CheckpointError(f"{folder} holds the state of another optimizer than the recipe's.")
    for name, parts in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            part: _like(tensor, parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)
            for part, tensor in parts.items()
        }
    return progress


def gather(tensors: dict[str, Any], main: bool) -> dict[str, Tensor]:
    """Whole CPU tensors, on `main` only; a sharded one is gathered, which every rank takes part in."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if main:
            whole[name] = tensor.cpu().contiguous()
    return whole


def _flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}/{part}": tensor for p, parts in optimizer.state.items() for part, tensor in parts.items()}


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, whole, on the parameter's device and sharded as the parameter is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
