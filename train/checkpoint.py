"""Checkpoints: RUN/checkpoints/step-N/{model.safetensors, optimizer.safetensors, state.json}, complete or absent.

Written aside and renamed, so that a folder named step-N is whole; the newest is the one a run resumes from; older ones
are removed only after a newer one stands. Data order and dropout are functions of the step, so there is no other state.
state.json has each file's size and checksum: what a disk has lost since is found before it is trained on.

Beside those that are kept there is at most one ephemeral checkpoint, the newest of all: a kill costs seconds, and the
disk does not fill.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train import tensorfile
from train.optim import STATE

FORMAT = 2  # 1 had no checksums
DAMAGED = "damaged-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one sentence with its path."""


class TooNew(CheckpointError):
    """A checkpoint of a later version: whole, but not for us."""


@dataclass
class Progress:
    """What a run knows beside its tensors."""

    step: int = 0  # updates done
    tokens: int = 0  # target tokens trained on
    skipped: int = 0  # updates left out because their numbers were bad
    seconds: float = 0.0  # spent training, over all sessions
    best_loss: float | None = None  # lowest validation loss, nats a token
    best_step: int | None = None
    evaluated: int = 0  # the step of the newest evaluation
    data: str | None = None  # the fingerprint of the tokens it trains on
    guard: dict[str, Any] = field(default_factory=dict)  # train.guard.Guard's state
    window: dict[str, Any] = field(default_factory=dict)  # train.window.Window's: what the next row has summed


@dataclass
class Snapshot:
    """The state after an update, in the CPU's memory."""

    progress: dict[str, Any]
    ephemeral: bool
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    copied: bool  # from a device; else the tensors are training's own, and change in the next update
    ready: Callable[[], None]  # waits until the copies have arrived

    @property
    def step(self) -> int:
        return self.progress["step"]


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / "state.json").exists():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def lasting(run_dir: Path) -> list[Path]:
    """Those of them that are kept, newest first: none that is ephemeral."""
    return [path for path in checkpoints(run_dir) if not _is_ephemeral(path)]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


def number(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


# ------------------------------------------------------------ writing


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, main: bool, ephemeral: bool = False
) -> Snapshot | None:
    """The state of the bare `model` (no wrapper) and its optimizer. All ranks call it (shards are gathered); None where
    not `main`."""
    weights, moments = (
        _on_host(part, main) for part in (dict(model.named_parameters()), _flat_state(model, optimizer))
    )
    if not main:
        return None
    ready: Callable[[], None] = lambda: None  # noqa: E731
    copied = any(p.is_cuda for p in model.parameters())
    if copied:
        event = torch.cuda.Event()
        event.record()
        ready = event.synchronize
    return Snapshot(asdict(progress), ephemeral, weights, moments, copied, ready)


def write(
    run_dir: Path,
    snapshot: Snapshot,
    keep: int,
    read: Callable[[], None] = lambda: None,
    good: Callable[[], bool] = lambda: True,
) -> bool:
    """Write a snapshot as step-N, on the disk before it has its name, and retire older ones.

    `read` is called when training's tensors are no longer needed. `good` says at the end whether it is to have its
    name; the answer is returned. On a failure (OSError) nothing is left of it, and every older checkpoint stays.
    """
    final = folder(run_dir, snapshot.step)
    aside = final.with_name(f".{final.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        snapshot.ready()
        if snapshot.copied:
            read()
        files = {}
        for name, tensors in (("model.safetensors", snapshot.weights), ("optimizer.safetensors", snapshot.moments)):
            size, checksum = tensorfile.write(aside / name, tensors)
            files[name] = {"bytes": size, "checksum": checksum}
        read()
        state = {"format": FORMAT, "ephemeral": snapshot.ephemeral, "files": files, **snapshot.progress}
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for file in (*aside.iterdir(), aside):
            tensorfile.sync(file)
        if not good():
            return False
        _rename(aside, final)
        tensorfile.sync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    retire(run_dir, keep)
    return True


def save(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int, *, main: bool
) -> None:
    """Snapshot and write in one. Raises OSError."""
    taken = snapshot(model, optimizer, progress, main=main)
    if taken is not None:
        write(run_dir, taken, keep)


def retire(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and an ephemeral one that is newer than they."""
    found, kept = checkpoints(run_dir), lasting(run_dir)[:keep]
    for old in found:
        if old not in kept and old != found[0]:
            shutil.rmtree(old, ignore_errors=True)
    clean(run_dir)


def clean(run_dir: Path) -> None:
    """Remove what was being written when a process was killed, or is still, by another thread of one that ends now.

    Renamed first: that thread then finds nothing that it could give its name to, half removed.
    """
    there = run_dir / "checkpoints"
    for stale in there.glob(".step-*.writing-*"):
        with suppress(OSError):
            stale.rename(stale.with_name(stale.name.replace("writing", "removing")))
    for stale in there.glob(".step-*.removing-*"):
        shutil.rmtree(stale, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Name a damaged checkpoint so that it is none any more, and stays for a person to look at."""
    target = folder.with_name(DAMAGED + folder.name)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _rename(aside: Path, final: Path) -> None:
    """Give a checkpoint its name. One of this name, which the run was continued from, steps aside and is not removed
    before: between the two renames there is nothing to wait for. Raises OSError; then the old one is back."""
    old = final.with_name(f".{final.name}.removing-{os.getpid()}")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    try:
        aside.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_ephemeral(folder: Path) -> bool:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))["ephemeral"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ------------------------------------------------------------ reading


def read_state(folder: Path) -> tuple[Progress, dict[str, dict[str, Any]]]:
    """The state.json of a checkpoint: its progress, and what its files must be. Raises CheckpointError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.pop("format") > FORMAT:
            raise TooNew(f"{folder} was written by a newer version of Heed; this one reads format {FORMAT}.")
        state.pop("ephemeral", None)
        files = {
            name: {"bytes": int(f["bytes"]), "checksum": f["checksum"]} for name, f in state.pop("files", {}).items()
        }
        return Progress(**state), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'state.json'} cannot be read ({error}).") from None


def read_progress(folder: Path) -> Progress:
    """The progress in a checkpoint's state.json. Raises CheckpointError."""
    return read_state(folder)[0]


def verify(folder: Path) -> None:
    """Read a checkpoint once, to see that it is what was written. Raises CheckpointError."""
    _, files = read_state(folder)
    for name, written in files.items():
        try:
            size, checksum = tensorfile.checksum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({name}: {error.strerror or error}).") from None
        if size != written["bytes"]:
            raise CheckpointError(
                f"{folder} cannot be read ({name} has {size:,} bytes, and {written['bytes']:,} were written)."
            )
        if checksum != written["checksum"]:
            raise CheckpointError(f"{folder} cannot be read ({name} is not what was written: its checksum differs).")


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
    put(weights, parameters)
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


# ------------------------------------------------------------ tensors


@torch.no_grad()
def put(weights: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Whole tensors into the parameters of the same names, sharded as they are."""
    for name, parameter in parameters.items():
        parameter.copy_(_like(weights[name], parameter))


def gather(tensors: dict[str, Any], main: bool) -> dict[str, Tensor]:
    """Whole CPU tensors, on `main` only; a sharded one is gathered, which every rank takes part in."""
    return {name: tensor.cpu().contiguous() for name, tensor in _whole(tensors, main).items()}


def _on_host(tensors: dict[str, Any], main: bool) -> dict[str, Tensor]:
    """As gather, without waiting for a device: its copies arrive in memory that it can write to by itself."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        if tensor.is_cuda
        else tensor
        for name, tensor in _whole(tensors, main).items()
    }


def _whole(tensors: dict[str, Any], main: bool) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if main:
            whole[name] = tensor
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
