"""Text to token shards: tokenised once, memory-mapped ever after.

    CACHE/FINGERPRINT/{tokens-00000.bin, ..., tokenizer/, meta.json}

The fingerprint is a hash of all that decides the tokens (the text's content, the tokenizer's settings, the split), so
a folder is never stale: whatever differs has another name. A folder is built aside under a lock and renamed when
complete: a killed build leaves nothing that is taken for finished, and of several processes one builds and the others
wait for it.

The validation split, where it is a fraction, is the end of the text. One plain text is cut by characters: the first
floor((1 - fraction) x characters) of them train. Several documents are cut between two of them, where the training
part comes nearest to its share of the UTF-8 bytes. The tokenizer is learned from what trains (of several documents:
from that share of the reading), of which a BPE takes at most BPE_SAMPLE characters.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from lm import pretrained
from lm.bar import bar
from lm.tokenizer import END_OF_TEXT_CHARACTER, Tokenizer, TokenizerError, train_bpe, train_characters
from train import shards
from train.config import Recipe, RecipeError
from train.data import Tokens
from train.schema import show
from train.sources import FileHashes, Piece, Source, open_sources

FORMAT = 1  # part of the fingerprint: a change of what is written gives every folder another name
BPE_SAMPLE = 100_000_000  # characters; merges learned from more differ little, and counting words takes memory

P = TypeVar("P")


@dataclass(frozen=True)
class Prepared:
    """What training reads. `tokenizer_folder` belongs to the cache; a model folder takes a copy."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens | None
    fingerprint: str
    tokenizer_folder: Path


def prepare(recipe: Recipe, progress: bool = True) -> Prepared:
    """The recipe's tokens, built if they are not there. Raises RecipeError, a sentence for each thing that is wrong.

    Every rank may call this: one builds, the others wait. `progress`: a bar on a terminal, and one line at the end.
    """
    source, held, given = _inputs(recipe)

    def fingerprint(hashes: FileHashes) -> str:
        return _fingerprint(recipe, source, held, given, hashes)

    def build(fingerprint: str, folder: Path) -> None:
        _build(recipe, source, held, given, fingerprint, folder, progress)

    prepared = cached(recipe, fingerprint, _open, build)
    if given is not None:  # equal ids may come with another chat template, which the cache does not tell apart
        prepared = replace(prepared, tokenizer=given)
    _check(recipe, source, prepared)
    return prepared


def cached(
    recipe: Recipe,
    fingerprint_by: Callable[[FileHashes], str],
    open_: Callable[[Path, str], P | None],
    build: Callable[[str, Path], None],
) -> P:
    """What stands under its fingerprint in data.cache; where there is nothing, one process builds it, under a lock, and
    the others wait. Raises RecipeError for a cache that cannot be used.
    """
    cache = Path(recipe.data.cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        hashes = FileHashes(cache / "hashes.json")
        fingerprint = fingerprint_by(hashes)
        folder = cache / fingerprint[:16]
        prepared = open_(folder, fingerprint)
        if prepared is None:
            with lock(cache / f"{folder.name}.lock"):
                prepared = open_(folder, fingerprint)  # another process may have built it meanwhile
                if prepared is None:
                    build(fingerprint, folder)
                    prepared = open_(folder, fingerprint)
        hashes.save()
    except OSError as error:
        raise RecipeError([f"data.cache is {show(str(cache))}, and it cannot be used: {error.strerror}."]) from None
    assert prepared is not None
    return prepared


def find(recipe: Recipe) -> Prepared | None:
    """The recipe's tokens if they are prepared; writes nothing. Raises RecipeError for a text that is not there."""
    source, held, given = _inputs(recipe)
    cache = Path(recipe.data.cache)
    fingerprint = _fingerprint(recipe, source, held, given, FileHashes(cache / "hashes.json"))
    return _open(cache / fingerprint[:16], fingerprint)


def _inputs(recipe: Recipe) -> tuple[Source, Source | None, Tokenizer | None]:
    """The texts, and the tokenizer if it is given. Raises RecipeError with all that is wrong with them."""
    problems = []
    try:
        source, held = open_sources(recipe)
    except RecipeError as error:
        problems += error.problems
    try:
        given = load_tokenizer(recipe)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return source, held, given


def load_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer in `tokenizer.folder`, which is model.from's where that is given; None where one is to be learned.
    Raises RecipeError.
    """
    folder, start = recipe.tokenizer.folder, recipe.origin
    if folder is None:
        return None
    key = "tokenizer.folder" if start is None else "model.from"
    try:
        tokenizer = Tokenizer.load(folder) if start is None else pretrained.load_tokenizer(folder)
    except (TokenizerError, pretrained.FolderError) as error:
        raise RecipeError([f"{key} is {show(folder)}: {error}"]) from None
    if start is not None and tokenizer.vocab_size > start.vocab_size:
        raise RecipeError(
            [
                f"model.from is {show(folder)}: its tokenizer has {tokenizer.vocab_size} entries and its model "
                f"{start.vocab_size}; the model must have at least as many."
            ]
        )
    return tokenizer


def _fingerprint(
    recipe: Recipe, source: Source, held: Source | None, given: Tokenizer | None, hashes: FileHashes
) -> str:
    tokenizer = [recipe.tokenizer.kind, recipe.tokenizer.vocab_size, given and [given.fingerprint(), given.eos_id]]
    identity = {
        "format": FORMAT,
        "text": source.identity(hashes),
        "validation": recipe.data.validation if held is None else held.identity(hashes),
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, fingerprint: str) -> Prepared | None:
    """A finished folder; None where there is none or it is damaged."""
    splits = shards.read(folder)
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except TokenizerError:
        return None
    return splits and Prepared(tokenizer, splits[0], splits[1], fingerprint, folder / "tokenizer")


def _check(recipe: Recipe, source: Source, prepared: Prepared) -> None:
    """What can only be known of the tokens: that there are enough of them."""
    problems = []
    context, count = recipe.model.context, len(prepared.train)
    if count <= context:
        problems.append(
            f"model.context is {context}, and the training part of the text has {count} tokens; "
            f"it must have at least {context + 1} ({source.key})."
        )
    if prepared.validation is not None and len(prepared.validation) < 2:
        asked = f"data.validation is {show(recipe.data.validation)}"
        problems.append(f"{asked}, and that is {len(prepared.validation)} tokens; it must be at least 2.")
    if recipe.data.document_mask and not prepared.train.documents:
        why = (
            "the tokenizer has no end-of-text token"
            if source.many
            else "the text is one plain file without a separator"
        )
        problems.append(f"data.document_mask is true; it needs documents to tell apart, and {why}.")
    if problems:
        raise RecipeError(problems)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; one that is killed frees it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    recipe: Recipe,
    source: Source,
    held: Source | None,
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
        share = None  # of the text that trains, where the validation split is a fraction
        if held is None and recipe.data.validation is not None:
            share = 1 - Fraction(str(recipe.data.validation))
        mark = None  # one plain text: how many characters train
        if share is not None and not source.many:
            with bar("reading", source.size, source.unit, progress) as update:
                mark = int(share * sum(len(piece.text) for piece in _watched(source, update)))
        tokenizer = given or _learn(recipe, source, share, mark, progress)
        tokenizer.save(aside / "tokenizer")
        writer = shards.Writer(aside, tokenizer, source.many)
        with bar("tokenising", source.size, source.unit, progress) as update:
            boundary = writer.encode(_watched(source, update), mark)
        if writer.place.bytes == 0:
            raise RecipeError([f"{source.key}, and there is no text in it."])
        if held is not None:
            boundary = writer.place
            with bar("tokenising validation", held.size, held.unit, progress) as update:
                writer.encode(_watched(held, update))
        elif share is not None and source.many:
            boundary = writer.document_boundary(share)
            if boundary is None:
                value = show(recipe.data.validation)
                raise RecipeError([f"data.validation is {value}; it needs two documents or more ({source.key})."])
        meta = writer.finish(boundary, fingerprint=fingerprint)
        shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if progress:
        train, validation = meta["train"], meta["validation"]
        more = f" and {validation['stop'] - validation['start']:,} validation" if validation else ""
        print(
            f"prepared {train['stop']:,} training{more} tokens, vocabulary {tokenizer.vocab_size:,}, "
            f"in {time.monotonic() - began:.1f} s: {folder}",
            flush=True,
        )


def _learn(recipe: Recipe, source: Source, share: Fraction | None, mark: int | None, progress: bool) -> Tokenizer:
    """A tokenizer of the recipe's kind, from what trains: `share` of the source, or its first `mark` characters."""

    def texts(most: int | None, until: Fraction | None) -> Iterator[str]:
        """The text up to `most` characters, up to `until` of the source's size."""
        seen = 0
        for piece in _watched(source, update):
            text = piece.text if most is None else piece.text[: most - seen]
            if seen and (seen == most or (until is not None and piece.read > until)):
                return
            seen += len(text)
            yield text

    size = source.size
    until = share * size if share is not None and size is not None and mark is None else None
    with bar("learning the vocabulary", size, source.unit, progress) as update:
        if recipe.tokenizer.kind == "characters":
            return train_characters(texts(mark, until), eos=END_OF_TEXT_CHARACTER if source.many else None)
        assert recipe.tokenizer.vocab_size is not None
        sample = BPE_SAMPLE if mark is None else min(BPE_SAMPLE, mark)
        return train_bpe(texts(sample, until), recipe.tokenizer.vocab_size)


def _watched(source: Source, update: Callable[[int], None]) -> Iterable[Piece]:
    for piece in source.pieces():
        update(piece.read)
        yield piece
