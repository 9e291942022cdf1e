"""What a run learns: data, model and evaluation behind one protocol. The loop (train/loop.py) knows no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm.tokenizer import Tokenizer
from train.config import Recipe
from train.launch import Launch


@dataclass
class Found:
    """What an evaluation found."""

    loss: float  # nats a target token: the lowest one decides which model is kept as the best
    row: dict[str, Any]  # for metrics.jsonl, beside step and tokens
    says: str  # for the screen, such as "held-out loss 1.4697, 2.12 bits a byte"


class Task(Protocol):
    """The same for every rank; a pure function of the recipe and the data.

    `update` is the number of updates done before the one that is meant, from 0.
    """

    recipe: Recipe
    config: Any  # the model's: parameters(), dropout
    tokenizer: Tokenizer
    fingerprint: str  # of the tokens that are trained on
    smoothing: float  # label smoothing of the training objective
    bytes_per_target: float | None  # UTF-8 bytes that a target stands for, where the loss is also told in bits a byte
    flops_per_target: float  # forward and backward, for MFU

    def model(self) -> nn.Module:
        """The model to be trained, with its first weights; drawn from torch's generator where they are random."""

    def epoch(self, update: int) -> float:
        """Passes over the data done before an update."""

    def targets(self, update: int) -> int:
        """Target tokens in the global batch of an update: known to each rank without asking the others."""

    def micro_batches(self, update: int, rank: int, world: int) -> list[dict[str, Tensor]]:
        """A rank's rows of the global batch of an update, in micro-batches for the model's forward, on the CPU. Never
        empty: where a rank has no row, its one micro-batch has no target that counts."""

    def describe(self) -> str:
        """What an update is, for the first line of a run: such as "steps of 4,096 tokens"."""

    def evaluate(self, model: nn.Module, here: Launch) -> Found | None:
        """Held-out loss. Every rank calls it; `model` is in evaluation mode. None where nothing is held out."""

    def samples(self, model: nn.Module) -> Sequence[tuple[str, ...]]:
        """What the model makes of some inputs: (input, output), or (input, output, reference) where it is known what
        should come out. The main rank calls it, in evaluation mode."""

    def pictures(self, model: nn.Module, run_dir: Path, step: int) -> list[tuple[str, Path]]:
        """Files that were written below `run_dir`, each with the name it is tracked under. The main rank calls it, in
        evaluation mode. Raises OSError."""

    def save(
        self, model: nn.Module, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, run_dir: Path, step: int
    ) -> None:
        """Write the model folder, aside and renamed."""


def make(recipe: Recipe) -> Task:
    """The task of a recipe, its data prepared: one rank builds, under a lock; the others wait for it. Raises
    RecipeError."""
    if recipe.data.has_pairs:
        from train.pair_prepare import prepare_pairs
        from train.translation import TranslationTask

        return TranslationTask(recipe, prepare_pairs(recipe))
    from train.language import LanguageTask
    from train.prepare import prepare

    return LanguageTask(recipe, prepare(recipe))
