"""The probability of given translations: `score` from Python, `python -m lm score FOLDER` on pairs of lines.

A pair is scored by teacher forcing: the whole target goes through one step of the model, whose logits at each place are
for the token that follows. The end of the target is scored with it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm.console import reader_left
from lm.search import pad
from lm.tokenizer import Tokenizer
from lm.translate import DTYPES, Translator

BATCH_TOKENS = 1024  # of sources and targets, padding included: their logits are the largest tensor by far


@dataclass(frozen=True)
class Score:
    """What the model gives one target after its source."""

    logprobs: list[float]  # of each token, in nats; the end token's is the last

    @property
    def logprob(self) -> float:
        """The sum, in nats."""
        return math.fsum(self.logprobs)

    @property
    def tokens(self) -> int:
        """How many the target has, with its end token."""
        return len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return _perplexity(self.logprob, self.tokens)


@torch.inference_mode()
def score(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = BATCH_TOKENS
) -> list[Score]:
    """Score pairs of token ids: the source as the tokenizer gives it, the target with its end token.

    The model should be in eval mode. Raises ValueError, naming the pair, for an empty or too long source or target.
    """
    for number, (source, target) in enumerate(pairs):
        problem = refusal(model, len(source), len(target))
        if problem:
            raise ValueError(f"pair {number}: {problem}")
    device = next(model.parameters()).device
    scores = [Score([])] * len(pairs)
    for rows in _batches(model, pairs, batch_tokens):
        targets, real = pad([pairs[row][1] for row in rows], device)
        state = model.start(*pad([pairs[row][0] for row in rows], device))
        logits, _ = model.step(torch.cat((state.first.unsqueeze(1), targets[:, :-1]), dim=1), state)
        picked = logits.gather(2, targets.unsqueeze(2)).squeeze(2).float() - logits.float().logsumexp(dim=-1)
        for row, values, length in zip(rows, picked.tolist(), real.sum(dim=1).tolist(), strict=True):
            scores[row] = Score(values[:length])
    return scores


def refusal(model: Any, source: int, target: int) -> str | None:
    """Why a source and a target of so many tokens cannot be scored, one sentence; None where they can."""
    try:
        room = model.room(source)
    except ValueError as error:
        return str(error)
    if target < 1:
        return "the target is empty; it must hold at least one token."
    if target > room:
        return f"the target has {target} tokens; after this source the model has room for {room}."
    return None


def score_texts(
    model: Any,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    end: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Score]:
    """Score pairs of texts; `end` is the token that ends a target. Raises ValueError as `score` does, counting from 1
    as lines are.
    """
    encoded, size = [], model.config.vocab_size
    for number, (source, target) in enumerate(pairs, start=1):
        ids = tokenizer.encode(source), [*tokenizer.encode(target, add_special_tokens=False), end]
        unknown = max(max(ids[0], default=0), max(ids[1]))
        problem = refusal(model, len(ids[0]), len(ids[1]))
        if unknown >= size:
            problem = f"it has token {unknown}; all must be below the model's vocabulary size, {size}."
        if problem:
            raise ValueError(f"line {number}: {problem}")
        encoded.append(ids)
    return score(model, encoded, batch_tokens)


def _batches(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], budget: int) -> Iterator[list[int]]:
    """The pairs' numbers in groups of like lengths, within the budget and what the model has room for."""
    batch: list[int] = []
    longest = (0, 0)
    for row in sorted(range(len(pairs)), key=lambda row: (len(pairs[row][0]), len(pairs[row][1]))):
        source, target = max(longest[0], len(pairs[row][0])), max(longest[1], len(pairs[row][1]))
        if batch and ((len(batch) + 1) * (source + target) > budget or target > model.room(source)):
            yield batch
            batch, source, target = [], len(pairs[row][0]), len(pairs[row][1])
        batch.append(row)
        longest = (source, target)
    if batch:
        yield batch


def _perplexity(logprob: float, tokens: int) -> float:
    try:
        return math.exp(-logprob / tokens)
    except OverflowError:
        return math.inf


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 with one sentence for what cannot be as asked; 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    try:
        pairs = read_pairs(options.source, options.target)
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"threads must be at least 1, got {options.threads}.")
            torch.set_num_threads(options.threads)
        translator = Translator.load(options.folder, options.dtype)
        end = next(iter(translator.stop_ids))
        scores = score_texts(translator.model, translator.tokenizer, pairs, end)
        for one in scores:
            print(f"{one.logprob:.6f}\t{one.tokens}\t{one.perplexity:.6g}")
        sys.stdout.flush()
    except ValueError as error:  # of the files, the folder or a line; each is one sentence
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        reader_left()
        return 0
    logprob, tokens = math.fsum(one.logprob for one in scores), sum(one.tokens for one in scores)
    if tokens:
        mean = f"{-logprob / tokens:.6f} nats a token, perplexity {_perplexity(logprob, tokens):.6g}"
        print(f"{len(scores)} pairs, {tokens} target tokens: {mean}.", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lm score",
        description="The log-probability (nats), tokens (with the end) and perplexity of given translations, a line "
        "each. Pairs come from two line-aligned files, or as source TAB target on standard input.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a model folder (config.json, model.safetensors, tokenizer.json)")
    add("--source", metavar="FILE", help="sources, a line each")
    add("--target", metavar="FILE", help="their translations, a line each")
    add("--threads", type=int, help="processor threads (default: torch's own choice)")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in (default auto: the model's own)")
    return parser


def read_pairs(source: str | None, target: str | None) -> list[tuple[str, str]]:
    """The pairs of two files, or of standard input where neither is given. Raises ValueError, one sentence."""
    if source is None and target is None:
        columns = [line.split("\t") for line in _text_lines("standard input", sys.stdin.buffer.read())]
        for number, parts in enumerate(columns, start=1):
            if len(parts) != 2:
                raise ValueError(f"line {number} has {len(parts)} columns; it must be a source, a tab and a target.")
        return [(parts[0], parts[1]) for parts in columns]
    if source is None or target is None:
        raise ValueError("--source and --target go together: give both, or neither and pairs on standard input.")
    texts = []
    for name in (source, target):
        try:
            texts.append(_text_lines(name, Path(name).read_bytes()))
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}.") from None
    if len(texts[0]) != len(texts[1]):
        raise ValueError(
            f"{source} has {len(texts[0])} lines and {target} {len(texts[1])}; each source must have one target."
        )
    return list(zip(*texts, strict=True))


def _text_lines(name: str, data: bytes) -> list[str]:
    lines = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{name}, line {number} is not UTF-8; it must be text.") from None
    return lines
