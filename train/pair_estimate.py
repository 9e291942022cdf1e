"""What a run on pairs will take, by arithmetic: the translator's part of `python -m train CONFIG --dry-run`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from train.config import Recipe, RecipeError
from train.estimate import Speed, World, duration, si, size
from train.pair_prepare import find_pairs
from train.pair_sources import open_pairs
from train.schema import show
from train.translation import fits, flops

READ = 200_000  # pairs that a dry run reads to learn their lengths
ASSUMED = 25.0  # tokens a side, where nothing is known
PIECES = 1.3  # tokens that a BPE makes of a word, assumed
SPECIAL = 4  # tokens of a vocabulary of words that no text holds


@dataclass(frozen=True)
class Known:
    """What is known of the pairs without preparing them. source and target: mean tokens, ending tokens included."""

    pairs: int | None
    source: float
    target: float
    longest: float  # mean of the longer side
    vocab_size: int
    note: str


def look(recipe: Recipe) -> Known:
    """The pairs as far as they can be known: prepared, else read and their words counted."""
    try:
        prepared = find_pairs(recipe)
    except RecipeError as error:
        entries = recipe.tokenizer.vocab_size or 30_000
        return Known(None, ASSUMED, ASSUMED, ASSUMED, entries, f"not there: {' '.join(error.problems)}")
    if prepared is not None:
        rows = fits(prepared.train, recipe)
        source, target = (lengths[rows] + 1 for lengths in prepared.train.lengths())
        held = 0 if prepared.validation is None else len(prepared.validation)
        note = f"{len(rows):,} pairs that fit, prepared, with {held:,} for validation"
        return Known(len(rows), *_means(source, target), prepared.tokenizer.vocab_size, note)
    if recipe.data.dataset is not None:  # it may have to be fetched to be counted
        entries = recipe.tokenizer.vocab_size or 30_000
        asked = f"not prepared (data.dataset is {show(recipe.data.dataset)}); {ASSUMED:.0f} tokens a side assumed"
        return Known(None, ASSUMED, ASSUMED, ASSUMED, entries, asked)
    words: set[str] = set()
    lengths: list[tuple[int, int]] = []
    whole = True
    for one, other in open_pairs(recipe)[0].pairs():
        first, second = one.split(), other.split()
        lengths.append((len(first), len(second)))
        words.update(first, second)
        if len(lengths) == READ:
            whole = False
            break
    if not lengths:
        return Known(None, ASSUMED, ASSUMED, ASSUMED, 30_000, "there is no pair in it")
    rate = PIECES if recipe.tokenizer.kind == "bpe" else 1.0
    source, target = (np.array([pair[side] for pair in lengths]) * rate + 1 for side in range(2))
    distinct = len(words) + SPECIAL
    most = recipe.tokenizer.vocab_size or distinct
    entries = min(most, distinct) if rate == 1 else most
    assumed = f"; {rate} tokens a word assumed" if rate != 1 else ""
    share = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
    count = len(lengths) if recipe.data.validation_source is not None else round(len(lengths) * (1 - share))
    note = f"{count:,} pairs, not prepared{assumed}" if whole else f"more than {READ:,} pairs, not prepared{assumed}"
    return Known(count if whole else None, *_means(source, target), entries, note)


def _means(source: np.ndarray, target: np.ndarray) -> tuple[float, float, float]:
    return float(source.mean()), float(target.mean()), float(np.maximum(source, target).mean())


def estimate(recipe: Recipe, known: Known, world: World, speed: Speed | None) -> list[str]:
    """The lines of a dry run."""
    ranks = world.ranks
    config = recipe.model_config(known.vocab_size, 1)
    counts, train = config.parameters(), recipe.train
    a_token = flops(config, known.source, known.target)
    if train.batch_sentences is not None:
        rows, batch = float(train.batch_sentences), f"{train.batch_sentences:,} pairs"
    else:
        assert train.batch_tokens is not None
        rows, batch = train.batch_tokens / known.longest, f"at most {train.batch_tokens:,} tokens a side with padding"
    steps = recipe.total_steps
    tokens = steps * rows * known.target
    shape = ", ".join(
        f"{field.name.replace('_', ' ')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if type(getattr(config, field.name)) is int and field.name != "start_id"
    )
    parts = " + ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total" and count)
    # Weights, gradients and two numbers a parameter in fp32; Muon keeps but one for each matrix in a layer.
    held = 16 * counts["total"] / (ranks if world.sharded else 1)
    lines = [
        f"model        {config.architecture}: {shape}",
        f"parameters   {counts['total']:,}: {parts}",
        f"FLOPs        {si(a_token)} a target token, forward and backward, of pairs with {known.source:.1f} and "
        f"{known.target:.1f} tokens, ending tokens included",
        f"batch        {batch}, about {rows:,.0f} pairs and {rows * known.target:,.0f} target tokens, over {ranks} rank"
        + "s" * (ranks > 1),
        f"memory       about {size(held)} a rank for weights, gradients and the optimizer; activations come on top",
        f"steps        {steps:,} updates, about {tokens:,.0f} target tokens",
        f"text         {known.note}",
    ]
    if known.pairs is None:
        lines.append("epochs       unknown until the pairs are prepared")
    else:
        lines.append(f"epochs       about {steps * rows / max(1, known.pairs):,.2f} passes over {known.pairs:,} pairs")
    if speed is None:
        lines.append("time         unknown: the peak of this device is not known")
    else:
        seconds = tokens * a_token / (speed.flops * ranks)
        lines.append(f"time         about {duration(seconds)} at {si(speed.flops)}FLOP/s a rank: {speed.note}")
    return lines
