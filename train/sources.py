"""Where text comes from: plain files, JSON lines, datasets. Each gives the same thing: pieces of documents, in order.

Nothing here holds a whole corpus: a plain file comes in pieces of about PIECE characters, rows one by one.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from train.config import Recipe, RecipeError
from train.schema import show

PIECE = 1 << 16  # characters: many pieces a batch keep every core tokenising, and each is far longer than a token
ROWS = (".jsonl", ".ndjson")
NOT_TEXT = (".json", ".parquet", ".csv", ".arrow", ".zip", ".zst", ".xz", ".bz2", ".tar", ".bin", ".pdf", ".gguf")


@dataclass(frozen=True)
class Piece:
    """A stretch of a document. `read`: how much of the source's `size` has been read after it."""

    text: str
    ends_document: bool
    read: int


class Source(Protocol):
    """Documents in a fixed order, as often as they are asked for. All raise RecipeError for what cannot be read."""

    key: str  # the recipe's key and value, for messages
    unit: str  # of size: bytes, rows
    many: bool  # several documents, as against one plain text

    @property
    def size(self) -> int | None: ...
    def pieces(self) -> Iterator[Piece]: ...
    def identity(self, hashes: FileHashes) -> Any: ...


def open_sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """The training text and, where data.validation names one, the validation text. Raises RecipeError."""
    data, problems = recipe.data, []
    source: Source | None = None
    held: Source | None = None
    names_validation = isinstance(data.validation, str)
    if data.dataset is not None:
        source = Rows("data.dataset", recipe, data.split)
        if names_validation:
            held = Rows("data.validation", recipe, str(data.validation))
    else:
        try:
            source = Files("data.text", data.text or (), data.separator, data.text_key)
        except RecipeError as error:
            problems += error.problems
        if names_validation:
            try:
                held = Files("data.validation", (str(data.validation),), data.separator, data.text_key)
            except RecipeError as error:
                problems += error.problems
    if problems or source is None:
        raise RecipeError(problems)
    return source, held


class Files:
    """Plain text (.txt and whatever else, .gz too), one document a file or split by a separator; JSON lines, one a
    row."""

    unit = "bytes"

    def __init__(self, key: str, names: Iterable[str], separator: str | None, text_key: str):
        self.key = f"{key} is {show(list(names))}"
        self.separator, self.text_key = separator, text_key
        self.paths, problems = _resolve(key, names)
        if problems:
            raise RecipeError(problems)
        self.many = len(self.paths) > 1 or separator is not None or holds_rows(self.paths[0])

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def identity(self, hashes: FileHashes) -> Any:
        """What decides the tokens: the content of the files in their order, not where they are."""
        files = [[hashes.of(path), path.suffix == ".gz", holds_rows(path) and self.text_key] for path in self.paths]
        return {"files": files, "separator": self.separator}

    def pieces(self) -> Iterator[Piece]:
        read = 0
        for path in self.paths:
            try:
                with open(path, "rb") as raw:
                    whole = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
                    parts = self._rows(path, whole) if holds_rows(path) else self._plain(whole)
                    for text, ends in parts:
                        yield Piece(text, ends, read + raw.tell())
                read += path.stat().st_size
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                reason = f"it holds the byte 0x{byte:02x} ({error.reason})"
                raise RecipeError([f"{path} is not UTF-8 text: {reason}."]) from None
            except (OSError, EOFError, zlib.error) as error:
                raise RecipeError([f"{path} cannot be read: {getattr(error, 'strerror', None) or error}."]) from None

    def _plain(self, file: BinaryIO) -> Iterator[tuple[str, bool]]:
        # utf-8-sig drops a byte-order mark; newline="" keeps \r\n, so that what is served is what was written.
        stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        yield from divide(iter(lambda: stream.read(PIECE), ""), self.separator)

    def _rows(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, bool]]:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise RecipeError([f"{where} is not JSON: {error}."]) from None
            if not isinstance(row, dict):
                raise RecipeError([f"{where} is {show(row)[:60]}; each line must be a JSON object."])
            yield _text_of(row, self.text_key, where), True


class Rows:
    """A split of a `datasets` dataset: a name on the hub, or a folder or script of the user's; one document a row."""

    unit = "rows"
    many = True

    def __init__(self, key: str, recipe: Recipe, split: str):
        data = recipe.data
        assert data.dataset is not None
        self.key = f"data.dataset is {show(data.dataset)}"
        self.name, self.config, self.split = data.dataset, data.dataset_config, split
        self.text_key, self.streaming = data.text_key, data.streaming
        self._asked = self.key if key == "data.dataset" else f"{self.key}, {key} is {show(split)}"
        self._loaded: Any = None

    @property
    def size(self) -> int | None:
        return None if self.streaming else len(self._dataset())

    def identity(self, hashes: FileHashes) -> Any:
        name = dataset_identity(self.name, hashes)
        return {"dataset": name, "config": self.config, "split": self.split, "text_key": self.text_key}

    def pieces(self) -> Iterator[Piece]:
        dataset = self._dataset()
        columns = dataset.column_names
        if columns is not None and self.text_key not in columns:
            known = ", ".join(columns)
            raise RecipeError([f"data.text_key is {show(self.text_key)}, and {self.name} has the columns {known}."])
        if columns is not None:
            dataset = dataset.select_columns([self.text_key])
        number = 0
        try:
            for number, row in enumerate(dataset, start=1):
                yield Piece(_text_of(row, self.text_key, f"{self.name} row {number}"), True, number)
        except RecipeError:
            raise
        except Exception as error:  # a streamed one fails in as many ways as it can be loaded
            raise RecipeError(
                [f"{self._asked}, and reading it failed after row {number}: {first_line(error)}."]
            ) from None

    def _dataset(self) -> Any:
        if self._loaded is None:
            self._loaded = load_dataset(self.name, self.config, self.split, self.streaming, self._asked)
        return self._loaded


def dataset_identity(name: str, hashes: FileHashes) -> Any:
    """A folder is its files' content; a name stands for its content, so that a run continues without a network."""
    if not os.path.isdir(name):
        return name
    files = sorted(path for path in Path(name).rglob("*") if path.is_file())
    return [[path.relative_to(name).as_posix(), hashes.of(path)] for path in files]


def load_dataset(name: str, config: str | None, split: str, streaming: bool, asked: str) -> Any:
    """A split of a `datasets` dataset. Raises RecipeError that begins with what was `asked` for."""
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # its errors have no common base: not found, no network, no such split, bad file
        raise RecipeError([f"{asked}, and `datasets` cannot load it: {first_line(error)}."]) from None


def divide(chunks: Iterable[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    """A stream of text as documents, long ones in pieces: (text, whether its document ends). Some may be empty."""
    held = ""
    for chunk in chunks:
        held += chunk
        if separator is not None:
            *closed, held = held.split(separator)
            yield from ((document, True) for document in closed)
        # The last characters may be the beginning of a separator.
        place = cutting_place(held if separator is None else held[: len(held) - len(separator) + 1])
        if place:
            yield held[:place], False
            held = held[place:]
    yield held, True


def cutting_place(text: str) -> int:
    """Where to cut `text` once it has PIECE characters, so that every pre-tokenizer in use would cut there too; else 0.

    That is after the last line end that has a character and no space on both sides. A text without any is cut after its
    last line end, or at its end, once it has 16 x PIECE characters: only there can a token be cut in two.
    """
    if len(text) < PIECE:
        return 0
    place = text.rfind("\n", 1, len(text) - 1)
    while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind("\n", 1, place)
    if place > 0:
        return place + 1
    return 0 if len(text) < 16 * PIECE else text.rfind("\n") + 1 or len(text)


class FileHashes:
    """SHA-256 of whole files, remembered by path, size and time of change in `memory` (a JSON file, or None).

    The whole content and not a sample: an edit anywhere must rebuild, and equal text on two machines must have equal
    names. Reading a file at about 1 GB/s is little beside tokenising it, and is done once a change.
    """

    def __init__(self, memory: Path | None):
        self._memory, self._new = memory, False
        try:
            self._known: dict[str, list[Any]] = json.loads(memory.read_text()) if memory else {}
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        state = path.stat()
        name, mark = str(path.resolve()), [state.st_size, state.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:2] == mark:
            return str(known[2])
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RecipeError([f"{path} cannot be read: {error.strerror}."]) from None
        self._known[name] = [*mark, digest]
        self._new = True
        return digest

    def save(self) -> None:
        """Keep what is new, where that can be written: it only saves time."""
        if self._memory is None or not self._new:
            return
        aside = self._memory.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            aside.write_text(json.dumps(self._known, indent=0))
            os.replace(aside, self._memory)


def _resolve(key: str, names: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that paths and globs stand for, a glob's in sorted order, each once; and what is wrong."""
    paths: list[Path] = []
    problems = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            problems.append(f"{key} is {show(name)}, and that is a folder; write {path}/*.txt for the files in it.")
        elif path.exists():
            paths.append(path)
        elif any(mark in name for mark in "*?["):
            found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
            if not found:
                problems.append(f"{key} is {show(name)}, and no file matches it.")
            paths += found
        else:
            problems.append(f"{key} is {show(name)}, and there is no such file.")
    for path in paths:
        if path.suffix.lower() in NOT_TEXT:
            problems.append(
                f"{key} names {path}, and {path.suffix} is not plain text; give .txt or .jsonl, "
                "or its folder as data.dataset."
            )
    return list(dict.fromkeys(paths)), problems


def holds_rows(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix.lower() in ROWS


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in row:
        keys = ", ".join(map(str, itertools.islice(row, 12))) or "none"
        raise RecipeError([f"data.text_key is {show(text_key)}, and {where} has the keys {keys}."])
    text = row[text_key]
    if not isinstance(text, str):
        raise RecipeError([f"{where}: {text_key} is {show(text)[:60]}; it must be text."])
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no UTF-8 can: U+FFFD takes its place
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
