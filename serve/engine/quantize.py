"""int8: weights rounded once, a scale for each output channel; rows as they come, a scale for each 32 inputs of a row.

    y[n, o] = t_o sum_p s_np sum_(i in piece p) x[n, i] w[o, i],    x and w in -127 ... 127, s and t = absmax / 127

The sum of a piece is exact in int32 and the pieces are added in order, so a row's answer has the same bits whoever
shares the product; and since no scale spans two rows, nobody's answer depends on a neighbour. A row has a few large
numbers; with one scale for all of it the others would be left with too few steps. kernels/int8.c does it, with all that
stands around the product in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor, nn

from serve.engine.elementwise import pointer
from serve.engine.kernels import Kernels
from serve.engine.linears import Fused, Scratch

STEP = 4  # a multiple of every variant's: inputs that lie together
PIECE = 32  # inputs of a row that share a scale


class Map(ctypes.Structure):
    """What heed_int8_linear is told of a map, as int8.c has it."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("gated", c_int64),
        ("centred", c_int64),
        ("eps", c_float),
    )


class Int8Linear:
    """Maps of the same x as one product of int8 numbers, with what stands before and after it.

    The weights are copied: who drops the originals has their memory back.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        kernels: Kernels,
        scratch: Scratch,
        *,
        norm: nn.Module | None = None,
        gated: bool = False,
        out: torch.dtype | None = None,
    ) -> None:
        """As serve.engine.linears.Fused."""
        told = Fused(weights, biases, norm, gated, out)
        self._weight = torch.empty(told.channels * -(-told.inputs // STEP) * STEP, dtype=torch.uint8)
        self._scales = torch.empty(told.channels)
        for i, matrix in enumerate(told.matrices):
            kernels.call.heed_int8_pack(
                matrix.data_ptr(),
                *matrix.shape,
                matrix.dtype is torch.bfloat16,
                self._weight.data_ptr(),
                self._scales.data_ptr(),
                i,
                len(told.matrices),
            )
        self._map = Map(weight=self._weight.data_ptr(), scales=self._scales.data_ptr(), **told.fields)
        self.at = ctypes.addressof(self._map)
        self._kept = (told.bias, told.norm)  # the map points at them
        self.bytes = 2 * (told.inputs + STEP) + 8 * -(-told.inputs // PIECE)  # of scratch, a row
        self._outputs, self._out = told.outputs, told.out
        self._scratch, self._kernel = scratch, kernels.call.heed_int8_linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in], contiguous, residual [N, out] or None, both in the weights' dtype -> [N, out]."""
        rows = len(x)
        out = x.new_empty(rows, self._outputs, dtype=self._out)
        self._kernel(
            self.at,
            x.data_ptr(),
            pointer(residual),
            out.data_ptr(),
            rows,
            self._scratch.at(rows * self.bytes),
            x.dtype is torch.bfloat16,
            self._out is torch.bfloat16,
        )
        return out


def refusal(device: str, kernels: Kernels | None, *, whole: bool) -> str | None:
    """Why --quantization int8 is not to be had: one sentence, or None. whole: the model reads its prompt as a whole."""
    if whole:
        return "--quantization int8 is for decoder-only models; leave it out for this one."
    if device != "cpu":
        return "--quantization int8 is for CPUs, and would be slower on this device; leave it out."
    if kernels is None or kernels.variant == "portable":
        return (
            "--quantization int8 would be slower here: it needs the compiled kernels and a CPU with AVX2 or better; "
            "leave it out."
        )
    return None
