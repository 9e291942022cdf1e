"""Where a token stands: rotary and sinusoidal tables. (Learned positions are an nn.Embedding.)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROWS = 8192  # of a table made at a time: its float64 intermediates stay small


def rotary_table(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> Tensor:
    """Angles for positions 0 ... length-1 (arXiv 2104.09864, eq. 15), as `rotate` wants them: [length, 2, head_dim],
    fp32.

    Component i of the first half turns by position * frequency_i, together with component i of the second half. Row 0
    holds the cosines of both halves, row 1 the sines, negative in the first half. `scaling` is DecoderConfig's
    rope_scaling; yarn's attention factor is in the table, so that q and k carry it each.
    """
    frequency, attention = rotary_frequencies(head_dim, theta, scaling, length)
    frequency = frequency.to(device)
    table = torch.empty(length, 2, head_dim, dtype=torch.float32, device=device)
    for start in range(0, length, ROWS):
        rows = table[start : start + ROWS]
        positions = torch.arange(start, start + len(rows), dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequency)
        cos, sin = angles.cos() * attention, angles.sin() * attention
        rows[:, 0] = torch.cat((cos, cos), dim=1)
        rows[:, 1] = torch.cat((-sin, sin), dim=1)
    return table


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, length: int
) -> tuple[Tensor, float]:
    """Radians a position of each pair of components, fp64 [head_dim / 2], and the factor on q and on k (yarn's).

    `scaling` is complete, as DecoderConfig holds it; `length` is the longest sequence, which `dynamic` scales for.
    Unscaled: theta^(-2i / head_dim).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = theta**-exponents
    if scaling is None:
        return plain, 1.0
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    original = float(scaling.get("original_max_position_embeddings", length))
    if kind == "linear":  # positions are interpolated (arXiv 2306.15595)
        return plain / factor, 1.0
    if kind == "dynamic":
        # The base grows with the length of the sequence ("NTK-aware"). Ours is fixed at the longest sequence, so that
        # a cached key and another request's row stay true; up to the original length nothing is scaled.
        if length <= original or head_dim == 2:
            return plain, 1.0
        stretched = theta * (factor * length / original - (factor - 1)) ** (head_dim / (head_dim - 2))
        return stretched**-exponents, 1.0
    if kind == "llama3":
        # Wavelengths that fit the original context often stay, those that hardly fit once are interpolated, and in
        # between the two are mixed by how often they fit.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        fits = original * plain / (2 * math.pi)
        keep = ((fits - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / factor), 1.0
    return _yarn(plain, theta, scaling, factor, original)


def _yarn(
    plain: Tensor, theta: float, scaling: Mapping[str, Any], factor: float, original: float
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the components between extrapolation and interpolation, and a
    temperature for attention (section 3.3)."""
    head_dim = 2 * len(plain)

    def component(rotations: float) -> float:
        """The component whose wavelength fits the original context this often."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = component(scaling.get("beta_fast", 32)), component(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    ramp = ((torch.arange(len(plain), dtype=torch.float64) - first) / width).clamp(0, 1)
    frequency = plain * (1 - ramp) + plain / factor * ramp

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, over_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(over_all) if mscale and over_all else temperature(1)
    return frequency, float(attention)


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
