"""The greatest numbers, found by blocks, are those that a search of everything finds."""

from __future__ import annotations

import pytest
import torch

from lm.greatest import argmax, greatest


@pytest.mark.parametrize("size", [1, 63, 256, 257, 511, 4096, 4101, 12_800, 12_863])
@pytest.mark.parametrize("levels", [2, 1000])  # of two, nearly all are equal
def test_they_are_the_greatest(size: int, levels: int) -> None:
    values = torch.randint(levels, (5, size), generator=torch.Generator().manual_seed(size)).float() - 1
    values[1] = -torch.inf
    values[2, : size // 2] = -torch.inf
    first = [row.index(max(row)) for row in values.tolist()]
    assert argmax(values).tolist() == first
    for k in {1, min(7, size), min(64, size)}:
        found, places = greatest(values, k)
        assert torch.equal(found, values.topk(k).values)
        assert torch.equal(values.gather(1, places), found)
        assert all(len(set(row)) == k for row in places.tolist())
        for row in range(len(values)):  # alone as in company
            assert torch.equal(greatest(values[row : row + 1], k)[1][0], places[row])
