"""Continuing a run: which checkpoint, and whether the recipe and the text are those that it was begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import nn, optim

from train import checkpoint
from train.checkpoint import Progress
from train.config import Recipe, RecipeError
from train.schema import show

# What may differ when a run is continued: none of it changes what the steps before would have computed.
MAY_CHANGE = (
    "run.resume",
    "run.license",
    "train.steps",
    "train.tokens",
    "train.micro_batch",
    "train.threads",
    "eval.",
    "checkpoint.",
    "log.",
)


def find(recipe: Recipe, run_dir: Path) -> Path | None:
    """The checkpoint to continue from. Raises RecipeError where the recipe and the folder do not fit."""
    found = checkpoint.checkpoints(run_dir)
    written = run_dir / "config.yaml"
    if recipe.run.resume == "never" and (found or written.exists()):
        raise RecipeError(
            [f"run.resume is never and {run_dir} holds a run; choose another run.dir, or run.resume=auto."]
        )
    if recipe.run.resume == "must" and not found:
        raise RecipeError(
            [f"run.resume is must and {run_dir} has no checkpoint; choose the run.dir of a run, or run.resume=auto."]
        )
    if not found:
        return None
    differing = differences(_read_recipe(written), recipe.to_dict()) if written.exists() else []
    if differing:
        raise RecipeError(
            [
                f"{key} is {show(new)}, and the run in {run_dir} was begun with {show(old)}; give another run.dir, "
                "or the old value."
                for key, old, new in differing
            ]
        )
    return found[0]


def load(folder: Path, model: nn.Module, optimizer: optim.Optimizer, fingerprint: str) -> Progress:
    """Put a checkpoint into model and optimizer, if it is of a run on the tokens of this fingerprint. Raises
    RecipeError.
    """
    try:
        progress = checkpoint.load(folder, model, optimizer)
    except checkpoint.CheckpointError as error:
        raise RecipeError([str(error)]) from None
    if progress.data not in (None, fingerprint):
        raise RecipeError(
            [f"the text or its tokenizer is not what the run of {folder} was begun with; give another run.dir."]
        )
    return progress


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys in which two recipes differ, but for those that a continued run may change: (key, old value, new
    value).
    """
    flat_old = {f"{section}.{key}": value for section, values in old.items() for key, value in values.items()}
    flat_new = {f"{section}.{key}": value for section, values in new.items() for key, value in values.items()}
    return [
        (key, flat_old.get(key), value)
        for key, value in flat_new.items()
        if flat_old.get(key) != value and not key.startswith(MAY_CHANGE)
    ]


def _read_recipe(file: Path) -> dict[str, dict[str, Any]]:
    """The recipe that a run was begun with. Raises RecipeError."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise RecipeError([f"{file} cannot be read; it must be the recipe that the run was begun with."])
    return recipe
