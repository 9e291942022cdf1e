"""Matrix products for serving: maps of the same x fused, the weights laid out once as they are read.

`FusedLinear` is one call of kernels/linear.c: the norm of the rows, the product, bias, silu(gate) * up, residual. Few
rows are as fast as memory gives the weights, and a row's answer has the same bits whoever shares the product.
`PlainLinear` is torch's product of the fused weights, for where there are no kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

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
        """weights [out_i, in]; biases [out_i], all or none; norm: of x; gated: the weights are those of gate and up;
        out: the answer's dtype, by default the weights'.
        """
        self.inputs = weights[0].shape[1]
        self.outputs = len(weights[0]) if gated else sum(map(len, weights))
        self._out = out or weights[0].dtype
        self._scratch, self._kernel = scratch, kernels.call.heed_linear
        is_bf16 = weights[0].dtype is torch.bfloat16
        # Gate and up alternate block by block, so that both are at hand for the answer.
        matrices = [weight.detach() for weight in weights]
        if not gated and len(matrices) > 1:
            matrices = [torch.cat(matrices)]
        channels = len(matrices) * -(-self.outputs // LANES) * LANES
        self._weight = torch.empty(channels * -(-self.inputs // STEP) * STEP, dtype=weights[0].dtype)
        for i, matrix in enumerate(matrices):
            matrix = matrix.contiguous()
            kernels.call.heed_pack(matrix.data_ptr(), *matrix.shape, is_bf16, self._weight.data_ptr(), i, len(matrices))
        given = [bias.detach().float() for bias in biases if bias is not None]
        self._bias = torch.cat(given) if given else None
        self._norm: list[Tensor] = []
        if norm is not None:
            assert isinstance(norm, (RMSNorm, nn.LayerNorm))
            self._norm = [p.detach().float().contiguous() for p in norm.parameters()]  # weight, then bias if any
        self._map = FloatMap(
            weight=self._weight.data_ptr(),
            bias=pointer(self._bias),
            norm_weight=self._norm[0].data_ptr() if self._norm else None,
            norm_bias=self._norm[1].data_ptr() if len(self._norm) > 1 else None,
            inputs=self.inputs,
            outputs=self.outputs,
            gated=gated,
            centred=isinstance(norm, nn.LayerNorm),
            is_bf16=is_bf16,
            out_is_bf16=self._out is torch.bfloat16,
            eps=0.0 if norm is None else norm.eps,
        )
        self._at = ctypes.addressof(self._map)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in], contiguous, residual [N, out] or None, both in the weights' dtype -> [N, out]."""
        rows = len(x)
        out = x.new_empty(rows, self.outputs, dtype=self._out)
        scratch = self._scratch.at(4 * rows * (self.inputs + 1))
        self._kernel(self._at, x.data_ptr(), pointer(residual), out.data_ptr(), rows, scratch)
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
