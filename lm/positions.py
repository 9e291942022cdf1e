"""Where a token stands: rotary and sinusoidal tables. (Learned positions are an nn.Embedding.)"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Angles for positions 0 ... length-1, as cos beside sin: [length, 2, head_dim / 2], fp32 (arXiv 2104.09864, eq. 15).

    Component i turns by position / theta^(2i / head_dim).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by its angle; Llama's pairing of the two halves.

    x [..., heads, d], table [..., 2, d/2] with x's leading shape (or one that broadcasts to it) -> [..., heads, d].
    """
    if torch.compiler.is_compiling() or not x.requires_grad:
        return _turn(x, table, forward=True)
    return _Rotation.apply(x, table)


def _turn(x: Tensor, table: Tensor, forward: bool) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = table.to(x.dtype).unsqueeze(-3).unbind(-2)  # each [..., 1, d/2]
    a, b = x[..., :half], x[..., half:]
    if forward:
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the angles is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table, forward=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (table,) = ctx.saved_tensors
        return _turn(gradient, table, forward=False), None


def sinusoidal_table(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / width)), PE(pos, 2i+1) = cos(the same): [length, width], fp32 (arXiv 1706.03762, 3.5)."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()

