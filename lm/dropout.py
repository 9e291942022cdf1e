"""Dropout whose mask is cheap on a CPU: there torch draws one number after another, an element each, which was a sixth
of a small Transformer's training step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 16  # the probability is rounded to a multiple of 1 / LEVELS


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x with each element 0 with probability p, else times 1 / (1 - p); x itself outside training (Srivastava et al.
    2014). Drawn from torch's generator.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or p >= 1 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        # Four elements for each 64 bits that are drawn.
        drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        levels = drawn.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (levels >= round(p * LEVELS) - LEVELS // 2).to(x.dtype).mul_(1 / (1 - p))
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return gradient * kept, None
