"""Pairs to token arrays: tokenised once, memory-mapped ever after.

    CACHE/FINGERPRINT/{train-source.npy, train-source_ends.npy, ..., held.jsonl, tokenizer/, meta.json}

As with text (train/prepare.py) the fingerprint is a hash of all that decides the tokens, and a folder is built aside
under a lock and renamed when complete. A side's white space at its ends is dropped; a pair of which a side is empty is
left out, and counted. The held-out pairs, where they are a fraction, are the last ones. The tokenizer is learned from
both sides of what trains. The held-out texts are kept beside their tokens: they are what BLEU compares with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lm.bar import bar
from lm.tokenizer import Tokenizer, TokenizerError, close_sources, train_translator_bpe, train_words
from train.config import Recipe, RecipeError
from train.pair_sources import Pair, PairSource, open_pairs
from train.pairs import Frame, Pairs
from train.prepare import BPE_SAMPLE, cached, load_tokenizer
from train.schema import show
from train.sources import FileHashes

FORMAT = 1  # part of the fingerprint
BATCH = 1 << 14  # pairs tokenised at a time
ARRAYS = ("source", "source_ends", "target", "target_ends")


@dataclass(frozen=True)
class PreparedPairs:
    """What a translator trains on. `held` are the texts of the validation pairs; `empty`: pairs left out."""

    tokenizer: Tokenizer
    train: Pairs
    validation: Pairs | None
    held: list[Pair]
    fingerprint: str
    empty: int

    def frame(self) -> Frame:
        """How the model is given ids."""
        tokenizer = self.tokenizer
        assert tokenizer.pad_id is not None
        assert tokenizer.bos_id is not None
        assert tokenizer.eos_id is not None
        return Frame(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode("")[-1])


def prepare_pairs(recipe: Recipe, progress: bool = True) -> PreparedPairs:
    """The recipe's pairs, built if they are not there. Raises RecipeError, a sentence for each thing that is wrong.

    Every rank may call this: one builds, the others wait.
    """
    source, held, given = _inputs(recipe)

    def fingerprint(hashes: FileHashes) -> str:
        return _fingerprint(recipe, source, held, given, hashes)

    def build(fingerprint: str, folder: Path) -> None:
        _build(recipe, source, held, given, fingerprint, folder, progress)

    return cached(recipe, fingerprint, _open, build)


def find_pairs(recipe: Recipe) -> PreparedPairs | None:
    """The recipe's pairs if they are prepared; writes nothing. Raises RecipeError for data that are not there."""
    source, held, given = _inputs(recipe)
    cache = Path(recipe.data.cache)
    fingerprint = _fingerprint(recipe, source, held, given, FileHashes(cache / "hashes.json"))
    return _open(cache / fingerprint[:16], fingerprint)


def _inputs(recipe: Recipe) -> tuple[PairSource, PairSource | None, Tokenizer | None]:
    problems = []
    try:
        source, held = open_pairs(recipe)
    except RecipeError as error:
        problems += error.problems
    try:
        given = load_tokenizer(recipe)
        given = given and _closed(recipe, given)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return source, held, given


def _closed(recipe: Recipe, tokenizer: Tokenizer) -> Tokenizer:
    """With the ending of a source that the recipe's architecture reads. Raises RecipeError."""
    try:
        return close_sources(tokenizer, recipe.model.architecture != "decoder")
    except ValueError as error:
        raise RecipeError([f"tokenizer.folder is {show(recipe.tokenizer.folder)}: {error}"]) from None


def _fingerprint(
    recipe: Recipe, source: PairSource, held: PairSource | None, given: Tokenizer | None, hashes: FileHashes
) -> str:
    identity = {
        "pairs": FORMAT,
        "train": source.identity(hashes),
        "validation": recipe.data.validation if held is None else held.identity(hashes),
        "tokenizer": [recipe.tokenizer.kind, recipe.tokenizer.vocab_size, given and given.fingerprint()],
        "continues": recipe.model.architecture == "decoder",  # another token divides or ends a source
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, fingerprint: str) -> PreparedPairs | None:
    """A finished folder; None where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {
            split: Pairs(*(np.load(folder / f"{split}-{name}.npy", mmap_mode="r") for name in ARRAYS))
            for split in meta["splits"]
        }
        held = [tuple(json.loads(line)) for line in (folder / "held.jsonl").read_text(encoding="utf-8").splitlines()]
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except (OSError, ValueError, KeyError, TokenizerError):
        return None
    train, validation = splits["train"], splits.get("validation")
    return PreparedPairs(tokenizer, train, validation, held, fingerprint, meta["empty"])  # type: ignore[arg-type]


def _build(
    recipe: Recipe,
    source: PairSource,
    held: PairSource | None,
    given: Tokenizer | None,
    fingerprint: str,
    folder: Path,
    progress: bool,
) -> None:
    began = time.monotonic()
    aside = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed: the lock is ours
    aside.mkdir()
    try:
        empty = [0]
        count = sum(1 for _ in _whole(source, empty))
        if not count:
            raise RecipeError([f"{source.key}, and there is no pair in it of which neither side is empty."])
        last = count
        if held is None and recipe.data.validation is not None:
            last = count - max(1, round(Fraction(str(recipe.data.validation)) * count))
            if last < 1:
                share = f"data.validation is {show(recipe.data.validation)}"
                raise RecipeError([f"{share}, and {source.key}: nothing is left to train on."])
        tokenizer = given or _closed(recipe, _learn(recipe, source, last))
        tokenizer.save(aside / "tokenizer")
        splits = {"train": _encode(islice(_whole(source), 0, last), tokenizer, last, progress)}
        texts: list[Pair] = []
        if held is not None:
            texts = list(_whole(held, empty))
            if not texts:
                raise RecipeError([f"{held.key}, and there is no pair in it of which neither side is empty."])
        elif last < count:
            texts = list(islice(_whole(source), last, count))
        if texts:
            splits["validation"] = _encode(iter(texts), tokenizer, len(texts), False)
        for split, pairs in splits.items():
            for name in ARRAYS:
                np.save(aside / f"{split}-{name}.npy", getattr(pairs, name))
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in texts)
        (aside / "held.jsonl").write_text(lines, encoding="utf-8")
        meta = {"fingerprint": fingerprint, "splits": list(splits), "empty": empty[0]}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1))
        for file in aside.iterdir():  # on the disk before the folder has its name
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if progress:
        more = f" and {len(texts):,} validation" if texts else ""
        left_out = f", {empty[0]:,} with an empty side left out" if empty[0] else ""
        print(
            f"prepared {last:,} training{more} pairs{left_out}, vocabulary {tokenizer.vocab_size:,}, "
            f"in {time.monotonic() - began:.1f} s: {folder}",
            flush=True,
        )


def _whole(source: PairSource, empty: list[int] | None = None) -> Iterator[Pair]:
    """The pairs of which neither side is empty; the others are counted in `empty`."""
    for one, other in source.pairs():
        one, other = one.strip(), other.strip()
        if one and other:
            yield one, other
        elif empty is not None:
            empty[0] += 1


def _learn(recipe: Recipe, source: PairSource, last: int) -> Tokenizer:
    """One vocabulary for both languages, from the first `last` pairs."""

    def texts() -> Iterator[str]:
        seen = 0
        for pair in islice(_whole(source), 0, last):
            yield from pair
            seen += len(pair[0]) + len(pair[1])
            if seen > BPE_SAMPLE:
                return

    size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.kind == "words":
        return train_words(texts(), size)
    assert size is not None
    return train_translator_bpe(texts(), size)


def _encode(pairs: Iterator[Pair], tokenizer: Tokenizer, count: int, progress: bool) -> Pairs:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    lengths: tuple[list[int], list[int]] = ([], [])
    done = 0
    with bar("tokenising", count, "pairs", progress) as update:
        while batch := list(islice(pairs, BATCH)):
            for side in range(2):
                for ids in tokenizer.encode_batch([pair[side] for pair in batch], add_special_tokens=False):
                    parts[side].append(np.array(ids, dtype=dtype))
                    lengths[side].append(len(ids))
            done += len(batch)
            update(done)
    arrays: dict[str, Any] = {}
    for side, name in enumerate(("source", "target")):
        arrays[name] = np.concatenate(parts[side])
        arrays[f"{name}_ends"] = np.cumsum([0, *lengths[side]], dtype=np.int64)
    return Pairs(**arrays)
