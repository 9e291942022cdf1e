"""The KV cache as tensors: for each layer the keys and the values of all blocks.

With the C kernels (a CPU, float32 or bfloat16), keys are [KV, blocks, D, size], so that a register holds neighbouring
keys, and paged.py attends; without them keys are [KV, blocks, size, D] and paged_torch.py attends. Values are
[KV, blocks, size, D] in both.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lm.decoder import DecoderLM
from serve.engine import kernels
from serve.engine.kernels import Kernels
from serve.engine.kernels.attention import CELL, MAX_DIM, rows_of_part
from serve.engine.paged import PagedAttend
from serve.engine.paged_torch import TorchAttend
from serve.engine.scheduler import Share

SPARE = 64  # bytes after the last cell: a register is loaded whole, also for a row that does not fill it


class Attend(Protocol):
    """attend(layer, q [N, H, D], k [N, KV, D], v [N, KV, D]) -> [N, H, D]: one step's policy (see lm.decoder)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Pages:
    """The cache: `layers` layers of `blocks` blocks of `size` tokens, zeroed.

    `kernels`: what attends, None: torch. Given "best", it is the best that runs here and fits the sizes. Through
    kernels, what a sequence gets is the same to the bit whoever shares the batch, however it is cut into steps.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        dim: int,
        blocks: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kernels: Kernels | str | None = "best",
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.blocks, self.size = heads, kv_heads, dim, blocks, size
        self.dtype, self.device = dtype, torch.device(device)
        self.kernels = (
            best_kernels(heads // kv_heads, dim, size, dtype, self.device) if isinstance(kernels, str) else kernels
        )
        shape = (kv_heads, blocks, size, dim)
        transposed = (kv_heads, blocks, dim, size)
        self.values = [_zeros(shape, dtype, self.device) for _ in range(layers)]
        self.keys = [_zeros(transposed if self.kernels else shape, dtype, self.device) for _ in range(layers)]
        self.pointers = [(k.data_ptr(), v.data_ptr()) for k, v in zip(self.keys, self.values, strict=True)]
        self._cells = (ctypes.c_void_p * (2 * layers))(*itertools.chain(*self.pointers))
        self.cells = ctypes.addressof(self._cells)  # the same, for the kernels

    @classmethod
    def of(cls, model: DecoderLM, *, blocks: int, size: int) -> Pages:
        """What this decoder needs, in its dtype and on its device."""
        config, weight = model.config, next(model.parameters())
        return cls(
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv,
            dim=config.dim,
            blocks=blocks,
            size=size,
            dtype=weight.dtype,
            device=weight.device,
        )

    @staticmethod
    def bytes_per_block(*, layers: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * size * dim * dtype.itemsize

    def attend(self, windows: Sequence[int | None], shares: Sequence[Share]) -> Attend:
        """The policy of a step over these shares, whose blocks are allotted. windows: of each layer, None: no limit."""
        return PagedAttend(self, windows, shares) if self.kernels else TorchAttend(self, windows, shares)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that may hold what is no number, before somebody else gets them: a mask does not stop a NaN."""
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self.device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(1, index, 0)


def best_kernels(group: int, dim: int, size: int, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels that attend over such pages, None where torch has to. group: query heads of a KV head."""
    numbers = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    fit = dim <= MAX_DIM and group <= rows_of_part(dim) and size % CELL == 0
    return kernels.current() if numbers and fit else None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zeroed pages from the system, which hands them out at first use; torch would write them all now.
    bytes_ = int(np.prod(shape)) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(bytes_ + SPARE, dtype=np.uint8))
    return raw[:bytes_].view(dtype).view(shape)
