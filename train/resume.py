"""Continuing a run: which checkpoint, and whether the recipe and the text are those that it was begun with."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml
from torch import nn, optim

from lm.architectures import ARCHITECTURES
from lm.config import DecoderConfig
from train import checkpoint
from train.checkpoint import Progress
from train.config import Recipe, RecipeError, sections
from train.launch import Launch
from train.live import Live
from train.schema import key_of, show

# What may differ when a run is continued. But for the length, on which a schedule that decays depends, none of it
# changes what the steps before would have computed. Folders may have been moved, or be spelled otherwise: what is in
# them counts, and of the prepared text its fingerprint.
MAY_CHANGE = (
    "run.dir",
    "run.resume",
    "run.license",
    "data.cache",
    "train.steps",
    "train.tokens",
    "train.micro_batch",
    "train.threads",
    "train.timeout",
    "optim.spike",
    "optim.max_skips",
    "eval.",
    "checkpoint.",
    "log.",
)


class Claim:
    """The run's folder, for this command alone, and the checkpoint in it to continue from. A context.

    Only the main rank looks; what it finds, all do.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, here: Launch):
        """Raises RecipeError where another command trains there, or where recipe and folder do not fit; on the other
        ranks one without a sentence, which the main rank says."""
        self.lock: Live | None = None
        problems: list[str] | None = None
        found: Path | None = None
        if here.main:
            try:
                self.lock = Live(run_dir)
                found = find(recipe, run_dir)
            except RecipeError as error:
                problems = error.problems
        code = -1 if problems is not None else 0 if found is None else checkpoint.number(found) + 1
        (told,) = here.sum([code if here.main else 0])
        if told < 0:
            self.close()
            raise RecipeError(problems or [])
        self.checkpoint = checkpoint.folder(run_dir, round(told) - 1) if told else None

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def find(recipe: Recipe, run_dir: Path) -> Path | None:
    """The checkpoint to continue from: the newest that is whole. Damaged ones are set aside, with a sentence.

    Raises RecipeError where the recipe and the folder do not fit, or no checkpoint of the run can be used.
    """
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
    differing = differences(_with_defaults(_read_recipe(written)), recipe.to_dict()) if written.exists() else []
    if differing:
        raise RecipeError(
            [
                f"{key} is {show(new)}, and the run in {run_dir} was begun with {show(old)}; give another run.dir, "
                "or the old value."
                for key, old, new in differing
            ]
        )
    return _newest_whole(found)


def _newest_whole(found: list[Path]) -> Path:
    problems = []
    for folder in found:
        try:
            checkpoint.verify(folder)
        except checkpoint.TooNew as error:  # whole, so going back behind it would lose what it holds
            raise RecipeError([str(error)]) from None
        except checkpoint.CheckpointError as error:
            problems.append(str(error))
        else:
            for damaged, problem in zip(found, problems, strict=False):
                checkpoint.set_aside(damaged)
                print(f"{problem} The run goes on from {folder.name}.", file=sys.stderr, flush=True)
            return folder
    nothing_left = f"no checkpoint of {found[0].parent.parent} can be used; give another run.dir to begin again."
    raise RecipeError([*problems, nothing_left])


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


def _with_defaults(old: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe that an older version wrote, with the keys that have come since at their defaults: what they do then is
    what it did. With model.from its folder decides most of the model's section, which stays as it is."""
    model = old.get("model", {})
    architecture = model.get("architecture", DecoderConfig.architecture)
    if architecture not in ARCHITECTURES:
        return old  # not ours; it differs
    full = {}
    for name, cls in sections(architecture).items():
        own = name == "model" and model.get("from") is not None
        defaults = {
            key_of(field): list(field.default) if isinstance(field.default, tuple) else field.default
            for field in dataclasses.fields(cls)
            if not own and field.default is not dataclasses.MISSING
        }
        full[name] = defaults | old.get(name, {})
    return full


def _read_recipe(file: Path) -> dict[str, dict[str, Any]]:
    """The recipe that a run was begun with. Raises RecipeError."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise RecipeError([f"{file} cannot be read; it must be the recipe that the run was begun with."])
    return recipe
