"""Token shards read by index, and batches whose order is a pure function of (seed, epoch, step).

Nothing here has a state to save: the update count alone says which tokens come next, so a run resumes exactly, any
number of times, on any number of ranks, each of which takes its rows of the same global batch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

IGNORED = -100  # the target of a place that carries no loss


class Tokens:
    """A split's tokens, a virtual array over (memory-mapped) shards.

    `bytes_total`: the UTF-8 bytes of text that the split stands for. `documents`: whether end-of-text ids divide it.
    Slicing (step 1, no negative bounds) gives the shards' own dtype, uint16 or uint32: a view within one shard, a copy
    across several.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        *,
        start: int = 0,
        stop: int | None = None,
        bytes_total: int = 0,
        documents: bool = False,
    ):
        # np.asarray: slicing a np.memmap makes a np.memmap, at several times the cost of a plain view of the same
        # pages.
        self._shards = [np.asarray(shard) for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self._start = start
        self._stop = (self._ends[-1] if self._ends else 0) if stop is None else stop
        self.bytes_total = bytes_total
        self.documents = documents

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last, _ = where.indices(len(self))
        first, last = first + self._start, max(first, last) + self._start
        parts: list[np.ndarray] = []
        for number in range(bisect.bisect_right(self._ends, first), len(self._shards)):
            offset = self._ends[number] - len(self._shards[number])
            part = self._shards[number][max(first - offset, 0) : last - offset]
            if last <= self._ends[number]:
                return part if not parts else np.concatenate([*parts, part])
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


class Batches:
    """The training batches of a run: batch(step) for every update `step` = 0, 1, 2, ...

    An epoch is the split cut into windows of `context` inputs, each with the token after it as its last target. The
    windows of an epoch do not overlap; their grid begins at an offset drawn per epoch, so that cuts fall elsewhere
    each time, and their order is drawn per epoch. What the grid leaves over at the ends (less than two windows) is
    left out of the epoch. A batch may span epochs. Raises ValueError where the split does not hold one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        context: int,
        batch_tokens: int,
        seed: int,
        eos_id: int | None = None,
        document_mask: bool = False,
    ):
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} tokens do not hold one window of {context} and the token after it.")
        if document_mask and eos_id is None:
            raise ValueError("a document mask needs an end-of-text token.")
        self.tokens, self.context, self.seed = tokens, context, seed
        self.sequences = batch_tokens // context  # rows of the global batch
        self.eos_id = eos_id if document_mask else None
        self.windows = max(1, len(tokens) // context - 1)  # of an epoch; one is given up so that the grid can move
        self._offsets = min(context, len(tokens) - self.windows * context)  # places at which the grid may begin

    def epoch(self, step: int) -> float:
        """Passes over the split done before update `step`."""
        return step * self.sequences / self.windows

    def starts(self, step: int, rows: slice | None = None) -> np.ndarray:
        """int64 [R]: where in the split each row of update `step` begins."""
        place = step * self.sequences + np.arange(self.sequences, dtype=np.int64)[rows or slice(None)]
        epochs, index = np.divmod(place, self.windows)
        keys = _hash(epochs.astype(np.uint64) + _hash(np.array([self.seed], dtype=np.uint64)))
        offset = (_hash(keys) % np.uint64(self._offsets)).astype(np.int64)
        return offset + self.context * permute(index, self.windows, keys)

    def batch(self, step: int, rows: slice | None = None) -> dict[str, torch.Tensor]:
        """Rows of the global batch of update `step`: `tokens` and `targets` int64 [R, context], targets one token
        ahead.

        With a document mask also `documents` int64 [R, context]: see document_ids.
        """
        starts = self.starts(step, rows)
        span = np.empty((len(starts), self.context + 1), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            span[row] = self.tokens[start : start + self.context + 1]
        return _batch(span[:, :-1], span[:, 1:], self.eos_id)


def windows(
    tokens: Tokens,
    context: int,
    *,
    rows: int = 16,
    limit: int | None = None,
    eos_id: int | None = None,
    document_mask: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """A whole split in order, in windows of `context` that do not overlap, `rows` of them a batch: for evaluation.

    Every token but the first is a target exactly once. The last window is filled up with token 0 and targets of -100;
    the last batch may have fewer rows. `limit` stops after that many targets, at the split's beginning.
    """
    targets = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
    for first in range(0, targets, rows * context):
        count = min(rows * context, targets - first)
        span = tokens[first : first + count + 1].astype(np.int64)
        height = math.ceil(count / context)
        inputs = np.zeros(height * context, dtype=np.int64)
        wanted = np.full(height * context, IGNORED, dtype=np.int64)
        inputs[:count], wanted[:count] = span[:-1], span[1:]
        yield _batch(
            inputs.reshape(height, context), wanted.reshape(height, context), eos_id if document_mask else None
        )


def document_ids(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """The number, from 0 in each row, of the document that each token [R, T] belongs to.

    An end-of-text token is its document's last target and the next document's first input: as input it counts to the
    document it opens. So no target is predicted from another document's tokens, and none needs to be dropped.
    """
    return np.cumsum(tokens == eos_id, axis=1, dtype=np.int64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), one for each key, puts `index`.

    index: int64 [R], each in range(size). keys: uint64 [R]. A Feistel network over the digits of a two-digit number in
    the mixed base a x b, a x b just above `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"),
    repeated for the few numbers that land outside: no table, so ten billion tokens cost no memory and a batch only its
    own rows.
    """
    high_base = math.isqrt(size - 1) + 1
    low_base = -(-size // high_base)
    a, b = np.uint64(high_base), np.uint64(low_base)
    value, outside = index.astype(np.uint64), np.arange(len(index))
    while len(outside):
        high, low = np.divmod(value[outside], b)
        key = keys[outside]
        for _ in range(3):  # with a key for each half: shared ones leave permutations far from even
            key = _hash(key)
            high = (high + _hash(low ^ key)) % a
            key = _hash(key)
            low = (low + _hash(high ^ key)) % b
        value[outside] = high * b + low
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), elementwise on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _batch(inputs: np.ndarray, targets: np.ndarray, eos_id: int | None) -> dict[str, torch.Tensor]:
    batch = {"tokens": inputs, "targets": targets}
    if eos_id is not None:
        batch["documents"] = document_ids(inputs, eos_id)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
