"""The parts between attention and attention: normalisation and the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import DecoderConfig
from lm.linear import Linear


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4), computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in x's dtype; under autocast in its, to which the next product casts."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight.float(), self.eps, dtype)
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in few passes over memory: eager torch on a CPU would take ten for the forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        unit = x * rstd
        product = gradient * unit
        dw = product.reshape(-1, width).sum(0)
        # d/dx = rstd * (g w - unit * mean(g w unit)); the mean is one product with the weight
        mean = (product @ weight).unsqueeze(-1).div_(-width)
        dx = (gradient * weight).addcmul_(unit, mean).mul_(rstd).to(x.dtype)
        return dx, dw, None, None


def make_norm(config: DecoderConfig, width: int | None = None) -> nn.Module:
    """The norm that `config` names, over `width` (default: the residual stream's)."""
    width = config.width if width is None else width
    if config.norm == "rms":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.has_bias("norm"))


class MLP(nn.Module):
    """The position-wise network: SwiGLU down(silu(gate(x)) * up(x)), or down(f(up(x))) with f GELU or squared ReLU."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.activation = config.activation
        self.up_proj = Linear(config.width, config.inner, bias=config.has_bias("mlp"))
        if config.activation == "swiglu":
            self.gate_proj = Linear(config.width, config.inner, bias=config.has_bias("mlp"))
        self.down_proj = Linear(config.inner, config.width, bias=config.has_bias("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if self.activation == "swiglu":
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        elif self.activation == "relu2":
            inner = squared_relu(self.up_proj(x))
        else:
            inner = F.gelu(self.up_proj(x), approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down_proj(inner)


def squared_relu(x: Tensor) -> Tensor:
    """max(0, x)^2 (arXiv 2109.08668), elementwise."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return F.relu(x).square()
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """Its slope 2 max(0, x) needs nothing but the rectified input: two passes, where autograd would take five."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (rectified,) = ctx.saved_tensors
        return (gradient * rectified).mul_(2)
