"""A run of seconds: a small text, a small model, and what a test wants changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train.config import Recipe, load
from train.metrics import read

WORDS = ["the", "of", "king", "and", "to", "thou", "art", "lord", "my", "what", "is", "love", "night", "day", "no"]
TINY = """
data: {{text: {folder}/text.txt, cache: {folder}/cache}}
tokenizer: {{kind: characters}}
model: {{context: 16, layers: 2, width: 32, heads: 2}}
optim: {{lr: 0.01}}
train: {{steps: 12, batch_tokens: 96, threads: 1}}
checkpoint: {{every: 4}}
log: {{every: 1, wandb: null}}
"""


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 12 updates of 6 sequences, on 1,500 words drawn from fifteen; its tokens are prepared once."""
    folder = tmp_path_factory.mktemp("tiny")
    drawn = random.Random(0)
    (folder / "text.txt").write_text(" ".join(drawn.choice(WORDS) for _ in range(1500)), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder), encoding="utf-8")
    return folder / "tiny.yaml"


class Runner:
    """Runs of the tiny recipe in this process."""

    def __init__(self, recipe: Path, folder: Path):
        self.file, self.folder = recipe, folder

    def recipe(self, *overrides: str, name: str = "run") -> Recipe:
        return load(self.file, [f"run.dir={self.folder / name}", *overrides])

    def __call__(self, *overrides: str, name: str = "run", status: int = 0) -> list[dict[str, Any]]:
        """Train in FOLDER/name with these overrides; the rows of its metrics.jsonl. `status`: the exit status to be."""
        from accelerate.state import AcceleratorState

        from train import loop

        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the first run's precision
        assert loop.run(self.recipe(*overrides, name=name)) == status
        return read(self.folder / name / "metrics.jsonl")


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path) -> Iterator[Runner]:
    threads = torch.get_num_threads()
    yield Runner(tiny_yaml, tmp_path)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def figures() -> Callable[..., list[float]]:
    """figures(rows, key="loss"): the values of a key, in order, of the rows that have it."""
    return lambda rows, key="loss": [row[key] for row in rows if key in row]
