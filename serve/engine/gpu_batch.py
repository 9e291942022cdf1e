"""The shares of a step as the numbers that a GPU needs, all in one copy. `unverified` on a GPU.

A row is a token. A tile is what one group of threads attends for: a single token, or neighbouring tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lm.upload import upload
from serve.engine.blocks import NULL
from serve.engine.requests import Request
from serve.engine.scheduler import Share


class Inputs(NamedTuple):
    """What a forward pass is told, int32. The first `singles` tiles have one row each."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]: block * size + offset, where a row's key and value go
    tiles: Tensor  # [tiles, 4]: sequence, first row, rows, position of the first row
    tables: Tensor  # [sequences, width]: blocks, NULL after the last
    singles: int


class Single(NamedTuple):
    """One token of a request, at its position."""

    request: Request
    position: int
    token: int

    @classmethod
    def of(cls, share: Share) -> Single:
        return cls(share.request, share.start, share.request.tokens(share.start, 1)[0])


class Shape(NamedTuple):
    """How many of each; all lie in one flat array, one after the other, the tables last."""

    rows: int
    tiles: int
    sequences: int
    width: int

    @property
    def before_tables(self) -> int:
        return 3 * self.rows + 4 * self.tiles

    @property
    def numbers(self) -> int:
        return self.before_tables + self.sequences * self.width

    def split(self, flat: Any) -> tuple[Any, Any, Any, Any, Any]:
        """A flat array (numpy's or torch's) of `numbers` -> views of it: tokens, positions, slots, tiles, tables."""
        rows, end = self.rows, self.before_tables
        return (
            flat[:rows],
            flat[rows : 2 * rows],
            flat[2 * rows : 3 * rows],
            flat[3 * rows : end].reshape(self.tiles, 4),
            flat[end : self.numbers].reshape(self.sequences, self.width),
        )


def mixed(shares: Sequence[Share], size: int, tokens: int, device: torch.device) -> Inputs:
    """Any shares, in blocks of `size`; chunks are cut into tiles of up to `tokens` rows."""
    singles = [(n, share) for n, share in enumerate(shares) if share.length == 1]
    tiles_of_chunks = sum(-(-share.length // tokens) for share in shares if share.length > 1)
    shape = Shape(
        rows=sum(share.length for share in shares),
        tiles=len(singles) + tiles_of_chunks,
        sequences=len(shares),
        width=max((share.start + share.length - 1) // size + 1 for share in shares),
    )
    flat = np.zeros(shape.numbers, dtype=np.int32)
    ids, positions, slots, tiles, tables = shape.split(flat)
    row, single, tile = 0, 0, len(singles)
    for n, (request, start, length) in enumerate(shares):
        end = start + length
        blocks = (end - 1) // size + 1
        table = tables[n]
        table[:blocks] = request.table[:blocks]
        ids[row : row + length] = request.tokens(start, length)
        at = np.arange(start, end, dtype=np.int32)
        positions[row : row + length] = at
        slots[row : row + length] = table[at // size] * size + at % size
        if length == 1:
            tiles[single] = n, row, 1, start
            single += 1
        else:
            for first in range(0, length, tokens):
                tiles[tile] = n, row + first, min(tokens, length - first), start + first
                tile += 1
        row += length
    return Inputs(*shape.split(upload(torch.from_numpy(flat), device)), len(singles))


class Decoding:
    """The inputs of a pass over single tokens: always the same memory, as a CUDA graph wants it.

    Rows after the last single are padding: token 0 at position 0, in the null block.
    """

    def __init__(self, most: int, width: int, size: int, device: torch.device) -> None:
        """For up to `most` rows whose tables have up to `width` blocks of `size` tokens."""
        self._size, self._width = size, width
        self._shape = Shape(most, most, most, width)
        cuda = device.type == "cuda"
        self._host = torch.zeros(self._shape.numbers, dtype=torch.int32, pin_memory=cuda)
        self._device = torch.zeros(self._shape.numbers, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if cuda else None
        # Of each row, whose table it holds: a table only grows until it is given back, so its length says the rest.
        self._held: list[tuple[Request, int, int] | None] = [None] * most
        self._tokens, self._positions, self._slots, self._tiles, self._tables = self._shape.split(self._host.numpy())
        self._tiles[:, 0] = self._tiles[:, 1] = np.arange(most)
        self._tiles[:, 2] = 1
        self._device.copy_(self._host)

    def view(self, rows: int) -> Inputs:
        """The first `rows` rows on the device."""
        tokens, positions, slots, tiles, tables = (part[:rows] for part in self._shape.split(self._device))
        return Inputs(tokens, positions, slots, tiles, tables, singles=rows)

    def load(self, singles: Sequence[Single], rows: int) -> None:
        """Makes rows [: rows] these, in order, and padding. Their tables reach their positions."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before reads what is written now
        size, count = self._size, len(singles)
        for n, (request, position, token) in enumerate(singles):
            table = request.table
            held = (request, request.preemptions, len(table))
            if self._held[n] != held:
                known = table[: self._width]  # room beyond the longest sequence is not read
                self._tables[n, : len(known)] = known
                self._held[n] = held
            self._tokens[n] = token
            self._positions[n] = position
            self._slots[n] = table[position // size] * size + position % size
        for part in (self._tokens, self._positions, self._slots):
            part[count:rows] = 0
        self._tables[count:rows, 0] = NULL
        self._held[count:rows] = [None] * (rows - count)
        self._tiles[:rows, 3] = self._positions[:rows]
        used = self._shape.before_tables + rows * self._width
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
