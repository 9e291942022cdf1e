"""Translation: `Translator` and `translate` from Python, `python -m lm translate FOLDER < source > target`.

Sentences are sorted by length and translated in batches of a token budget, so that little of a batch is padding; what
comes out has the order of what went in. Any model that decodes is a translator to this module: what a source is to it,
the tokenizer's own rule for special tokens says.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

from lm.beam import GNMT, BeamParams, Hypothesis, beam_search
from lm.console import reader_left
from lm.tokenizer import Tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCH_TOKENS = 8192  # source tokens x beam: memory depends on neither the sentences' lengths nor the beam
WINDOW = 2048  # lines that are sorted together; the first ones are written before the last are translated


@dataclass(frozen=True)
class Translation:
    """What one source became: texts and the hypotheses that they are of, best first; both empty for an empty source."""

    texts: list[str]
    hypotheses: list[Hypothesis]
    tokens: int = 0  # of the source
    dropped: int = 0  # of these, the last ones that the model has no place for: they were not translated

    @property
    def text(self) -> str:
        """The best one, "" for an empty source."""
        return self.texts[0] if self.texts else ""


def translate(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    beam: int = 5,
    length_penalty: float = 0.6,
    n_best: int = 1,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    stop_ids: Collection[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Translation]:
    """Translate texts, in their order. beam 1 is greedy search; the length penalty is GNMT's alpha.

    max_tokens: of a translation; None: 50 more than its source has. stop_ids: what ends one; None: the tokenizer's EOS.
    progress: called with the number of texts that are done. The model translates in eval mode and is left as it was.
    Raises ValueError, one sentence, for what cannot be.
    """
    stops = stop_ids if stop_ids is not None else [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    params = BeamParams(beam=beam, n_best=n_best, scorer=GNMT(length_penalty), max_tokens=max_tokens)
    return Translator(model, tokenizer, stops).translate(texts, params, batch_tokens, progress)


@dataclass(frozen=True)
class Translator:
    """A model, its tokenizer, and the tokens that end a translation."""

    model: Any
    tokenizer: Tokenizer
    stop_ids: Collection[int]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dtype: str = "auto") -> Translator:
        """That of a model folder, computing in `dtype`: auto, the folder's own where this machine is fast in it, else
        float32. Raises ValueError (FolderError, TokenizerError), also where nothing ends a text.
        """
        import torch

        from lm import pretrained
        from lm.linear import bf16_is_fast

        chosen = pretrained.own_dtype(folder) if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and chosen is not torch.float32:
            chosen = torch.bfloat16 if bf16_is_fast("cpu") else torch.float32  # float16 is fast on no CPU
        model = pretrained.load(folder, chosen)
        tokenizer = pretrained.load_tokenizer(folder)
        stop_ids = pretrained.stop_ids(folder, tokenizer)
        if not stop_ids:
            raise ValueError(f"{folder} names no eos_token; a translator needs one, or no translation would end.")
        return cls(model, tokenizer, stop_ids)

    def translate(
        self,
        texts: Sequence[str],
        params: BeamParams,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[int], None] | None = None,
    ) -> list[Translation]:
        """Translate texts, in their order; see the function `translate`."""
        sources = [self.source(text) for text in texts]
        results = [Translation([], [])] * len(texts)
        lengths = {row: len(ids) for row, (ids, _) in enumerate(sources) if ids}
        done = len(texts) - len(lengths)
        training = self.model.training
        self.model.eval()
        try:
            for rows in batches(lengths, max(1, batch_tokens // params.beam)):
                found = beam_search(self.model, [sources[row][0] for row in rows], params, self.stop_ids)
                for row, hypotheses in zip(rows, found, strict=True):
                    ids, dropped = sources[row]
                    lines = [self.tokenizer.decode(hypothesis.ids) for hypothesis in hypotheses]
                    results[row] = Translation(lines, hypotheses, len(ids) + dropped, dropped)
                done += len(rows)
                if progress is not None:
                    progress(done)
        finally:
            self.model.train(training)
        return results

    def source(self, text: str) -> tuple[list[int], int]:
        """The tokens that the model reads for `text`, and how many of the text's last ones were left out because it has
        no place for them. No tokens for a text of nothing but white space. Raises ValueError for a token that the model
        does not know.
        """
        if not text.strip():
            return [], 0
        ids, size = self.tokenizer.encode(text), self.model.config.vocab_size
        if max(ids, default=0) >= size:
            raise ValueError(f"the source has token {max(ids)}; it must be below the model's vocabulary size, {size}.")
        most = longest_source(self.model)
        if len(ids) <= most:
            return ids, 0
        text_ids = self.tokenizer.encode(text, add_special_tokens=False)
        before = next((i for i in range(len(ids)) if ids[i : i + len(text_ids)] == text_ids), 0)
        after = len(ids) - before - len(text_ids)
        keep = max(0, most - before - after)
        return ids[: before + keep] + ids[len(ids) - after :], len(text_ids) - keep


def longest_source(model: Any) -> int:
    """The most source tokens that leave room for a translation at least half as long."""

    def fits(tokens: int) -> bool:
        try:
            return 2 * model.room(tokens) >= tokens
        except ValueError:
            return False

    few, many = 1, model.config.context + 1
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few


def batches(lengths: dict[int, int], budget: int) -> Iterator[list[int]]:
    """The keys in groups of like lengths, longest first; a group's size x its greatest length is within the budget,
    or it is one.
    """
    batch: list[int] = []
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 with one sentence for what cannot be as asked; 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # as the input is
    try:
        params = search(options)
        translator = Translator.load(options.folder, options.dtype)
        run(translator, params, options, sys.stdin.buffer)
    except ValueError as error:  # of the folder, the tokenizer, the options or a line; each is one sentence
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        reader_left()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lm translate",
        description="Translate standard input line by line to standard output, with any model folder that translates.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a model folder (config.json, model.safetensors, tokenizer.json)")
    add("--beam", type=int, default=5, help="hypotheses that are followed at once; 1: greedy (default 5)")
    add("--length-penalty", type=float, default=0.6, help="GNMT's alpha; 0: none (default 0.6)")
    add("--n-best", type=int, default=1, help="translations of each line; above 1: line number, score and text in TSV")
    add("--max-tokens", type=int, help="of a translation (default: 50 more than its source has)")
    add("--batch-tokens", type=int, default=BATCH_TOKENS, help=f"source tokens x beam at once (default {BATCH_TOKENS})")
    add("--threads", type=int, help="processor threads (default: torch's own choice)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the model's own where this machine is fast in it")
    return parser


def search(options: argparse.Namespace) -> BeamParams:
    """The options as search parameters; sets the threads. Raises ValueError, one sentence."""
    import torch

    if not math.isfinite(options.length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {options.length_penalty}.")
    for name in ("batch_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    params = BeamParams(
        beam=options.beam,
        n_best=options.n_best,
        scorer=GNMT(options.length_penalty),
        max_tokens=options.max_tokens,
    )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return params


def run(translator: Translator, params: BeamParams, options: argparse.Namespace, source: BinaryIO) -> None:
    """Translate every line of `source` (UTF-8) to standard output. A terminal's lines are answered one by one."""
    from lm.bar import bar

    typed = source.isatty()
    text = b"" if typed else source.read()
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    windows = ([line] for line in source) if typed else (lines[i : i + WINDOW] for i in range(0, len(lines), WINDOW))
    done = 0
    with bar("translating", len(lines), "lines", show=not typed and not sys.stdout.isatty()) as show:
        for window in windows:
            texts = [_text(line, number) for number, line in enumerate(window, start=done + 1)]

            def shown(rows: int, before: int = done) -> None:
                show(before + rows)

            found = translator.translate(texts, params, options.batch_tokens, shown)
            for number, translation in enumerate(found, start=done + 1):
                if translation.dropped:
                    print(
                        f"line {number}: the source has {translation.tokens} tokens; the last {translation.dropped} "
                        "of them, for which the model has no place, were not translated.",
                        file=sys.stderr,
                    )
                for line in _lines(number, translation, params.n_best):
                    print(line)
            sys.stdout.flush()
            done += len(window)


def _text(line: bytes, number: int) -> str:
    """The text of a line; a byte that is no UTF-8 becomes U+FFFD, which is said."""
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        print(f"line {number} is not UTF-8; what is not was read as U+FFFD.", file=sys.stderr)
        return line.decode("utf-8", errors="replace")


def _lines(number: int, translation: Translation, n_best: int) -> Iterator[str]:
    """What is written for a line: its translation, or a row of TSV for each of the n best. Always one line a text."""
    if n_best == 1:
        yield re.sub(r"[\r\n]+", " ", translation.text)
        return
    scores = [hypothesis.score for hypothesis in translation.hypotheses]
    rows = zip(scores, translation.texts, strict=True) if translation.texts else chain([(0.0, "")])
    for score, text in rows:
        flat = re.sub(r"[\r\n\t]+", " ", text)
        yield f"{number}\t{score:.6f}\t{flat}"
