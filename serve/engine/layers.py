"""All blocks of a served decoder in one call of kernels/decoder.c: a step has some dozens of layers, and a call from
Python for each operation of each would cost a tenth of its time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm.config import ACTIVATIONS, DecoderConfig
from serve.engine.elementwise import pointer
from serve.engine.kernels import Kernels
from serve.engine.linears import FusedLinear, Scratch
from serve.engine.paged import PagedAttend
from serve.engine.quantize import Int8Linear

if TYPE_CHECKING:
    from serve.engine.served import ServedBlock


class Block(ctypes.Structure):
    """What heed_decode is told of a block, as decoder.c has it."""

    _fields_ = (
        ("qkv", c_void_p),
        ("o", c_void_p),
        ("inner", c_void_p),
        ("down", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rotates", c_int64),
        ("window", c_int64),
    )


class Decoder(ctypes.Structure):
    """And of all of them."""

    _fields_ = (
        ("blocks", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("inner", c_int64),
        ("activation", c_int64),
        ("is_int8", c_int64),
        ("is_bf16", c_int64),
        ("eps", c_float),
    )


class Layers:
    """The blocks of a decoder, one after the other, over paged attention: the same numbers as they give one by one."""

    def __init__(
        self,
        blocks: Sequence[ServedBlock],
        config: DecoderConfig,
        kernels: Kernels,
        scratch: Scratch,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of x."""
        told: list[Block] = []
        maps: list[FusedLinear | Int8Linear] = []
        for block, window in zip(blocks, config.windows(), strict=True):
            for one in (block.qkv, block.o, block.inner, block.down):
                assert isinstance(one, (FusedLinear, Int8Linear))  # with kernels they are
                maps.append(one)
            qkv, o, inner, down = (one.at for one in maps[-4:])
            told.append(Block(qkv, o, inner, down, *block.rotate.pointers, block.rotate.rotates, window or 0))
        self._blocks = (Block * len(told))(*told)
        self._heads, self._row, self._inner = config.heads, (config.heads + 2 * config.kv) * config.dim, config.inner
        self._decoder = Decoder(
            blocks=ctypes.addressof(self._blocks),
            count=len(told),
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv,
            dim=config.dim,
            inner=config.inner,
            activation=0 if config.activation == "swiglu" else ACTIVATIONS.index(config.activation),
            is_int8=isinstance(maps[0], Int8Linear),
            is_bf16=dtype is torch.bfloat16,
            eps=config.norm_eps if config.qk_norm else 0.0,
        )
        self._at = ctypes.addressof(self._decoder)
        self._mixed = config.heads * config.dim
        self._bytes = max(one.bytes for one in maps)  # of scratch, a row
        self._scratch, self._kernel = scratch, kernels.call.heed_decode

    def __call__(
        self, x: Tensor, table: Tensor | None, attend: PagedAttend, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [N, width], overwritten; table fp32 [N, 2, D], contiguous, or None -> what leaves the last block, and what
        its attention gives, [N, H * D].

        With wanted, int64 [M], the first is computed for these rows alone, [M, width], and x is left as it enters that
        block. Raises TypeError where the pages are of another dtype.
        """
        if x.dtype is not attend.pages.dtype:
            raise TypeError(f"Pages of {attend.pages.dtype} cannot take {x.dtype}.")
        rows = len(x)
        last = x if wanted is None else x.new_empty(len(wanted), x.shape[1])
        qkv, mixed, inner = (x.new_empty(rows, width) for width in (self._row, self._mixed, self._inner))
        self._kernel(
            self._at,
            attend.step,
            attend.pages.cells,
            x.data_ptr(),
            pointer(table),
            rows,
            qkv.data_ptr(),
            mixed.data_ptr(),
            inner.data_ptr(),
            self._scratch.at(rows * self._bytes),
            pointer(wanted),
            -1 if wanted is None else len(wanted),
            last.data_ptr(),
        )
        return last, mixed
