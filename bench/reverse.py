"""Reversal: how often both older architectures are exactly right, and whether their strongest alignment is true.

    make bench-reverse

1,000 sequences of 1 to 25 numbers that nothing was trained on, greedy. For the Transformer the alignment is that of the
cross-attention head that aligns best, which the table names. A run that exists is continued, or used if it is finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.record import WORK, save_table, timed, train_command
from lm.alignment import reversal, strongest
from lm.trace import AttentionTrace
from train.synthetic import pairs

RECIPES = {"RNNsearch": "configs/translate-reverse-rnnsearch.yaml", "Transformer": "configs/translate-reverse.yaml"}
COLUMNS = ("model", "parameters", "exactly right", "strongest alignment true", "head", "training minutes")
SEQUENCES = 1000
ALIGNED = 200  # of them, the ones whose attention is recorded
SEED = 2**31  # of the sequences; recipes draw theirs from run.seed


def judge(name: str, recipe: str, seed: int) -> dict[str, Any]:
    """Trains a recipe and counts."""
    from lm.attend import attention
    from lm.translate import Translator, translate

    run_dir = WORK / "reverse" / f"{Path(recipe).stem}-{seed}"
    timed(train_command(recipe, f"run.dir={run_dir}", f"run.seed={seed}", "log.wandb=null"))
    translator = Translator.load(run_dir / "model", "float32")
    held = list(pairs("reverse", rows=SEQUENCES, symbols=50, longest=25, seed=SEED))
    found = translate(translator.model, translator.tokenizer, [source for source, _ in held], beam=1, length_penalty=0)
    exact = sum(out.text == target for out, (_, target) in zip(found, held, strict=True)) / SEQUENCES
    right: dict[tuple[int, int], int] = {}
    asked = 0
    for source, target in held[:ALIGNED]:
        trace = AttentionTrace(kinds=["cross"])
        maps, _ = attention(
            translator.model, translator.tokenizer, source, list(translator.stop_ids), trace, target=target
        )
        words = len(source.split())
        asked += words
        for layer, weights in maps.cross.items():
            for head, one in enumerate(weights):
                place = layer, head
                right[place] = right.get(place, 0) + strongest(one, reversal(words, one.shape[0] - 1))[0]
    best = max(right, key=lambda place: right[place])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "model": name,
        "parameters": translator.model.config.parameters()["total"],
        "exactly right": 100 * exact,
        "strongest alignment true": 100 * right[best] / asked,
        "head": f"layer {best[0]}, head {best[1]}",
        "training minutes": max(row["seconds"] for row in rows if "seconds" in row) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1337, help="of the training (default 1337)")
    options = parser.parse_args()
    rows = [judge(name, recipe, options.seed) for name, recipe in RECIPES.items()]
    note = f"Lengths 1 to 25, {SEQUENCES:,} sequences, in percent; alignment over every position of {ALIGNED} of them."
    save_table("reverse", "Reversal", "make bench-reverse", COLUMNS, rows, note=note, seed=options.seed)


if __name__ == "__main__":
    main()
