"""Attention over the paged cache through torch's own operators: where the C kernels are missing or do not fit.

A layer's keys are one tensor [KV, blocks, size, D], likewise its values: gathering the blocks of a sequence gives
[KV, S, D] without a transposition. What a row gets may differ in its last bits with who else is in the batch.
 A batch of N rows (tokens of many sequences, one after the other) has two kinds:

- single rows (decoding, or the last token of a prompt): together. The query heads that share a KV head are given as
  query rows of that head, so the keys are read once and never repeated;
- chunks of a prompt: one sequence at a time, through the fused kernel, without touching the cache where the chunk is
  all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import may_attend
from serve.engine.blocks import NULL
from serve.engine.scheduler import Share

if TYPE_CHECKING:
    from serve.engine.pages import Pages

FEWEST = 8  # blocks: tables up to this length are attended together, longer ones with those of up to twice their length


def write(pages: Pages, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """k, v [N, KV, D] into slots int64 [N], slot = block * size + offset."""
    pages.keys[layer].flatten(1, 2).index_copy_(1, slots, k.transpose(0, 1))
    pages.values[layer].flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1))


def gather(pages: Pages, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
    """tables int64 [R, n] -> keys and values [KV, R, n * size, D]."""
    keys, values = pages.keys[layer], pages.values[layer]
    rows, length = tables.shape
    shape = (keys.shape[0], rows, length * pages.size, keys.shape[3])
    flat = tables.flatten()
    return keys.index_select(1, flat).view(shape), values.index_select(1, flat).view(shape)


@dataclass
class _View:
    """What some single rows see of the cache through one window: tables int64 [R, n], mask bool [R, 1, 1, n * size]."""

    tables: Tensor
    mask: Tensor


class _Singles:
    """Rows with one query each whose tables are of similar length."""

    def __init__(self, rows: list[int], shares: list[Share], size: int, device: torch.device) -> None:
        # As decoding rows come first and mostly are of one length, they mostly are a slice, which copies nothing.
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        self.rows: slice | Tensor = slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows, device=device)
        self._device = device
        self._shares = shares
        self._size = size
        self._views: dict[int | None, _View] = {}

    def view(self, window: int | None) -> _View:
        if window not in self._views:
            self._views[window] = self._make(window)
        return self._views[window]

    def _make(self, window: int | None) -> _View:
        size, device = self._size, self._device
        positions = [share.start for share in self._shares]
        firsts = [0 if window is None else max(0, p - window + 1) // size for p in positions]
        needed = [
            s.request.table[first : p // size + 1] for s, first, p in zip(self._shares, firsts, positions, strict=True)
        ]
        length = max(map(len, needed))
        tables = torch.tensor(
            [table + [NULL] * (length - len(table)) for table in needed], dtype=torch.int64, device=device
        )
        query = torch.tensor(positions, device=device).unsqueeze(1)  # [R, 1]
        keys = torch.tensor(firsts, device=device).unsqueeze(1) * size + torch.arange(length * size, device=device)
        return _View(tables, may_attend(query, keys, window).unsqueeze(1))


class _Chunk:
    """Rows [begin : end] of the batch: tokens [start : start + end - begin] of one sequence."""

    def __init__(self, begin: int, share: Share, size: int, device: torch.device) -> None:
        self.begin, self.end = begin, begin + share.length
        self.start, self.total = share.start, share.start + share.length
        self.tables = torch.tensor([share.request.table[: -(-self.total // size)]], dtype=torch.int64, device=device)
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """bool [T, S]: what the chunk's tokens may see of all the sequence's tokens so far."""
        if window not in self._masks:
            positions = torch.arange(self.total, device=self.tables.device)
            self._masks[window] = may_attend(positions[self.start :], positions, window)
        return self._masks[window]


class TorchAttend:
    """The policy of one step: attend(layer, q [N, H, D], k [N, KV, D], v [N, KV, D]) -> [N, H, D], through the pages.

    The rows are those of `shares`, one after the other; k and v are written to the cache first, then everything is
    read from it.
    """

    def __init__(self, pages: Pages, windows: Sequence[int | None], shares: Sequence[Share]) -> None:
        self._pages, self._windows = pages, windows
        size, device = pages.size, pages.device
        slots: list[int] = []
        groups: dict[int, tuple[list[int], list[Share]]] = {}
        self._chunks: list[_Chunk] = []
        row = 0
        for share in shares:
            table = share.request.table
            slots += [table[p // size] * size + p % size for p in range(share.start, share.start + share.length)]
            if share.length == 1:
                longest = FEWEST
                while longest < share.start // size + 1:
                    longest *= 2
                rows, members = groups.setdefault(longest, ([], []))
                rows.append(row)
                members.append(share)
            else:
                self._chunks.append(_Chunk(row, share, size, device))
            row += share.length
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._singles = [_Singles(rows, members, size, device) for rows, members in groups.values()]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._windows[layer]
        write(self._pages, layer, self._slots, k, v)
        if len(self._singles) == 1 and not self._chunks:  # the usual step: everybody decodes
            return self._decode(layer, self._singles[0], q, window)
        out = torch.empty_like(q)
        for singles in self._singles:
            out[singles.rows] = self._decode(layer, singles, q[singles.rows], window)
        for chunk in self._chunks:
            out[chunk.begin : chunk.end] = self._prefill(layer, chunk, q, k, v, window)
        return out

    def _decode(self, layer: int, singles: _Singles, q: Tensor, window: int | None) -> Tensor:
        view = singles.view(window)
        keys, values = (x.transpose(0, 1) for x in gather(self._pages, layer, view.tables))  # [R, KV, S, D]
        grouped = q.unflatten(1, (keys.shape[1], -1))  # [R, KV, H / KV, D]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=view.mask).flatten(1, 2)

    def _prefill(self, layer: int, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        heads = k.shape[1]
        queries = q[chunk.begin : chunk.end].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [KV, H / KV, T, D]
        whole = chunk.start == 0 and (window is None or window >= chunk.total)
        if chunk.start == 0:
            keys, values = (x[chunk.begin : chunk.end].transpose(0, 1) for x in (k, v))  # [KV, S, D]
        else:
            keys, values = (x[:, 0, : chunk.total] for x in gather(self._pages, layer, chunk.tables))
        keys, values = (
            x.unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for x in (keys, values)
        )  # no copy: stride 0
        mask = None if whole else chunk.mask(window)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=whole)
        return mixed.permute(2, 0, 1, 3).flatten(1, 2)
