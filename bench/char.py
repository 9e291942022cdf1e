"""Tiny Shakespeare by characters, beside nanoGPT's own recipe: loss over the whole held-out tenth, and wall time.

    git clone https://github.com/karpathy/nanoGPT
    make bench-char NANOGPT=nanoGPT

On a CPU: nanoGPT's CPU budget (README: 4 layers, 4 heads, 128 wide, context 64, 2,000 updates of 12 x 64 characters)
against configs/shakespeare-char.yaml. On a GPU: its GPU budget (5,000 updates of 64 x 256) against
configs/shakespeare-char-gpu.yaml.
The two sides alternate; each is timed as a whole process, evaluations included. Loss is in nats a character, over all
of the last 10%, in non-overlapping windows of the context.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from bench.record import ROOT, WORK, save, timed, train_command
from train.data import Tokens, windows

CPU_FLAGS = [  # nanoGPT's README, "I only have a macbook"
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", default=os.environ.get("NANOGPT"), help="a clone of karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default 3)")
    options = parser.parse_args()
    if not options.nanogpt or not (Path(options.nanogpt) / "train.py").exists():
        sys.exit(
            f"NANOGPT is {options.nanogpt!r}; it must be a clone of https://github.com/karpathy/nanoGPT: see --help."
        )
    gpu = torch.cuda.is_available()
    recipe = "configs/shakespeare-char-gpu.yaml" if gpu else "configs/shakespeare-char.yaml"
    timed([sys.executable, "scripts/fetch.py", "shakespeare"])
    peer = _peer(Path(options.nanogpt))
    losses: dict[str, list[float]] = {"heed": [], "nanoGPT": []}
    seconds: dict[str, list[float]] = {"heed": [], "nanoGPT": []}
    parameters = 0
    for seed in range(1, options.seeds + 1):
        flags = [] if gpu else CPU_FLAGS
        threads = {} if gpu else {"OMP_NUM_THREADS": str(os.cpu_count())}
        seconds["nanoGPT"].append(
            timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags], cwd=peer, **threads)
        )
        losses["nanoGPT"].append(_peer_loss(peer))
        run_dir = WORK / f"char-{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)
        seconds["heed"].append(timed(train_command(recipe, f"run.seed={seed}", f"run.dir={run_dir}", "log.wandb=null")))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        held = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
        losses["heed"].append(min(held) if gpu else held[-1])  # nanoGPT keeps its best on a GPU, where both overfit
        parameters = _parameters(run_dir / "model" / "config.json")
        print(
            f"seed {seed}: "
            + "; ".join(f"{side} {losses[side][-1]:.4f} in {seconds[side][-1]:.0f} s" for side in losses),
            flush=True,
        )
    device = "gpu" if gpu else "cpu"
    command = "make bench-char NANOGPT=nanoGPT"
    note = f"Recipe: {recipe}, {parameters:,} parameters."
    name = (
        "Tiny Shakespeare by characters, nanoGPT's GPU budget"
        if gpu
        else "Tiny Shakespeare by characters, nanoGPT's CPU budget"
    )
    for what, samples, unit in (("loss", losses, "nats a character"), ("time", seconds, "s, whole process")):
        sides = {side: {"samples": values, "unit": unit} for side, values in samples.items()}
        ratio = statistics.mean(samples["heed"]) / statistics.mean(samples["nanoGPT"])
        save(f"char-{device}-{what}", f"{name}: {what}", command, sides, ratio, statistic="mean", note=note)


def _peer(clone: Path) -> Path:
    """A copy of the clone with its data prepared by its own script."""
    copy = WORK / "nanoGPT"
    if not copy.exists():
        shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(ROOT / ".cache" / "text" / "shakespeare.txt", data / "input.txt")
    timed([sys.executable, "prepare.py"], cwd=data)
    return copy


def _peer_loss(peer: Path) -> float:
    """The loss of the checkpoint that nanoGPT just wrote, by its own model, on the same windows as ours."""
    sys.path.append(str(peer))  # last: the clone has a train.py too
    import model as nanogpt  # type: ignore[import-not-found]

    saved = torch.load(peer / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
    net = nanogpt.GPT(nanogpt.GPTConfig(**saved["model_args"]))
    net.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    net.eval()
    tokens = Tokens([np.fromfile(peer / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16)])
    total = count = 0.0
    with torch.no_grad():
        for batch in windows(tokens, saved["model_args"]["block_size"], rows=64):
            logits, _ = net(batch["tokens"], batch["targets"].clamp(min=0))
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
            )
            count += float((batch["targets"] >= 0).sum())
    return total / count


def _parameters(config: Path) -> int:
    from lm.pretrained import read_config

    return read_config(config.parent).parameters()["total"]


if __name__ == "__main__":
    main()
