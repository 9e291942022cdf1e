"""`python -m train evaluate FOLDER --source FILE --target FILE`: how well a model folder translates.

BLEU and chrF are sacrebleu's, of the translations that beam search finds; the loss is that of the given translations,
nats a target token, their ending tokens included, without label smoothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.bar import bar
from lm.beam import GNMT, BeamParams
from lm.score import refusal, score
from lm.translate import Translator
from train import bleu
from train.pair_sources import Lines
from train.perplexity import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 with one sentence for what cannot be as asked."""
    options = parser().parse_args(argv)
    try:
        print("\n".join(report(options)))
    except ValueError as error:  # of the folder, the files or an option; each is one sentence
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--out is {options.out}, which cannot be written: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m train evaluate",
        description="BLEU, chrF and loss of a model folder's translations.",
    )
    add = parser.add_argument
    add("folder", help="a model folder that translates")
    add("--source", required=True, metavar="FILE", help="sources, one a line; .gz is unpacked")
    add("--target", required=True, metavar="FILE", help="their translations, line by line")
    add("--beam", type=int, default=5, metavar="N", help="hypotheses that are followed at once; 1: greedy (default 5)")
    add("--length-penalty", type=float, default=0.6, metavar="ALPHA", help="GNMT's; 0: none (default 0.6)")
    add(
        "--tokenize",
        choices=("13a", "none", "intl", "char", "zh"),
        default="13a",
        help="how BLEU divides text into words; none for text that is tokenised already (default 13a)",
    )
    add("--lowercase", action="store_true", help="see no difference between A and a")
    add("--out", metavar="FILE", help="write the translations there, one a line")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in (default auto: the folder's own)")
    return parser


def report(options: argparse.Namespace) -> list[str]:
    """The lines that are printed. Raises ValueError, one sentence, for what cannot be as asked; OSError for --out."""
    pairs = list(Lines(("--source", options.source), ("--target", options.target)).pairs())
    if not pairs:
        raise ValueError(f"--source is {options.source}, and there is no line in it.")
    params = BeamParams(beam=options.beam, scorer=GNMT(options.length_penalty))
    translator = Translator.load(options.folder, options.dtype)
    sources, references = [source.strip() for source, _ in pairs], [target.strip() for _, target in pairs]
    with bar("translating", len(pairs), "lines") as update:
        found = translator.translate(sources, params, progress=update)
    outputs = [translation.text for translation in found]
    if options.out is not None:
        lines = "".join(" ".join(output.split("\n")) + "\n" for output in outputs)
        Path(options.out).write_text(lines, encoding="utf-8")
    scores = bleu.score(outputs, references, tokenize=options.tokenize, lowercase=options.lowercase)
    nats, tokens, left_out = loss(translator, list(zip(sources, references, strict=True)))
    each = nats / tokens if tokens else math.nan
    more = f"; {left_out:,} pairs that are empty or too long have no loss" if left_out else ""
    how = "greedy" if options.beam == 1 else f"beam {options.beam}, length penalty {options.length_penalty:g}"
    return [
        f"pairs        {len(pairs):,}, {tokens:,} target tokens{more}",
        f"BLEU         {scores.bleu:.2f}   {how}, {scores.signature}",
        f"chrF         {scores.chrf:.2f}   {scores.chrf_signature}",
        f"exact        {bleu.exact(outputs, references):.1%}",
        f"loss         {each:.6f} nats a token",
        f"perplexity   {math.exp(min(each, 700)):.6f}",
    ]


def loss(translator: Translator, pairs: Sequence[tuple[str, str]]) -> tuple[float, int, int]:
    """Nats and tokens of the targets, and how many pairs the model has no place for or have an empty side."""
    tokenizer, end = translator.tokenizer, next(iter(translator.stop_ids))
    encoded = []
    for source, target in pairs:
        if source and target:
            ids = tokenizer.encode(source), [*tokenizer.encode(target, add_special_tokens=False), end]
            if refusal(translator.model, len(ids[0]), len(ids[1])) is None:
                encoded.append(ids)
    scored = score(translator.model, encoded)
    return -sum(one.logprob for one in scored), sum(one.tokens for one in scored), len(pairs) - len(encoded)
