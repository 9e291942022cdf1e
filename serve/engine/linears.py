"""Matrix products for serving: weights fused and laid out once, as this machine multiplies them fastest.

On a CPU that is oneDNN's packed linear (twice to four times as fast as F.linear at few rows). A row of its answer has
the same bits whoever shares the product, as long as there are two rows or more (one alone is summed in another order
at some sizes): so a single row is multiplied twice. Where packing is not to be had (bfloat16 on a CPU without its
instructions, float16), products are F.linear's, fused all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.linear import packing_is_usable

ROWS = 16  # what oneDNN is told to lay the weights out for; it multiplies any number


class PackedLinear:
    """Maps of the same x as one product: y = x [W_1; W_2; ...]^T + [b_1; b_2; ...] (+ residual).

    Packed, the weights are copied: who drops the originals has their memory back.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        """weights [out_i, in]; biases [out_i], all or none."""
        weight = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
        given = [bias.detach() for bias in biases if bias is not None]
        self.outputs = len(weight)
        self.bias = torch.cat(given) if given else None
        self.packed = weight.device.type == "cpu" and packing_is_usable(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.packed else weight
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._product_and_sum = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in], residual [N, out] or None -> [N, out]."""
        rows = len(x)
        if not self.packed or rows == 0:
            return self._plain(x, residual)
        if rows == 1:
            x = torch.cat((x, x))
            residual = None if residual is None else torch.cat((residual, residual))
        if residual is None:
            out = self._product(x, self.weight, self.bias, "none", [], "")
        else:
            out = self._product_and_sum(x, residual, self.weight, self.bias, "add")
        return out[:1] if rows == 1 else out

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if len(x) == 0:
            return x.new_empty(0, self.outputs)
        out = F.linear(x, self.weight, self.bias)
        return out if residual is None else residual + out
