"""The time of one training step against sentence length: the Transformer is parallel over positions, the RNN is not.

    make bench-step-time

RNNsearch and the Transformer with about as many parameters each, batches of few sentences, so that what is waited for
is the chain of steps and not the arithmetic. Random tokens; forward and backward; the two take turns. Draws
docs/pictures/step-time.svg.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench.record import ROOT, save_table

LENGTHS = (8, 16, 32, 64, 128)
SENTENCES = 4
VOCABULARY = 4000
PICTURE = ROOT / "docs" / "pictures" / "step-time.svg"


def models() -> dict[str, torch.nn.Module]:
    """Both, in training mode, with random weights."""
    from lm.rnnsearch import RNNSearch
    from lm.rnnsearch_config import RNNSearchConfig
    from lm.transformer import Transformer
    from lm.transformer_config import TransformerConfig

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "context": max(LENGTHS) + 1, "start_id": 1}
    return {
        "RNNsearch": RNNSearch(RNNSearchConfig(**common, hidden=256, embedding=256, maxout=128)).train(),
        "Transformer": Transformer(
            TransformerConfig(**common, encoder_layers=4, decoder_layers=4, width=192, heads=4, mlp_width=512)
        ).train(),
    }


def step(model: torch.nn.Module, length: int) -> float:
    """Milliseconds of a forward and a backward over sentences of so many tokens on both sides."""
    tokens = torch.randint(3, VOCABULARY, (SENTENCES, length))
    batch = {
        "src": tokens,
        "src_mask": torch.ones_like(tokens, dtype=torch.bool),
        "tgt_input": tokens,
        "tgt_output": tokens,
    }
    began = time.perf_counter()
    model(batch).total.backward()
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each (default 9)")
    options = parser.parse_args()
    both = models()
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in both.items()}
    for model in both.values():
        step(model, LENGTHS[-1])
    rows = []
    for length in LENGTHS:
        samples: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(options.rounds):
            for name, model in both.items():
                samples[name].append(step(model, length))
        rows.append(
            {"tokens": str(length)}
            | {f"{name}, ms": statistics.median(values) for name, values in samples.items()}
            | {"samples": samples}
        )
    shapes = ", ".join(f"{name} {count:,} parameters" for name, count in parameters.items())
    save_table(
        "step-time",
        "Training step against sentence length",
        "make bench-step-time",
        ["tokens", *(f"{name}, ms" for name in both)],
        rows,
        note=f"{SENTENCES} sentences, source and target of so many tokens; {shapes}; medians of {options.rounds}.",
    )
    draw(rows, list(both))


def draw(rows: list[dict], names: list[str]) -> None:
    """Milliseconds against tokens, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.0, 4.0))
    for name in names:
        axes.plot([int(row["tokens"]) for row in rows], [row[f"{name}, ms"] for row in rows], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens in a sentence")
    axes.set_ylabel("ms a training step")
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
