"""The keys and values of targets so far, of rows that stand in groups: the hypotheses of a beam beside each other.

Beam search reorders its hypotheses at almost every step, and each takes its past along. The past is not copied for
that. What the i-th row of a group writes at a step stays where it was written, at place i of that step's cell; a table
of ancestors says at which place a row's past is, cell by cell, and reordering the rows of a group reorders that table
alone. A group then attends together, to all places of all its cells, each row masked to its own past. Rows that stand
alone need no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_CELLS = 16  # of a cache that is made or grows: it doubles from here


@dataclass
class TargetCache:
    """keys [layers, M, H, cells, P, d_k] and values [layers, M, H, cells, P, d_v]: M groups of E rows, P >= E places.

    ancestors int64 [M, E, cells]: the place at which row i of a group has what it reads in a cell; None where E is 1,
    and then P is 1. A cell that a row has not reached holds nothing of meaning, but is finite.
    """

    keys: Tensor
    values: Tensor
    ancestors: Tensor | None = None
    # Caches that share tensors share this list; whose `mark` it holds may write, another copies the tensors first.
    writer: list[object] = field(default_factory=lambda: [None])
    mark: object = field(default_factory=object)

    @property
    def cells(self) -> int:
        return self.keys.shape[3]

    def reserve(self, cells: int, most: int) -> None:
        """Be ready to be written: as many cells at least, `most` of them at most, and tensors that no other writes."""
        if self.writer[0] is not self.mark:
            if self.writer[0] is not None:
                self.keys, self.values = self.keys.clone(), self.values.clone()
                self.ancestors = None if self.ancestors is None else self.ancestors.clone()
            self.writer = [self.mark]
        more = min(most, max(cells, 2 * self.cells, LEAST_CELLS)) - self.cells
        if cells > self.cells:
            self.keys, self.values = _longer(self.keys, more), _longer(self.values, more)
            self.ancestors = None if self.ancestors is None else F.pad(self.ancestors, (0, more))

    def select(self, index: Tensor, groups: Sequence[int], each: int) -> TargetCache:
        """The rows of `index` int64 [R], in new groups of `each`; `groups` says which old one each of these is."""
        if self.ancestors is None and each == 1:
            return TargetCache(self.keys.index_select(1, index), self.values.index_select(1, index))
        keys, values, ancestors = self.keys, self.values, self.ancestors
        if list(groups) != list(range(keys.shape[1])):
            kept = torch.tensor(groups, dtype=torch.int64, device=index.device)
            keys, values = keys.index_select(1, kept), values.index_select(1, kept)
        if ancestors is None:  # all of the past is at place 0
            ancestors = index.new_zeros(len(groups), each, self.cells)
        else:
            ancestors = ancestors.flatten(0, 1).index_select(0, index).unflatten(0, (-1, each))
        if each == 1:
            return TargetCache(_alone(keys, ancestors), _alone(values, ancestors))
        more = max(0, each - keys.shape[4])
        if more:
            keys, values = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
        shared = keys is self.keys
        cache = TargetCache(keys, values, ancestors, self.writer if shared else [None])
        if shared and self.writer[0] in (None, self.mark):  # else who may write has perhaps written already
            self.writer[0] = cache.mark
        return cache

    def apart(self) -> TargetCache:
        """The same rows, each a group of its own."""
        if self.ancestors is None:
            return self
        groups, each = self.ancestors.shape[:2]
        rows = torch.arange(groups * each, device=self.ancestors.device)
        return self.select(rows, (rows // each).tolist(), 1)

    @staticmethod
    def join(parts: Sequence[TargetCache]) -> TargetCache:
        """The groups of all, in order; they must have equally many rows each."""
        cells, places = max(part.cells for part in parts), max(part.keys.shape[4] for part in parts)

        def stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(t, (0, 0, 0, places - t.shape[4], 0, cells - t.shape[3])) for t in tensors], dim=1)

        tables = [F.pad(p.ancestors, (0, cells - p.cells)) for p in parts if p.ancestors is not None]
        return TargetCache(
            stack([part.keys for part in parts]),
            stack([part.values for part in parts]),
            torch.cat(tables) if tables else None,
        )

    def begin(self, positions: Tensor) -> None:
        """From now on a row reads at `positions` (int64 [t], or [R, t]) what it itself writes there."""
        if self.ancestors is None:
            return
        groups, each, _ = self.ancestors.shape
        own = torch.arange(each, device=positions.device).unsqueeze(-1)  # [E, 1]
        if positions.dim() == 1:
            self.ancestors[:, :, positions] = own
        else:
            self.ancestors.scatter_(
                2, positions.unflatten(0, (groups, each)), own.expand(groups, -1, positions.shape[1])
            )

    def lineage(self, span: int) -> Tensor | None:
        """bool [M, E, span, P]: the places of the first `span` cells that hold a row's past; None: all."""
        if self.ancestors is None:
            return None
        places = torch.arange(self.keys.shape[4], device=self.ancestors.device)
        return self.ancestors[:, :, :span].unsqueeze(-1) == places

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, start: int | None) -> None:
        """Put k [R, t, H, d_k] and v [R, t, H, d_v] where `positions` says, int64 [R, t]; or, for all rows, from cell
        `start` on.
        """
        groups = self.keys.shape[1]
        each = len(k) // max(1, groups)
        if start is not None:
            end = start + k.shape[1]
            for kept, new in ((self.keys, k), (self.values, v)):
                kept[layer][:, :, start:end, :each] = new.unflatten(0, (groups, each)).permute(0, 3, 2, 1, 4)
            return
        row = torch.arange(len(k), device=k.device).unsqueeze(1)
        self.keys[layer][row // each, :, positions, row % each] = k
        self.values[layer][row // each, :, positions, row % each] = v

    def read(self, layer: int, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` cells: keys [M, H, span * P, d_k] and values [M, H, span * P, d_v], without a copy."""
        return self.keys[layer][:, :, :span].flatten(2, 3), self.values[layer][:, :, :span].flatten(2, 3)


def _longer(tensor: Tensor, cells: int) -> Tensor:
    *shape, held, places, size = tensor.shape
    longer = tensor.new_empty(*shape, held + cells, places, size)
    longer[..., :held, :, :] = tensor
    longer[..., held:, :, :] = 0  # F.pad would fill all of it first
    return longer


def _alone(tensor: Tensor, ancestors: Tensor) -> Tensor:
    """[layers, R, H, cells, P, d] and the one row's ancestors [R, 1, cells] -> [layers, R, H, cells, 1, d]."""
    layers, rows, heads, cells, _, size = tensor.shape
    place = ancestors.view(1, rows, 1, cells, 1, 1).expand(layers, rows, heads, cells, 1, size)
    return tensor.gather(4, place)
