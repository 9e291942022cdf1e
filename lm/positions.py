"""Where a token stands: rotary and sinusoidal tables. (Learned positions are an nn.Embedding.)"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Angles for positions 0 ... length-1 (arXiv 2104.09864, eq. 15), as `rotate` wants them: [length, 2, head_dim],
    fp32.

    Component i of the first half turns by position / theta^(2i / head_dim), together with component i of the second
    half. Row 0 holds the cosines of both halves, row 1 the sines, negative in the first half.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by its angle; Llama's pairing of the two halves.

    x [..., heads, d], table [..., 2, d] with x's leading shape (or one that broadcasts to it) -> [..., heads, d].
    """
    cos, sin = table.to(x.dtype).unsqueeze(-3).unbind(-2)  # each [..., 1, d]
    if torch.compiler.is_compiling() or not x.requires_grad:
        return _turn(x, cos, sin, 1)
    return _Rotation.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin): x cos + (halves swapped) (-sin, sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, value=direction)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the angles is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1), None, None


def sinusoidal_table(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / width)), PE(pos, 2i+1) = cos(the same): [length, width], fp32 (arXiv
    1706.03762, 3.5).
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
