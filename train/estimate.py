"""What a run will take, by arithmetic, before it is started: `python -m train CONFIG --dry-run`.

Each line says how its number comes about; what cannot be known before the text is prepared is said to be unknown.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from lm.config import DecoderConfig
from lm.linear import linear
from train.config import Recipe, RecipeError, check_launch
from train.peaks import peak_flops
from train.prepare import find, load_tokenizer
from train.sources import Source, open_sources

GIB = 2**30
LOSS_SLICE = 1 << 27  # logits that exist at a time on a GPU (lm/loss.py); a CPU has fewer
SHARE = {"cpu": 0.5, "cuda": 0.4}  # of the measured product, of the peak, that training is assumed to reach
READ_LIMIT = 1 << 28  # bytes of text that a dry run reads to count its characters


@dataclass(frozen=True)
class World:
    """The ranks that the launcher makes, and whether FSDP2 shards the model over them."""

    ranks: int = 1
    sharded: bool = False

    @classmethod
    def here(cls) -> World:
        """From the environment that `accelerate launch` sets."""
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
        return cls(int(os.environ.get("WORLD_SIZE", "1")), fsdp and os.environ.get("FSDP_VERSION", "1") == "2")


@dataclass(frozen=True)
class Count:
    """Training tokens; `note` says how the number is known, or why there is none."""

    tokens: int | None
    note: str


@dataclass(frozen=True)
class Speed:
    """FLOP/s that one rank is expected to reach; `note` says what was measured and what assumed."""

    flops: float
    note: str


def memory(recipe: Recipe, config: DecoderConfig, world: World, device: str) -> dict[str, float]:
    """Bytes that one rank holds at the height of a step: `weights`, `gradients`, `optimizer`, `activations`, `logits`.

    Weights and gradients are fp32; bf16 adds a copy of the matrices while a step runs. AdamW keeps two numbers a
    parameter; Muon one for each matrix in the layers. Activations are those that the backward pass needs, of one
    micro-batch: with checkpointing only what enters each block, and one block's own. Logits exist a slice at a time.
    """
    counts = config.parameters()
    total, shards = counts["total"], world.ranks if world.sharded else 1
    bf16 = recipe.train.dtype == "bf16"
    size = 2 if bf16 else 4
    w, q, kv, inner = config.width, config.heads * config.dim, config.kv * config.dim, config.inner
    matrices = config.layers * w * (2 * q + 2 * kv + (3 if config.activation == "swiglu" else 2) * inner)
    adam = total - matrices if recipe.optim.name == "muon" else total

    # Of one token in one block. The residual stream and what enters a norm stay fp32.
    attention = 4 * w + size * (w + q + 2 * kv + q + kv + q)  # norm in, norm out; q, k, v; turned q, k; mixed
    attention += (8 if bf16 else 4) * (q + kv) if config.qk_norm else 0  # into and out of its norms
    mlp = 4 * w + size * (w + (4 if config.activation == "swiglu" else 2) * inner)
    if config.dropout:
        attention, mlp = attention + w, mlp + w  # masks, a byte each
    block, entering = attention + mlp, 4 * w
    tokens = micro_rows(recipe, world) * recipe.model.context
    kept = config.layers * entering + block if recipe.train.activation_checkpointing else config.layers * block
    slice_ = LOSS_SLICE if device == "cuda" else 1 << 21
    rows = min(tokens, max(64, slice_ // config.vocab_size))
    return {
        "weights": 4 * total / shards + (2 * total / (config.layers if world.sharded else 1) if bf16 else 0),
        "gradients": 4 * total / shards,
        "optimizer": (8 * adam + 4 * (total - adam)) / shards,
        "activations": tokens * (kept + 4 * 3 * w),  # and the embedding, the last norm, the gradient of its output
        "logits": rows * config.vocab_size * (4 + size + 4),
    }


def micro_rows(recipe: Recipe, world: World) -> int:
    """Sequences that a rank computes at a time: train.micro_batch, but no more than its share of the global batch."""
    share = -(-recipe.batch_tokens // recipe.model.context // world.ranks)
    return min(recipe.train.micro_batch or share, share)


def estimate(
    recipe: Recipe, config: DecoderConfig, count: Count, world: World, speed: Speed | None, device: str = "cpu"
) -> list[str]:
    """The lines of a dry run. `device`: cpu | cuda."""
    parts = config.parameters()
    steps, batch, context = recipe.total_steps, recipe.batch_tokens, recipe.model.context
    trained = steps * batch
    flops = config.flops_per_token(context)
    rows, micro = batch // context, micro_rows(recipe, world)
    share = -(-rows // world.ranks)
    tied = " (tied to the embedding)" if config.tie_embeddings else ""
    held = memory(recipe, config, world, device)
    how = f"FSDP2 over {world.ranks} ranks" if world.sharded else f"{world.ranks} rank" + "s" * (world.ranks > 1)
    lines = [
        f"model        {config.layers} layers, width {config.width}, {config.heads} heads of {config.dim} "
        f"({config.kv} for keys and values), vocabulary {config.vocab_size:,}, context {config.context:,}",
        f"parameters   {parts['total']:,}: embedding {parts['embedding']:,} + layers {parts['layers']:,} "
        f"+ head {parts['head']:,}{tied}",
        f"FLOPs        {si(flops)} a token, forward and backward: 6 x the parameters in products, "
        "12 x heads x head_dim x keys seen, a layer",
        f"batch        {batch:,} tokens = {rows:,} sequences of {context:,}: {how} of {share:,}, {micro:,} at a time",
        f"memory       about {size(sum(held.values()))} a rank: "
        + ", ".join(f"{name} {size(bytes)}" for name, bytes in held.items()),
        f"steps        {steps:,} updates, {trained:,} tokens",
        f"text         {count.note}",
    ]
    if count.tokens is not None:
        lines.append(f"epochs       {trained / max(1, count.tokens):,.2f} passes over {count.tokens:,} training tokens")
    else:
        lines.append("epochs       unknown until the text is prepared")
    if speed is None:
        lines.append("time         unknown: the peak of this device is not known")
    else:
        seconds = trained * flops / (speed.flops * world.ranks)
        lines.append(f"time         about {duration(seconds)} at {si(speed.flops)}FLOP/s a rank: {speed.note}")
        if device == "cpu" and seconds > 86_400:
            peak, reached = peak_flops("H100", "bf16") or 0.0, SHARE["cuda"]
            there = duration(trained * flops / (reached * peak))
            lines.append(f"             about {there} on one H100 in bf16, assumed to reach {reached:.0%} of its peak")
    return lines


def main_dry_run(recipe: Recipe) -> list[str]:
    """What `--dry-run` prints. Writes nothing and needs no network. Raises RecipeError for what cannot run.

    A text that is not there yet is reported in its line: the estimates that do not need it are still made.
    """
    world = World.here()
    check_launch(recipe, world.sharded)
    use_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    device = "cuda" if use_gpu else "cpu"
    speed = _gpu_speed(recipe) if use_gpu else _cpu_speed(recipe)
    lines = [f"run          {recipe.run.dir}, seed {recipe.run.seed}, {recipe.train.dtype}"]
    if recipe.data.has_pairs:
        from train import pair_estimate

        return lines + pair_estimate.estimate(recipe, pair_estimate.look(recipe), world, speed)
    count, vocab_size, note = _look(recipe)
    config = recipe.decoder_config(vocab_size)
    if recipe.model.from_ is not None:
        lines.append(f"from         {recipe.model.from_}: its shape, its tokenizer, its weights")
    lines += estimate(recipe, config, count, world, speed, device)
    if note:
        lines.append(f"vocabulary   {note}")
    return lines


def _look(recipe: Recipe) -> tuple[Count, int, str]:
    """The training tokens and the vocabulary's size, as far as known without preparing; a note about the latter."""
    tokenizer, given = recipe.tokenizer, load_tokenizer(recipe)
    try:
        prepared, source = find(recipe), open_sources(recipe)[0]
    except RecipeError as error:
        prepared, source = None, None
        missing = " ".join(error.problems)
    if prepared is not None:
        where = "prepared"
        if prepared.validation is not None:
            where += f", with {len(prepared.validation):,} for validation"
        return Count(len(prepared.train), where), prepared.tokenizer.vocab_size, ""
    if given is not None:
        vocab_size, note = given.vocab_size, ""
    elif tokenizer.kind == "bpe":
        assert tokenizer.vocab_size is not None
        vocab_size, note = tokenizer.vocab_size, ""
    else:
        vocab_size, note = 100, "assumed: the characters are counted when the text is prepared"
    if source is None:
        return Count(None, f"not there: {missing}"), vocab_size, note
    size = source.size if source.unit == "bytes" else None
    if size is None:
        return Count(None, f"not prepared ({source.key})"), vocab_size, note
    if tokenizer.kind == "characters" and size <= READ_LIMIT:
        tokens, distinct = _characters(source)
        kept = _kept(recipe, tokens)
        return Count(kept, "not prepared; its characters were counted"), distinct, ""
    # English: 3.0 bytes a token with 2,048 entries, 4.2 with 50,000; other texts lie around it.
    rate = 1.0 if tokenizer.kind == "characters" else 0.27 * torch.tensor(float(vocab_size)).log2().item()
    return Count(_kept(recipe, int(size / rate)), f"not prepared; {rate:.1f} bytes a token assumed"), vocab_size, note


def _kept(recipe: Recipe, tokens: int) -> int:
    share = recipe.data.validation
    return tokens if share is None or isinstance(share, str) else int(tokens * (1 - share))


def _characters(source: Source) -> tuple[int, int]:
    seen: set[str] = set()
    count = 0
    for piece in source.pieces():
        seen.update(piece.text)
        count += len(piece.text)
    return count, len(seen) + 1 + source.many  # the unknown; the end of text


def _gpu_speed(recipe: Recipe) -> Speed | None:
    name = torch.cuda.get_device_name()
    peak = peak_flops(name, recipe.train.dtype)
    if peak is None:
        return None
    share = SHARE["cuda"]
    return Speed(share * peak, f"assumed {share:.0%} of the dense peak of {name}")


def _cpu_speed(recipe: Recipe) -> Speed:
    """Times a product of the shape that training makes most of, for a fraction of a second."""
    from train.launch import cores

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.train.threads or cores())
    dtype = torch.bfloat16 if recipe.train.dtype == "bf16" else torch.float32
    width = min(getattr(recipe.model, "width", None) or recipe.model.hidden, 1024)
    x, weight = torch.randn(2048, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    times: list[float] = []
    deadline = time.perf_counter() + 0.4
    while time.perf_counter() < deadline or len(times) < 3:
        began = time.perf_counter()
        linear(x, weight)
        times.append(time.perf_counter() - began)
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    measured = 2 * 2048 * width * 4 * width / min(times)
    share = SHARE["cpu"]
    return Speed(share * measured, f"assumed {share:.0%} of a matrix product measured here on {used} threads")


def si(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    for size, unit in ((365 * 86_400, "years"), (86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
