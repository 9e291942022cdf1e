"""Attention over the paged cache through the C kernel: the `attend` policy of a flattened batch on a CPU.

All layers in one call (layers.py) take `step` alone. Calling it is one layer: a pass that writes the keys and values of
the step's tokens into their slots and attends for all of them, whatever the mix of single tokens and chunks of prompts.
kernels/attention.c says how, and why nobody's numbers depend on who else is in the batch.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve.engine.kernels.attention import TILE, Layer, Step, rows_of_part
from serve.engine.scheduler import Share

if TYPE_CHECKING:
    from serve.engine.pages import Pages

ALONE = 1 << 18  # multiplications that one thread does sooner than two have agreed on who does what
TOKENS = 16  # of a part whose tiles hold no whole number of them: most of its tiles are full then


class PagedAttend:
    """The policy of one step: attend(layer, q [N, H, D], k [N, KV, D], v [N, KV, D]) -> [N, H, D], through the pages.

    The rows are those of `shares`, one after the other. q, k and v may be views into one buffer, as long as the heads
    of a row are contiguous; a tensor that is not so is copied.
    """

    def __init__(self, pages: Pages, windows: Sequence[int | None], shares: Sequence[Share]) -> None:
        if pages.kernels is None:
            raise ValueError("These pages are laid out for torch.")
        self._attend = pages.kernels.call.heed_attend
        self.pages, self._windows = pages, [window or 0 for window in windows]
        size, group = pages.size, pages.heads // pages.kv_heads
        pairs = sum(share.length * (share.start + share.length) for share in shares)
        threads = torch.get_num_threads() if 2 * pairs * pages.heads * pages.dim > ALONE else 1

        # Where tokens fill a tile, a part is one: it fetches the pages that come next, and the threads end together.
        most = TILE // group if TILE % group == 0 else min(TOKENS, rows_of_part(pages.dim) // group)
        parts: list[tuple[int, int, int, int]] = []
        tables: list[int] = []
        row = 0
        for request, start, length in shares:
            begin = len(tables)
            tables += request.table[: (start + length - 1) // size + 1]
            for done in range(0, length, most):
                parts.append((row + done, start + done, min(most, length - done), begin))
            row += length
        if threads > 1:  # the longest first, so that the threads end together
            parts.sort(key=lambda part: part[2] * (part[1] + part[2]), reverse=True)
        # Arrays hold what the kernel reads and must live as long as this does.
        self._parts = array("q", [number for part in parts for number in part])
        self._tables = array("i", tables)
        self._step = Step(
            heads=pages.heads,
            kv_heads=pages.kv_heads,
            dim=pages.dim,
            size=size,
            blocks=pages.blocks,
            is_bf16=pages.dtype is torch.bfloat16,
            parts=len(parts),
            threads=threads,
            part=self._parts.buffer_info()[0],
            tables=self._tables.buffer_info()[0],
        )
        self._layer = Layer()
        self.step, self._layer_at = ctypes.addressof(self._step), ctypes.addressof(self._layer)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype is not self.pages.dtype:
            raise TypeError(f"Pages of {self.pages.dtype} cannot take {q.dtype}.")
        q, k, v = self._aligned(q), self._aligned(k), self._aligned(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        told = self._layer
        told.q, told.k, told.v, told.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        told.q_stride, told.k_stride, told.v_stride = q.stride(0), k.stride(0), v.stride(0)
        told.keys, told.values = self.pages.pointers[layer]
        told.window = self._windows[layer]
        self._attend(self.step, self._layer_at)
        return out

    def _aligned(self, x: Tensor) -> Tensor:
        """x, or a copy in which the numbers of a row are contiguous."""
        _, heads, dims = x.stride()
        return x if heads == self.pages.dim and dims == 1 else x.contiguous()
