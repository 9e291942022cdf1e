"""Where pairs of a source and its translation come from: two line-aligned files, a table, JSON lines, a dataset, or a
synthetic task. Each gives the same thing: pairs of one-line texts in a fixed order, as often as they are asked for.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from train import synthetic
from train.config import Recipe, RecipeError
from train.schema import show
from train.sources import NOT_TEXT, FileHashes, dataset_identity, first_line, holds_rows, load_dataset

Pair = tuple[str, str]
SYNTHETIC_SEED = 20140901  # the pairs are the same whatever run.seed is: runs differ by seed on the same data


class PairSource(Protocol):
    """Pairs in a fixed order. All raise RecipeError for what cannot be read."""

    key: str  # the recipe's key and value, for messages

    def pairs(self) -> Iterator[Pair]: ...
    def identity(self, hashes: FileHashes) -> Any: ...


def open_pairs(recipe: Recipe) -> tuple[PairSource, PairSource | None]:
    """The training pairs and, where the recipe names them, the validation pairs. Raises RecipeError."""
    data, problems = recipe.data, list[str]()

    def opened(make: Any) -> Any:
        try:
            return make()
        except RecipeError as error:
            problems.extend(error.problems)

    keys = (data.source_key or "source", data.target_key or "target")
    held: PairSource | None = None
    names_validation = isinstance(data.validation, str)
    source: PairSource | None
    if data.synthetic is not None:
        source = Synthetic(data.synthetic, data.rows, data.symbols, data.length)
    elif data.dataset is not None:
        source = Dataset("data.dataset", recipe, data.split, keys)
        if names_validation:
            held = Dataset("data.validation", recipe, str(data.validation), keys)
    elif data.pairs is not None:
        source = opened(lambda: open_table("data.pairs", data.pairs, keys))
        if names_validation:
            held = opened(lambda: open_table("data.validation", str(data.validation), keys))
    else:
        source = opened(lambda: Lines(("data.source", data.source), ("data.target", data.target)))
    if data.validation_source is not None:
        names = ("data.validation_source", data.validation_source), ("data.validation_target", data.validation_target)
        held = opened(lambda: Lines(*names))
    if problems or source is None:
        raise RecipeError(problems)
    return source, held


class Lines:
    """Two files, one line each a pair; .gz is read as what it holds."""

    def __init__(self, source: tuple[str, str | None], target: tuple[str, str | None]):
        self.key = f"{source[0]} is {show(source[1])}"
        self._names, problems, paths = (source, target), list[str](), list[Path]()
        for key, name in self._names:
            try:
                paths.append(resolve(key, name or ""))
            except RecipeError as error:
                problems += error.problems
        if problems:
            raise RecipeError(problems)
        self.paths = paths

    def identity(self, hashes: FileHashes) -> Any:
        return {"lines": [[hashes.of(path), path.suffix == ".gz"] for path in self.paths]}

    def pairs(self) -> Iterator[Pair]:
        sides = [read_lines(path) for path in self.paths]
        for source, target in zip_longest(*sides):
            if source is None or target is None:
                counts = [sum(1 for _ in read_lines(path)) for path in self.paths]
                said = " and ".join(
                    f"{key} ({name}) has {count:,} lines"
                    for (key, name), count in zip(self._names, counts, strict=True)
                )
                raise RecipeError([f"{said}; line n of the one must be the translation of line n of the other."])
            yield source, target


class Table:
    """One file, a pair a line: the source, a tab, the target. More columns are refused: they would be guessed at."""

    def __init__(self, key: str, name: str):
        self.key, self.path = f"{key} is {show(name)}", resolve(key, name)

    def identity(self, hashes: FileHashes) -> Any:
        return {"table": [hashes.of(self.path), self.path.suffix == ".gz"]}

    def pairs(self) -> Iterator[Pair]:
        for number, line in enumerate(read_lines(self.path), start=1):
            if not line.strip():
                continue
            parts = line.split("\t")
            if len(parts) != 2:
                tabs = f"{len(parts) - 1} tab" + "s" * (len(parts) != 2)
                raise RecipeError(
                    [f"{self.path} line {number} has {tabs}; it must be a source, one tab and its translation."]
                )
            yield parts[0], parts[1]


class JsonLines:
    """One file, a JSON object a line, with a key for each side; or with both inside a `translation` object."""

    def __init__(self, key: str, name: str, keys: tuple[str, str]):
        self.key, self.path, self.keys = f"{key} is {show(name)}", resolve(key, name), keys

    def identity(self, hashes: FileHashes) -> Any:
        return {"rows": [hashes.of(self.path), self.path.suffix == ".gz"], "keys": self.keys}

    def pairs(self) -> Iterator[Pair]:
        for number, line in enumerate(read_lines(self.path), start=1):
            if not line.strip():
                continue
            where = f"{self.path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError([f"{where} is not JSON: {error}."]) from None
            if not isinstance(row, dict):
                raise RecipeError([f"{where} is {show(row)[:60]}; each line must be a JSON object."])
            yield pair_of(row, self.keys, where)


class Dataset:
    """A split of a `datasets` dataset with a column for each side, or with both inside a `translation` column."""

    def __init__(self, key: str, recipe: Recipe, split: str, keys: tuple[str, str]):
        data = recipe.data
        assert data.dataset is not None
        self.name, self.config, self.split, self.streaming = data.dataset, data.dataset_config, split, data.streaming
        self.key, self.keys = f"data.dataset is {show(data.dataset)}", keys
        self._asked = self.key if key == "data.dataset" else f"{self.key}, {key} is {show(split)}"

    def identity(self, hashes: FileHashes) -> Any:
        name = dataset_identity(self.name, hashes)
        return {"dataset": name, "config": self.config, "split": self.split, "keys": self.keys}

    def pairs(self) -> Iterator[Pair]:
        number = 0
        rows = load_dataset(self.name, self.config, self.split, self.streaming, self._asked)
        try:
            for number, row in enumerate(rows, start=1):
                yield pair_of(row, self.keys, f"{self.name} row {number}")
        except RecipeError:
            raise
        except Exception as error:  # a streamed one fails in as many ways as it can be loaded
            raise RecipeError(
                [f"{self._asked}, and reading it failed after row {number}: {first_line(error)}."]
            ) from None


class Synthetic:
    """train/synthetic.py's pairs."""

    def __init__(self, task: str, rows: int, symbols: int, longest: int):
        self.key = f"data.synthetic is {show(task)}"
        self.task, self.rows, self.symbols, self.longest = task, rows, symbols, longest

    def identity(self, hashes: FileHashes) -> Any:
        return {"synthetic": [self.task, self.rows, self.symbols, self.longest, SYNTHETIC_SEED]}

    def pairs(self) -> Iterator[Pair]:
        return synthetic.pairs(
            self.task, rows=self.rows, symbols=self.symbols, longest=self.longest, seed=SYNTHETIC_SEED
        )


def open_table(key: str, name: str, keys: tuple[str, str]) -> PairSource:
    """A file of pairs: JSON lines by its name, else a table."""
    return JsonLines(key, name, keys) if holds_rows(Path(name)) else Table(key, name)


def resolve(key: str, name: str) -> Path:
    """The file that a path stands for, environment variables (`$NAME`, `${NAME}`) and ~ filled in. Raises RecipeError
    with the sentence for one that is not set, or not there, or no text."""
    full = os.path.expandvars(name)
    if "$" in full:
        variable = full.partition("$")[2].strip("{").partition("}")[0].partition("/")[0]
        raise RecipeError(
            [f"{key} is {show(name)}, and the environment variable {variable} is not set; set it to the data's folder."]
        )
    path = Path(full).expanduser()
    if path.is_dir():
        raise RecipeError([f"{key} is {show(name)}, and that is a folder; it must be one file."])
    if not path.exists():
        raise RecipeError([f"{key} is {show(name)}, and there is no such file."])
    if path.suffix.lower() in NOT_TEXT:
        raise RecipeError([f"{key} names {path}, and {path.suffix} is not plain text."])
    return path


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends, a byte-order mark dropped; .gz is unpacked. Raises RecipeError.

    Only \\n, \\r\\n and \\r end a line, as everywhere: not the form feeds and separators that str.splitlines knows.
    """
    try:
        with open(path, "rb") as raw:
            whole: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for line in io.TextIOWrapper(whole, encoding="utf-8-sig"):
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        reason = f"it holds the byte 0x{error.object[error.start]:02x} ({error.reason})"
        raise RecipeError([f"{path} is not UTF-8 text: {reason}."]) from None
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError([f"{path} cannot be read: {getattr(error, 'strerror', None) or error}."]) from None


def pair_of(row: dict[str, Any], keys: tuple[str, str], where: str) -> Pair:
    """The two sides in a row, or in its `translation`. Raises RecipeError."""
    inside = row.get("translation")
    sides = []
    for name, key in zip(("data.source_key", "data.target_key"), keys, strict=True):
        holder = inside if key not in row and isinstance(inside, dict) else row
        if key not in holder:
            known = ", ".join(map(str, list(holder)[:12])) or "none"
            raise RecipeError([f"{name} is {show(key)}, and {where} has the keys {known}."])
        if not isinstance(holder[key], str):
            raise RecipeError([f"{where}: {key} is {show(holder[key])[:60]}; it must be text."])
        # A pair is a line a side everywhere else, and so it is what a translator is asked.
        sides.append(
            " ".join(holder[key].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").split("\n"))
        )
    return sides[0], sides[1]
