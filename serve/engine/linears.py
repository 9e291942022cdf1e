"""Matrix products for serving: maps of the same x fused, the weights laid out once as they are read.

`FusedLinear` is one call of kernels/linear.c: the norm of the rows, the product, bias, silu(gate) * up, residual. Few
rows are as fast as memory gives the weights, and a row's answer has the same bits whoever shares the product.
`PlainLinear` is torch's product of the fused weights, for where there are no kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.layers import RMSNorm
from serve.engine.elementwise import pointer
from serve.engine.kernels import Kernels

LANES = 16  # a multiple of every variant's: the output channels of a block
STEP = 2  # likewise: inputs that lie together


class FloatMap(ctypes.Structure):
    """What heed_linear is told of a map, as linear.c has it."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("gated", c_int64),
        ("centred", c_int64),
        ("is_bf16", c_int64),
        ("out_is_bf16", c_int64),
        ("eps", c_float),
    )


class Scratch:
    """Memory for the rows of one product at a time; grows."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def at(self, bytes_: int) -> int:
        if len(self._memory) < bytes_:
            self._memory = torch.empty(bytes_, dtype=torch.uint8)
        return self._memory.data_ptr()


class Fused:
    """What a fused map is told once, in whatever numbers it multiplies."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm: nn.Module | None,
        gated: bool,
        out: torch.dtype | None,
    ) -> None:
        """weights [out_i, in]; biases [out_i], all or none; norm: of x; gated: the weights are those of gate and up,
        and the answer is silu(gate) * up; out: the answer's dtype, by default the weights'.
        """
        self.inputs = weights[0].shape[1]
        self.outputs = len(weights[0]) if gated else sum(map(len, weights))
        self.out = out or weights[0].dtype
        # Gate and up alternate block by block, so that both are at hand for the answer.
        matrices = [weight.detach() for weight in weights]
        if not gated and len(matrices) > 1:
            matrices = [torch.cat(matrices)]
        self.matrices = [matrix.contiguous() for matrix in matrices]
        self.channels = len(matrices) * -(-self.outputs // LANES) * LANES
        given = [bias.detach().float() for bias in biases if bias is not None]
        self.bias = torch.cat(given) if given else None
        self.norm: list[Tensor] = []
        if norm is not None:
            assert isinstance(norm, (RMSNorm, nn.LayerNorm))
            self.norm = [p.detach().float().contiguous() for p in norm.parameters()]  # weight, then bias if any
        self.fields: dict[str, Any] = {  # of its structure in C
            "bias": pointer(self.bias),
            "norm_weight": self.norm[0].data_ptr() if self.norm else None,
            "norm_bias": self.norm[1].data_ptr() if len(self.norm) > 1 else None,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "gated": gated,
            "centred": isinstance(norm, nn.LayerNorm),
            "eps": 0.0 if norm is None else norm.eps,
        }


class FusedLinear:
    """y = norm(x) [W_1; W_2; ...]^T + [b_1; b_2; ...] (+ residual), or of gate and up silu(gate) * up.

    The weights, float32 or bfloat16, are copied: who drops the originals has their memory back.
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
        """As Fused."""
        told, dtype = Fused(weights, biases, norm, gated, out), weights[0].dtype
        is_bf16 = dtype is torch.bfloat16
        # A step more: a variant may keep a scale for each channel.
        self._weight = torch.empty(told.channels * (-(-told.inputs // STEP) + 1) * STEP, dtype=dtype)
        for i, matrix in enumerate(told.matrices):
            kernels.call.heed_pack(
                matrix.data_ptr(), *matrix.shape, is_bf16, self._weight.data_ptr(), i, len(told.matrices)
            )
        self._map = FloatMap(
            weight=self._weight.data_ptr(), is_bf16=is_bf16, out_is_bf16=told.out is torch.bfloat16, **told.fields
        )
        self.at = ctypes.addressof(self._map)
        self.bytes = 4 * (told.inputs + 1)  # of scratch, a row
        self._kept = (told.bias, told.norm)  # the map points at them
        self._outputs, self._out = told.outputs, told.out
        self._scratch, self._kernel = scratch, kernels.call.heed_linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in], contiguous, residual [N, out] or None, both in the weights' dtype -> [N, out]."""
        rows = len(x)
        out = x.new_empty(rows, self._outputs, dtype=self._out)
        scratch = self._scratch.at(rows * self.bytes)
        self._kernel(self.at, x.data_ptr(), pointer(residual), out.data_ptr(), rows, scratch)
        return out


class PlainLinear:
    """y = x [W_1; W_2; ...]^T + [b_1; b_2; ...] (+ residual), by torch."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        """weights [out_i, in]; biases [out_i], all or none. Several are copied, one is not."""
        self.weight = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
        given = [bias.detach() for bias in biases if bias is not None]
        self.bias = torch.cat(given) if given else None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in], residual [N, out] or None -> [N, out]."""
        out = F.linear(x, self.weight, self.bias)
        return out if residual is None else residual + out
