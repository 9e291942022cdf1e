"""The same update, however its batch is cut: into micro-batches, accumulation steps and ranks.

This file is also the program that each rank of a launch runs: `test_equal.py FOLDER`, with the cuts that are to be made
by so many processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 20
COMMON = f"""
optim: {{lr: 1e-3, clip: null, weight_decay: 0.1}}
schedule: {{kind: constant}}
checkpoint: {{every: 1000}}
log: {{every: 1, wandb: null}}
train: {{steps: {UPDATES}, threads: 1, BATCH}}
run: {{dir: unused}}
"""
PAIRS = "data: {synthetic: reverse, rows: 400, symbols: 20, length: 9, validation: null, cache: CACHE}"
RECIPES = {
    # Windows of a stream of documents that see only their own.
    "decoder": """
data: {text: CACHE/rows.jsonl, validation: null, document_mask: true, cache: CACHE}
tokenizer: {kind: characters}
model: {context: 24, layers: 2, width: 32, heads: 2, qk_norm: true}
"""
    + COMMON.replace("BATCH", "batch_tokens: 384"),
    # Pairs of other lengths: each micro-batch is padded to its own longest.
    "transformer": PAIRS
    + """
tokenizer: {kind: words}
model: {architecture: transformer, context: 16, encoder_layers: 2, decoder_layers: 2, width: 32, heads: 2,
  mlp_width: 64, dropout: 0.0}
"""
    + COMMON.replace("BATCH", "batch_sentences: 13, label_smoothing: 0.1"),
    "rnnsearch": PAIRS
    + """
tokenizer: {kind: words}
model: {architecture: rnnsearch, context: 16, hidden: 24, embedding: 16, maxout: 16}
"""
    + COMMON.replace("BATCH", "batch_sentences: 13"),
    # A decoder that translates: source and target in one row, and the targets alone count.
    "translator": PAIRS
    + """
tokenizer: {kind: words}
model: {context: 32, layers: 2, width: 32, heads: 2, prefix: true}
"""
    + COMMON.replace("BATCH", "batch_sentences: 13"),
}
# Of each number of processes: sequences that each computes at a time, the rest accumulated. None: all it has.
CUTS: dict[int, list[int | None]] = {1: [None, 2, 5], 2: [None, 3], 4: [1]}
CUT = [(world, cut) for world, sizes in CUTS.items() for cut in sizes if (world, cut) != (1, None)]


def program(folder: Path) -> None:
    """Make every recipe's updates with each cut that so many processes make. Rank 0 keeps what came of it: the loss of
    each update, the gradients of the first, the weights after the last."""
    from train import launch, loop, task
    from train.config import load
    from train.signals import Signals

    here = None
    for name in RECIPES:
        for cut in CUTS[int(os.environ.get("WORLD_SIZE", "1"))]:
            run = folder / f"{name}-{os.environ.get('WORLD_SIZE', '1')}-{cut}"
            overrides = [f"run.dir={run}", *([] if cut is None else [f"train.micro_batch={cut}"])]
            recipe = load(folder / f"{name}.yaml", overrides)
            here = here or launch.start(recipe)
            trainer = loop.Trainer(task.make(recipe), here, run, None, Signals())
            trainer.model.train()
            gradients: dict[str, torch.Tensor] = {}

            def keep(*_: object, model=trainer.bare, into=gradients) -> None:
                if not into:
                    into |= {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

            trainer.optimizer.register_step_pre_hook(keep)
            losses = []
            for update in range(UPDATES):
                window = loop.Window()
                assert trainer._update(trainer._batch(update), window)
                losses.append(window.means()[0])
            if here.main:
                run.mkdir()
                save_file(gradients, run / "gradients.safetensors")
                save_file(
                    {key: p.detach().clone() for key, p in trainer.bare.named_parameters()}, run / "weights.safetensors"
                )
                (run / "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every recipe has been trained with every cut."""
    folder = tmp_path_factory.mktemp("equal")
    drawn = torch.Generator().manual_seed(0)
    words = ["the", "king", "of", "night", "and", "day", "shall", "love", "his", "lord"]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for _ in range(120):
            chosen = torch.randint(len(words), (int(torch.randint(1, 9, (), generator=drawn)),), generator=drawn)
            rows.write(json.dumps({"text": " ".join(words[i] for i in chosen)}) + "\n")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe.replace("CACHE", str(folder)), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for world in CUTS:
        launcher = [sys.executable]
        if world > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [*launcher, __file__, str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


class Made:
    """What a recipe's updates with a cut have led to."""

    def __init__(self, folder: Path, name: str, world: int, cut: int | None):
        run = folder / f"{name}-{world}-{cut}"
        self.losses = json.loads((run / "losses.json").read_text())
        self.gradients, self.weights = (load_file(run / f"{what}.safetensors") for what in ("gradients", "weights"))


def norm(tensors: dict[str, torch.Tensor]) -> float:
    """Of all of them as one vector."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert found.keys() == wanted.keys()
    return {key: found[key].double() - wanted[key].double() for key in wanted}


@pytest.mark.parametrize("name", RECIPES)
def test_one_update_has_the_same_loss_and_gradient(runs: Path, name: str) -> None:
    """To 1e-6: the loss, and the gradient as one vector, the norm of the difference relative to its norm.

    A single tensor's gradient is compared too, where it is a thousandth of the whole or more, to 1e-5: a sum that
    cancels keeps fewer digits, and some, such as a key's bias, cancel to nothing but rounding.
    """
    whole = Made(runs, name, 1, None)
    size = norm(whole.gradients)
    for world, cut in CUT:
        made = Made(runs, name, world, cut)
        assert made.losses[0] == pytest.approx(whole.losses[0], rel=1e-6), (world, cut)
        difference = apart(made.gradients, whole.gradients)
        assert norm(difference) <= 1e-6 * size, (world, cut)
        for key, gradient in whole.gradients.items():
            if gradient.norm() >= 1e-3 * size:
                assert difference[key].norm() <= 1e-5 * gradient.norm(), (world, cut, key)


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_updates_lead_to_the_same_place(runs: Path, name: str) -> None:
    """To 1e-3, losses and weights: Adam makes a full step even of a gradient that is but rounding."""
    whole = Made(runs, name, 1, None)
    assert len(whole.losses) == UPDATES
    assert whole.losses[-1] < whole.losses[0]
    for world, cut in CUT:
        made = Made(runs, name, world, cut)
        assert made.losses == pytest.approx(whole.losses, rel=1e-3), (world, cut)
        assert norm(apart(made.weights, whole.weights)) <= 1e-3 * norm(whole.weights), (world, cut)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
