"""A folder of token shards: written once, from pieces of text, and read as memory-mapped Tokens.

    FOLDER/{tokens-00000.bin, ..., tokenizer/, meta.json}

Shards are raw uint16 (uint32 where the vocabulary needs it), little-endian, one stream over all of them; meta.json says
where in it the training and the validation split lie. It is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lm.tokenizer import Tokenizer
from train.data import Tokens
from train.sources import Piece

SHARD = 1 << 27  # tokens: 256 MB of uint16 a file
BATCH = 1 << 21  # characters tokenised at a time


class Place(NamedTuple):
    """A place in the token stream: the tokens before it, and the UTF-8 bytes of text that they stand for."""

    tokens: int
    bytes: int


class Writer:
    """Tokenises pieces of text and appends them to the shards of `folder`.

    `many`: the text is several documents, and the tokenizer's end-of-text id, if it has one, closes each.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, many: bool):
        self.folder, self.tokenizer = folder, tokenizer
        self.eos_id = tokenizer.eos_id if many else None
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.place = Place(0, 0)
        self._shards: list[list[Any]] = []  # [name, tokens]
        self._file: BinaryIO | None = None
        self._ends = folder / "documents.bin"  # the place after each document; on disk, as documents can be millions

    def encode(self, pieces: Iterable[Piece], mark: int | None = None) -> Place | None:
        """Append the tokens of `pieces`. Returns the place after the first `mark` characters, if they are that many."""
        marked = self.place if mark == 0 else None
        seen, begun = 0, self.place.tokens  # characters; where the current document begins
        with open(self._ends, "ab") as ends:
            for batch in _batches(pieces if mark is None else _cut(pieces, mark)):
                texts = [piece.text for piece in batch]
                for piece, ids in zip(batch, self.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
                    self._append(ids, len(piece.text.encode()))
                    seen += len(piece.text)
                    marked = self.place if seen == mark else marked
                    if piece.ends_document and self.place.tokens > begun:  # an empty document is none
                        if self.eos_id is not None:
                            self._append([self.eos_id], 0)
                        ends.write(np.array(self.place, dtype=np.int64).tobytes())
                        begun = self.place.tokens
        return marked

    def document_boundary(self, share: Fraction) -> Place | None:
        """Where a document ends that has nearest to `share` of all bytes before it; None if there is one document."""
        ends = np.fromfile(self._ends, dtype=np.int64).reshape(-1, 2)
        if len(ends) < 2:
            return None
        nearest = int(np.abs(ends[:-1, 1] - float(share) * self.place.bytes).argmin())
        return Place(*ends[nearest].tolist())

    def finish(self, boundary: Place | None, **more: Any) -> dict[str, Any]:
        """Write meta.json: what lies before `boundary` trains, what lies after it validates. Returns its content."""
        self._close()
        self._ends.unlink()
        end, middle = self.place, boundary or self.place
        meta = {
            "dtype": self.dtype.str,
            "shards": self._shards,
            "documents": self.eos_id is not None,
            "train": {"start": 0, "stop": middle.tokens, "bytes": middle.bytes},
            "validation": None,
            **more,
        }
        if boundary is not None:
            meta["validation"] = {"start": middle.tokens, "stop": end.tokens, "bytes": end.bytes - middle.bytes}
        with open(self.folder / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return meta

    def _append(self, ids: list[int], bytes: int) -> None:
        array = np.array(ids, dtype=self.dtype)
        self.place = Place(self.place.tokens + len(array), self.place.bytes + bytes)
        while len(array):
            if self._file is None or self._shards[-1][1] == SHARD:
                self._close()
                self._shards.append([f"tokens-{len(self._shards):05d}.bin", 0])
                self._file = open(self.folder / self._shards[-1][0], "wb")  # noqa: SIM115 (_close closes it)
            part = array[: SHARD - self._shards[-1][1]]
            self._file.write(part.tobytes())
            self._shards[-1][1] += len(part)
            array = array[len(part) :]

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # a file renamed before it is on the disk may be empty after a power cut
            self._file.close()
            self._file = None


def read(folder: Path) -> tuple[Tokens, Tokens | None] | None:
    """The training and validation tokens of a finished folder; None where something is missing or has another size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    dtype = np.dtype(meta["dtype"])
    shards = []
    for name, count in meta["shards"]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            return None
        shards.append(np.memmap(path, dtype=dtype, mode="r"))

    def split(part: dict[str, int]) -> Tokens:
        return Tokens(
            shards, start=part["start"], stop=part["stop"], bytes_total=part["bytes"], documents=meta["documents"]
        )

    return split(meta["train"]), split(meta["validation"]) if meta["validation"] else None


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(pieces: Iterable[Piece], mark: int) -> Iterator[Piece]:
    """The same pieces, the one that reaches over the first `mark` characters cut there in two."""
    for piece in pieces:
        if 0 < mark < len(piece.text):
            yield Piece(piece.text[:mark], False, piece.read)
            yield Piece(piece.text[mark:], piece.ends_document, piece.read)
        else:
            yield piece
        mark -= len(piece.text)
