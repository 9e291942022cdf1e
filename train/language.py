"""Language modelling: a decoder learns to continue one stream of tokens."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lm import pretrained
from lm.decoder import Block, DecoderLM
from lm.sampling import SamplingParams
from lm.search import generate
from train import card, origin
from train.config import Recipe, RecipeError
from train.data import Batches
from train.evaluate import evaluate
from train.launch import Launch
from train.prepare import Prepared
from train.task import Found


class LanguageTask:
    """See train.task.Task. A batch is a number of windows of the token stream, every one of them full."""

    smoothing = 0.0

    def __init__(self, recipe: Recipe, prepared: Prepared):
        self.recipe, self.data = recipe, prepared
        self.tokenizer, self.fingerprint = prepared.tokenizer, prepared.fingerprint
        self.config = recipe.decoder_config(prepared.tokenizer.vocab_size)
        self.prompts = _prompts(recipe, prepared)
        self.batches = Batches(
            prepared.train,
            context=recipe.model.context,
            batch_tokens=recipe.batch_tokens,
            seed=recipe.run.seed,
            eos_id=prepared.tokenizer.eos_id,
            document_mask=recipe.data.document_mask,
        )
        split = prepared.train
        self.bytes_per_target = split.bytes_total / len(split) if split.bytes_total else None
        self.flops_per_target = float(self.config.flops_per_token(recipe.model.context))

    def model(self) -> nn.Module:
        recipe = self.recipe
        model = DecoderLM(self.config) if recipe.origin is None else origin.load(recipe)
        model.recompute = recipe.train.activation_checkpointing
        if recipe.train.compile:
            compile_blocks(model)
        return model

    def epoch(self, update: int) -> float:
        return self.batches.epoch(update)

    def targets(self, update: int) -> int:
        return self.batches.sequences * self.batches.context

    def micro_batches(self, update: int, rank: int, world: int) -> list[dict[str, Tensor]]:
        total = self.batches.sequences
        first, last = rank * total // world, (rank + 1) * total // world
        size = self.recipe.train.micro_batch or last - first
        return [self.batches.batch(update, slice(row, min(row + size, last))) for row in range(first, last, size)]

    def describe(self) -> str:
        return f"steps of {self.recipe.batch_tokens:,} tokens"

    def evaluate(self, model: nn.Module, here: Launch) -> Found | None:
        if self.data.validation is None:
            return None
        held = evaluate(
            model,
            here,
            self.data.validation,
            context=self.batches.context,
            limit=self.recipe.eval.tokens,
            eos_id=self.tokenizer.eos_id,
            document_mask=self.recipe.data.document_mask,
        )
        row = {"validation_loss": held.loss, "validation_bits_per_byte": held.bits_per_byte}
        bits = f", {held.bits_per_byte:.4f} bits a byte" if held.bits_per_byte is not None else ""
        return Found(held.loss, row, f"held-out loss {held.loss:.4f}{bits}")

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        recipe, tokenizer = self.recipe, self.tokenizer
        if not self.prompts:
            return []
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=recipe.eval.sample_tokens, seed=recipe.run.seed)
        stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        # Each step of a sample has another shape: compiled blocks would be compiled again for each.
        with torch.compiler.set_stance("force_eager") if recipe.train.compile else nullcontext():
            outputs = generate(model, self.prompts, params, stops)
        return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(recipe.eval.prompts, outputs, strict=True)]

    def pictures(self, model: nn.Module, run_dir: Path, step: int) -> list[tuple[str, Path]]:
        return []

    def save(
        self, model: nn.Module, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, run_dir: Path, step: int
    ) -> None:
        assert isinstance(model, DecoderLM)
        pretrained.save(
            model,
            folder,
            dtype=dtype,
            tokenizer=self.tokenizer,
            weights=weights,
            extra={"README.md": card.write(self.recipe, self.config, self.data, run_dir, step)},
            **origin.kept(self.recipe, self.tokenizer),
        )


def compile_blocks(model: DecoderLM) -> None:
    """torch.compile for what stands before and after attention in a block: one compilation serves every layer."""
    for block in model.layers:
        assert isinstance(block, Block)
        block.before = torch.compile(block.before)  # type: ignore[method-assign]
        block.after = torch.compile(block.after)  # type: ignore[method-assign]


def _prompts(recipe: Recipe, prepared: Prepared) -> list[list[int]]:
    """eval.prompts as ids, at most half a context of each. Raises RecipeError for one that cannot be continued."""
    context = recipe.model.context
    prompts = [prepared.tokenizer.encode(prompt)[-max(1, context // 2) :] for prompt in recipe.eval.prompts]
    problems = [
        f"eval.prompts holds {text!r}; a prompt must have at least one token."
        for text, ids in zip(recipe.eval.prompts, prompts, strict=True)
        if not ids
    ]
    if prompts and context < 2:
        problems.append(f"model.context is {context}; it must be at least 2 to continue eval.prompts.")
    if problems:
        raise RecipeError(problems)
    return prompts
