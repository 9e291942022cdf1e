"""Pairs as token ids, and batches of them whose order is a pure function of (seed, epoch, step).

As with text (train/data.py) there is no state to save: the update count says which pairs come next, on any number of
ranks, each of which takes every world-th row of the same global batch.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lm.loss import IGNORE

CHUNK = 64  # batches' worth of pairs that are sorted by length together: enough for even lengths, few enough to mix
FETCHED = 20  # minibatches of `batch_sentences` that are sorted together (arXiv 1409.0473, appendix B.2)


@dataclass(frozen=True)
class Pairs:
    """Token ids of n pairs, without special tokens. Each side is one stream; row i of it lies between two of its ends.

    source and target: uint16 or uint32; source_ends and target_ends: int64 [n + 1], from 0.
    """

    source: np.ndarray
    source_ends: np.ndarray
    target: np.ndarray
    target_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.source_ends) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        source = self.source[self.source_ends[row] : self.source_ends[row + 1]]
        return source, self.target[self.target_ends[row] : self.target_ends[row + 1]]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] each: the tokens of every source, and of every target."""
        return np.diff(self.source_ends), np.diff(self.target_ends)

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Pairs:
        """From lists of ids, for a few pairs."""
        sides = []
        for side in range(2):
            ids = [row[side] for row in rows]
            sides.append(np.array([id for one in ids for id in one], dtype=np.uint32))
            sides.append(np.cumsum([0, *map(len, ids)], dtype=np.int64))
        return cls(*sides)


@dataclass(frozen=True)
class Frame:
    """How ids become what the model reads: the special tokens, and where a source ends."""

    pad_id: int
    bos_id: int  # begins every target, as its first input
    eos_id: int  # ends every target, as its last output
    source_end: int  # the last token of every source: EOS, or BOS for a decoder that goes on with the target

    def batch(self, pairs: Pairs, rows: Sequence[int], *, counts: bool = True) -> dict[str, Tensor]:
        """src int64 [B, S] and src_mask bool [B, S] (True is real, real ones first), tgt_input and tgt_output int64
        [B, T]; lm.loss.IGNORE where no target is asked, which with `counts` false is everywhere.
        """
        both = [pairs[row] for row in rows]
        longest = [max(len(pair[side]) for pair in both) + 1 for side in range(2)]
        src = np.full((len(both), longest[0]), self.pad_id, dtype=np.int64)
        mask = np.zeros(src.shape, dtype=bool)
        tgt_input = np.full((len(both), longest[1]), self.pad_id, dtype=np.int64)
        tgt_output = np.full(tgt_input.shape, IGNORE, dtype=np.int64)
        for row, (source, target) in enumerate(both):
            n, t = len(source), len(target)
            src[row, :n], src[row, n], mask[row, : n + 1] = source, self.source_end, True
            tgt_input[row, 0], tgt_input[row, 1 : t + 1] = self.bos_id, target
            if counts:
                tgt_output[row, :t], tgt_output[row, t] = target, self.eos_id
        named = {"src": src, "src_mask": mask, "tgt_input": tgt_input, "tgt_output": tgt_output}
        return {name: torch.from_numpy(array) for name, array in named.items()}


class PairBatches:
    """The training batches of a run: rows(step) for every update `step` = 0, 1, 2, ...

    An epoch takes every pair once. With `batch_tokens`: the pairs in an order drawn for the epoch, chunks of it sorted
    by length, cut into batches of as many pairs as padded to the longest side of any (its ending token included) take
    at most `batch_tokens` a side, and the batches in an order drawn for the epoch. With `batch_sentences`: the pairs in
    one order drawn for the whole run; 20 batches' worth at a time are sorted by length and cut into batches of so many,
    which come in that order (arXiv 1409.0473, appendix B.2).

    How many batches an epoch has depends on its order, so that the epochs before a step are planned to find it: once a
    run, in about a second per five million pairs.

    eligible: the rows that may be used, int64 [m], in order. Raises ValueError where there is none, or one that does
    not fit into batch_tokens.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        seed: int,
        batch_tokens: int | None = None,
        batch_sentences: int | None = None,
        eligible: np.ndarray | None = None,
    ):
        self.pairs, self.seed = pairs, seed
        self.batch_tokens, self.batch_sentences = batch_tokens, batch_sentences
        self.eligible = np.arange(len(pairs)) if eligible is None else eligible
        if not len(self.eligible):
            raise ValueError("there is no pair to train on.")
        if (batch_tokens is None) == (batch_sentences is None):
            raise ValueError("a batch is measured in tokens or in sentences, one of the two.")
        self.source_lengths, self.target_lengths = (lengths + 1 for lengths in pairs.lengths())
        self.longest = np.maximum(self.source_lengths, self.target_lengths)
        most = int(self.longest[self.eligible].max())
        if batch_tokens is not None and most > batch_tokens:
            raise ValueError(f"a pair has {most} tokens on a side; a batch holds {batch_tokens}.")
        self._plan = lru_cache(maxsize=2)(self.plan)
        self._planning = threading.Lock()  # the next batch is made while this one is trained on
        self._ends = [0]  # the batches in the first 0, 1, 2, ... epochs, as far as they have been planned

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, in order, each the rows of its pairs, int64."""
        if self.batch_sentences is not None:
            order = self.eligible[self._random(0).permutation(len(self.eligible))]
            return list(_by_sentences(order, self._sorted, self.batch_sentences))
        random = self._random(epoch + 1)
        order = self.eligible[random.permutation(len(self.eligible))]
        assert self.batch_tokens is not None
        size = max(1, CHUNK * self.batch_tokens // max(1, int(self.longest[order].mean())))
        batches = [
            batch
            for first in range(0, len(order), size)
            for batch in _by_tokens(self._sorted(order[first : first + size]), self.longest, self.batch_tokens)
        ]
        return [batches[place] for place in random.permutation(len(batches))]

    def rows(self, step: int) -> np.ndarray:
        """int64 [R]: the rows of the global batch of update `step`."""
        epoch, place = self._locate(step)
        return self._plan(epoch)[place]

    def targets(self, step: int) -> int:
        """Target tokens of the global batch, ending tokens included."""
        return int(self.target_lengths[self.rows(step)].sum())

    def epoch(self, step: int) -> float:
        """Passes over the pairs done before update `step`."""
        epoch, place = self._locate(step)
        return epoch + place / (self._ends[epoch + 1] - self._ends[epoch])

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of an update, and its place there."""
        with self._planning:
            while self._ends[-1] <= step:
                self._ends.append(self._ends[-1] + len(self._plan(len(self._ends) - 1)))
        epoch = bisect.bisect_right(self._ends, step) - 1
        return epoch, step - self._ends[epoch]

    def _sorted(self, rows: np.ndarray) -> np.ndarray:
        """By the longer side, then by the source; equal ones as they come."""
        return rows[np.lexsort((self.source_lengths[rows], self.longest[rows]))]

    def _random(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, number]))


def in_order(pairs: Pairs, rows: Sequence[int], budget: int) -> list[np.ndarray]:
    """`rows` sorted by length and cut into batches of at most `budget` tokens a side with padding: for evaluation."""
    source, target = pairs.lengths()
    longest = np.maximum(source, target) + 1
    order = np.asarray(rows, dtype=np.int64)
    order = order[np.lexsort((order, source[order], longest[order]))]
    return list(_by_tokens(order, longest, budget))


def _by_tokens(order: np.ndarray, longest: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """`order`, sorted by `longest`, cut into batches as large as the budget allows; a pair beyond it stands alone."""
    first = 0
    while first < len(order):
        # Sorted, so that a batch of k costs k x the longest of its last: grow it until that is too much.
        ahead = longest[order[first : first + budget]]
        costs = ahead * np.arange(1, len(ahead) + 1)
        count = max(1, int(np.searchsorted(costs, budget, side="right")))
        yield order[first : first + count]
        first += count


def _by_sentences(order: np.ndarray, by_length: Callable[[np.ndarray], np.ndarray], count: int) -> Iterator[np.ndarray]:
    for first in range(0, len(order), FETCHED * count):
        fetched = by_length(order[first : first + FETCHED * count])
        for start in range(0, len(fetched), count):
            yield fetched[start : start + count]
