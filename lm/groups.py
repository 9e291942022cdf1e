"""Rows that stand in groups: the hypotheses of a beam beside each other, each group with one source that it shares."""

from __future__ import annotations

import torch
from torch import Tensor


def regroup(index: Tensor, each: int) -> tuple[list[int], int]:
    """When rows of groups of `each` are selected by `index` int64 [R]: the old group that each new one is of, and how
    many rows a new one has.

    Where the new rows of a group do not stand beside each other, equally many of each group, every row becomes a group
    of its own.
    """
    groups = (index // each).tolist()
    kept = list(dict.fromkeys(groups))
    rows = len(groups) // max(1, len(kept))
    if groups != [group for group in kept for _ in range(rows)]:
        return groups, 1
    return kept, max(1, rows)


def take(tensor: Tensor, groups: list[int]) -> Tensor:
    """These groups of a tensor [M, ...]: itself, where they are all of its own."""
    if groups == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, torch.tensor(groups, dtype=torch.int64, device=tensor.device))
