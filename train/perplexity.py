"""`python -m train evaluate FOLDER --text FILE`: how well a model folder predicts a text (pair_evaluate.py has pairs).

The text is cut into windows as transformers' users cut it, so that the figures are theirs. A window holds `context`
tokens and begins `stride` tokens after the one before it; what a window scores are its tokens that no window before it
held. A window's first token has nothing before it and is scored by no window that begins there: with windows that do
not overlap (stride = context, the default) that is one token of each; with overlap it is the text's first alone, and
every scored token has at least context - stride tokens before it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lm import pretrained
from lm.bar import bar
from lm.decoder import DecoderLM
from lm.tokenizer import Tokenizer
from train.data import IGNORED

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_CONTEXT = 4096  # of the default: a window of a model that claims 131,072 tokens would take a CPU hours
BATCH = 1 << 13  # tokens computed at a time


@dataclass(frozen=True)
class Score:
    """What was found. `nats` is the sum over the `scored` tokens, which stand for `bytes` of UTF-8 (special tokens for
    none)."""

    nats: float
    scored: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.scored

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no float holds it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def score(
    model: DecoderLM,
    ids: np.ndarray,
    *,
    context: int,
    stride: int,
    token_bytes: np.ndarray,
    progress: bool = False,
) -> Score:
    """The loss of `model` over `ids` (int64 [n], n >= 2) in windows of `context` tokens, `stride` apart.

    token_bytes: int [vocabulary], the UTF-8 bytes that each id stands for. 2 <= context <= the model's, 1 <= stride
    <= context.
    """
    device = model.embed_tokens.weight.device
    nats, scored, size = 0.0, 0, 0
    model.eval()
    with torch.no_grad(), bar("evaluating", len(ids), "tokens", progress) as update:
        for batch, read in windows(ids, context, stride):
            loss, count, _ = model({name: tensor.to(device) for name, tensor in batch.items()})
            targets = batch["targets"].numpy()
            nats, scored = nats + float(loss), scored + int(count)
            size += int(token_bytes[targets[targets != IGNORED]].sum())
            update(read)
    return Score(nats, scored, size)


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Batches of windows, and how many of the tokens have been read after each: `tokens` int64 [R, context - 1] and
    `targets`, one token ahead, IGNORED where a window before scores it or the text has ended."""
    length, rows = len(ids), max(1, BATCH // context)
    # The last window is the first that reaches the end, as in transformers' loop.
    last = max(0, math.ceil((length - context) / stride))
    for first in range(0, last + 1, rows):
        starts = [number * stride for number in range(first, min(first + rows, last + 1))]
        span = np.zeros((len(starts), context), dtype=np.int64)
        wanted = np.full((len(starts), context), IGNORED, dtype=np.int64)
        for row, start in enumerate(starts):
            window = ids[start : start + context]
            span[row, : len(window)] = window
            new = 1 if start == 0 else max(1, context - stride)  # where what no window before held begins
            wanted[row, new : len(window)] = window[new:]
        batch = {"tokens": span[:, :-1], "targets": wanted[:, 1:]}
        read = min(length, starts[-1] + context)
        yield {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}, read


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 with one sentence for what cannot be as asked."""
    given = sys.argv[1:] if argv is None else argv
    if any(word.startswith(("--source", "--target")) for word in given):
        from train import pair_evaluate

        return pair_evaluate.main(given)
    options = parser().parse_args(argv)
    try:
        print("\n".join(report(options)))
    except ValueError as error:  # of the folder, the tokenizer, the text or an option; each is one sentence
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m train evaluate",
        description="Perplexity, nats a token and bits a byte of a model folder on a text, counted as transformers do. "
        "With --source and --target in place of --text: BLEU, chrF and loss of its translations; see --source --help.",
    )
    add = parser.add_argument
    add("folder", help="a model folder (config.json, model.safetensors, tokenizer.json) or a GGUF file")
    add("--text", required=True, metavar="FILE", help="a plain text in UTF-8")
    add(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of a window (default: all that the model can see, but at most {MOST_CONTEXT})",
    )
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the beginnings of two windows; fewer than a window gives each token more to go by, and "
        "takes longer (default: a window, so that none overlap)",
    )
    add("--tokens", type=int, metavar="N", help="only the first N tokens of the text (default: all)")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in (default auto: the folder's own)")
    return parser


def report(options: argparse.Namespace) -> list[str]:
    """The lines that are printed. Raises ValueError, one sentence, for what cannot be as asked."""
    config = pretrained.read_config(options.folder, only="decoder")
    context = min(config.context, MOST_CONTEXT) if options.context is None else options.context
    if not 2 <= context <= config.context:
        raise ValueError(f"--context is {context}; it must be at least 2 and at most the model's, {config.context}.")
    stride = context if options.stride is None else options.stride
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; it must be at least 1 and at most the context, {context}.")
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens is {options.tokens}; it must be at least 2, as the first has nothing before it.")
    text = read_text(options.text)
    tokenizer = pretrained.load_tokenizer(options.folder)
    ids = first_ids(tokenizer, text, options.tokens)
    if len(ids) < 2:
        raise ValueError(f"--text is {options.text}, which has {len(ids)} token(s); it must have at least 2.")
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"{options.folder}: its tokenizer gives token {ids.max()}, and its model has {config.vocab_size} of them; "
            "the two must belong together."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pretrained.load(options.folder, None if options.dtype == "auto" else getattr(torch, options.dtype), device)
    found = score(model, ids, context=context, stride=stride, token_bytes=tokenizer.token_bytes(), progress=True)
    apart = "that do not overlap" if stride == context else f"{stride:,} apart"
    bits = "n/a" if found.bits_per_byte is None else f"{found.bits_per_byte:.6f}"
    return [
        f"text         {len(ids):,} tokens in windows of {context:,} {apart}; {found.scored:,} scored, "
        f"{found.bytes:,} bytes",
        f"loss         {found.loss:.6f} nats a token",
        f"perplexity   {found.perplexity:.6f}",
        f"bits a byte  {bits}",
    ]


def first_ids(tokenizer: Tokenizer, text: str, limit: int | None) -> np.ndarray:
    """int64: the ids of `text` under the tokenizer's own rule for special tokens, the first `limit` of them."""
    if limit is not None:
        # A token is seldom longer than 16 characters: the beginning is enough, with room so that its own end, where
        # tokens are cut otherwise than in the whole text, is not among those asked for.
        beginning = text[: 16 * limit + 4096]
        ids = tokenizer.encode(beginning)
        if len(ids) >= limit + 1024:
            return np.array(ids[:limit], dtype=np.int64)
    return np.array(tokenizer.encode(text)[:limit], dtype=np.int64)


def read_text(path: str) -> str:
    """The text as it is, line ends and all; a byte-order mark is dropped. Raises ValueError."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"--text is {path}, which is not UTF-8: it holds the byte 0x{byte:02x}.") from None
    except OSError as error:
        raise ValueError(f"--text is {path}, which cannot be read: {error.strerror}.") from None
