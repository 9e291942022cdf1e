"""Translation: a model learns to write the target of a source, whichever architecture it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm import pretrained
from lm.architectures import make_model
from lm.trace import AttentionTrace
from lm.translate import translate
from train import bleu, pair_card
from train.config import Recipe, RecipeError
from train.launch import Launch
from train.pair_prepare import PreparedPairs
from train.pairs import Frame, PairBatches, Pairs, in_order
from train.task import Found

EVALUATED = 1 << 12  # tokens a side of a batch that is scored
TRANSLATED = 1 << 11  # source tokens, for each hypothesis, that are translated between two looks at what was asked
SHOWN = 8  # samples
PICTURED = 25  # words of a source whose attention is drawn, at most: a picture with more is hard to read


class TranslationTask:
    """See train.task.Task. A batch is pairs of about equal length; its targets are the tokens of its translations,
    their ending tokens included."""

    bytes_per_target: float | None = None  # a text's measure; translations are compared by nats a token, and by BLEU

    def __init__(self, recipe: Recipe, prepared: PreparedPairs):
        self.recipe, self.data = recipe, prepared
        self.tokenizer, self.fingerprint = prepared.tokenizer, prepared.fingerprint
        self.smoothing = recipe.train.label_smoothing
        assert self.tokenizer.bos_id is not None
        self.config = recipe.model_config(self.tokenizer.vocab_size, self.tokenizer.bos_id)
        self.frame = prepared.frame()
        fitting = fits(prepared.train, recipe)
        self.too_long = len(prepared.train) - len(fitting)
        try:
            self.batches = PairBatches(
                prepared.train,
                seed=recipe.run.seed,
                batch_tokens=recipe.train.batch_tokens,
                batch_sentences=recipe.train.batch_sentences,
                eligible=fitting,
            )
        except ValueError as error:
            problem = f"model.context is {recipe.model.context}"
            if recipe.data.longest is not None:
                problem += f" and data.longest is {recipe.data.longest}"
            raise RecipeError([f"{problem}, of {len(prepared.train):,} pairs {len(fitting):,} fit: {error}"]) from None
        source, target = (lengths[fitting] + 1 for lengths in prepared.train.lengths())
        self.flops_per_target = flops(self.config, float(source.mean()), float(target.mean()))
        self.shown: list[tuple[str, str, str]] = []

    def model(self) -> nn.Module:
        model = make_model(self.config)
        model.recompute = self.recipe.train.activation_checkpointing
        return model

    def epoch(self, update: int) -> float:
        return self.batches.epoch(update)

    def targets(self, update: int) -> int:
        return self.batches.targets(update)

    def micro_batches(self, update: int, rank: int, world: int) -> list[dict[str, Tensor]]:
        rows = self.batches.rows(update)
        mine, most = rows[rank::world], -(-len(rows) // world)
        size = self.recipe.train.micro_batch or most
        # As many on every rank, for the collectives in a sharded model's forward: the last may have nothing to ask.
        parts = [mine[first : first + size].tolist() for first in range(0, most, size)]
        return [self.frame.batch(self.data.train, part or rows[:1].tolist(), counts=bool(part)) for part in parts]

    def describe(self) -> str:
        train = self.recipe.train
        tokens = f"at most {train.batch_tokens or 0:,} tokens a side"
        size = f"{train.batch_sentences:,} pairs" if train.batch_sentences else tokens
        left_out = f"; {self.too_long:,} of {len(self.data.train):,} pairs are too long" if self.too_long else ""
        return f"steps of {size}{left_out}"

    def evaluate(self, model: nn.Module, here: Launch) -> Found | None:
        held = self.data.validation
        if held is None:
            return None
        loss = held_out_loss(model, self.frame, held, fits(held, self.recipe, longest=False), here)
        row: dict[str, Any] = {"validation_loss": loss, "validation_perplexity": float(np.exp(min(loss, 700.0)))}
        says = f"held-out loss {loss:.4f}, perplexity {row['validation_perplexity']:.3f}"
        found = here.alone(partial(self._translate, model)) if self.recipe.eval.bleu is not None else None
        if found is not None:
            row |= found
            says += f", BLEU {found['validation_bleu']:.2f}, chrF {found['validation_chrf']:.2f}"
            says += f", {found['validation_exact']:.1%} exact"
        return Found(loss, row, says)

    def _translate(self, model: nn.Module, check: Callable[[], None]) -> dict[str, Any]:
        """BLEU of the first eval.bleu held-out pairs, greedy or by beam search as the recipe says; `check` is called
        after each batch of them."""
        ask = self.recipe.eval
        pairs = self.data.held[: ask.bleu]
        sources, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        found = translate(
            model,
            self.tokenizer,
            sources,
            beam=ask.beam,
            length_penalty=ask.length_penalty,
            batch_tokens=TRANSLATED,
            progress=lambda done: check(),
        )
        outputs = [translation.text for translation in found]
        self.shown = list(islice(zip(sources, outputs, references, strict=True), SHOWN))
        scores = bleu.score(outputs, references, tokenize=ask.bleu_tokenize, lowercase=ask.lowercase)
        return {
            "validation_bleu": scores.bleu,
            "validation_chrf": scores.chrf,
            "validation_exact": bleu.exact(outputs, references),
            "bleu_signature": scores.signature,
            "chrf_signature": scores.chrf_signature,
        }

    def samples(self, model: nn.Module) -> Sequence[tuple[str, ...]]:
        if not self.shown and self.data.held:
            pairs = self.data.held[:SHOWN]
            found = translate(model, self.tokenizer, [pair[0] for pair in pairs], beam=1)
            self.shown = [(source, out.text, target) for (source, target), out in zip(pairs, found, strict=True)]
        shown, self.shown = self.shown, []
        return shown

    def pictures(self, model: nn.Module, run_dir: Path, step: int) -> list[tuple[str, Path]]:
        """What the model attends to while it translates the first held-out source: for RNNsearch the alignment."""
        from lm import pictures
        from lm.attend import attention

        source = next((pair[0] for pair in self.data.held if len(pair[0].split()) <= PICTURED), None)
        if source is None:
            return []
        ends = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        maps, _ = attention(model, self.tokenizer, source, ends, AttentionTrace())
        if not maps.kinds:
            return []  # RNNencdec attends to nothing
        kind = maps.kinds[-1]
        layers, heads = list(maps.of(kind)), maps.head_numbers(kind)
        one = len(layers) == len(heads) == 1
        figure = pictures.matrix(maps, kind, layers[0], heads[0]) if one else pictures.grid(maps, kind)
        path = run_dir / "samples" / f"attention-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(figure, path)
        return [("eval/attention", path)]

    def save(
        self, model: Any, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, run_dir: Path, step: int
    ) -> None:
        card = pair_card.write(self.recipe, self.config, self.data, run_dir, step)
        pretrained.save(
            model, folder, dtype=dtype, tokenizer=self.tokenizer, weights=weights, extra={"README.md": card}
        )


def fits(pairs: Pairs, recipe: Recipe, *, longest: bool = True) -> np.ndarray:
    """int64 [m]: the rows that the model has room for, and unless `longest` is false data.longest too.

    An encoder-decoder has a context for each side, and each side one special token; a decoder reads both in one, with
    the token that divides them.
    """
    source, target = pairs.lengths()
    context = recipe.model.context
    good = (
        source + 1 + target <= context
        if recipe.model.architecture == "decoder"
        else (np.maximum(source, target) + 1 <= context)
    )
    if longest and recipe.data.longest is not None:
        good &= np.maximum(source, target) <= recipe.data.longest
    return np.flatnonzero(good)


def flops(config: Any, source: float, target: float) -> float:
    """Floating-point operations to train on one target token of pairs with so many tokens a side."""
    if config.architecture != "decoder":
        return float(config.flops_per_token(round(source), round(target)))
    whole = source + target - 1  # the dividing token is a source's last and a target's first
    return float(config.flops_per_token(max(1, round(whole)))) * whole / target


@torch.no_grad()
def held_out_loss(model: nn.Module, frame: Frame, pairs: Pairs, rows: np.ndarray, here: Launch) -> float:
    """Nats a target token, without label smoothing, of the `rows` of `pairs`. The ranks share the batches; each runs
    equally many. NaN where no pair fits. Raises launch.Abandoned, on all of them, when one is asked to stop."""
    batches = in_order(pairs, rows.tolist(), EVALUATED)
    total, count = 0.0, 0.0
    for first in range(0, len(batches), here.world):
        group = batches[first : first + here.world]
        here.check()
        mine = here.rank < len(group)
        batch = frame.batch(pairs, group[here.rank if mine else 0].tolist())
        with here.accelerator.autocast():
            loss = model({name: tensor.to(here.device) for name, tensor in batch.items()})
        if mine:
            total, count = total + float(loss.nll), count + float(loss.targets)
    total, count = here.sum([total, count])
    return total / count if count else float("nan")
