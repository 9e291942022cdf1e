"""Matrix products that are fast on a CPU: in training `linear`, in decoding `Packed`.

`F.linear` in fp32 calls MKL, which keeps to its AVX2 path on processors that are not Intel's; torch also ships oneDNN,
whose products are 1.1 to 1.8 times as fast there at training sizes. Its operator is private and knows no gradient, so
it is tried once, and `F.linear` stays the answer wherever it is missing, wrong, or not what was asked for (another
dtype, device, autocast, compile). In bf16 `F.linear` is oneDNN's too; there only weights laid out beforehand gain.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.cpu import pairs_are_slow

FEW_ROWS = 16  # below this many rows the operator's own cost outweighs its speed
PACKED_ROWS = 512  # up to which `Packed` is for


class Linear(nn.Linear):
    """y = x W^T + b, as nn.Linear, through the fastest product that this machine has."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.numel() < FEW_ROWS * x.shape[-1]
        or not onednn_is_usable()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDNNLinear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bare oneDNN product, x [..., in] with weight [out, in] -> [..., out], in their dtype, no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def bf16_is_fast(device: str) -> bool:
    """Whether products in bfloat16 beat float32 on this kind of device ("cuda", "cpu") of this machine."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return True
    tiles, pairs = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    return tiles or (pairs and not pairs_are_slow())


@cache
def onednn_is_usable() -> bool:
    """Whether oneDNN's linear exists here and agrees with F.linear, found out by one small product."""
    try:
        x, weight = torch.arange(512.0).reshape(16, 32) / 512, torch.arange(1024.0).reshape(32, 32) / 1024
        return torch.allclose(product(x, weight), F.linear(x, weight), rtol=1e-4)
    except (AttributeError, RuntimeError):
        return False


@cache
def packing_is_usable(dtype: torch.dtype) -> bool:
    """Whether `Packed` works here in fp32 or bf16, found out by one small product. In bf16 a CPU needs instructions
    for it.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not onednn_is_usable():
        return False
    try:
        x, weight = torch.arange(512).reshape(16, 32) / 512, torch.arange(1024).reshape(32, 32) / 1024
        x, weight = x.to(dtype), weight.to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return torch.allclose(product(x, packed), F.linear(x, weight), rtol=1e-4 if dtype == torch.float32 else 2e-2)
    except (AttributeError, RuntimeError):
        return False


class Packed:
    """Maps of the same x as one product, for decoding: few rows at a time, the same weights again and again.

    The weights are laid out once as oneDNN multiplies them fastest (1.1 times as fast as unpacked at 128 rows, twice at
    4), when first asked for, and again when one of them has changed. That takes their memory once more; `clear` gives
    it back.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was laid out."""
        self.key: list[tuple[int, int]] | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def __deepcopy__(self, memo: object) -> Packed:
        return Packed()  # a copied model's weights lie elsewhere

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """x [..., in], weights [out_i, in], biases [out_i] or None, all or none -> [..., sum of out_i]."""
        key = [(w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights]
        if key != self.key:
            self.bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
            whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
            self.weight = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), PACKED_ROWS)
            self.key = key
        assert self.weight is not None
        return product(x, self.weight, self.bias)


def forget_packed(model: nn.Module) -> None:
    """Give back what the model's `Packed` have laid out: its weights are about to change."""
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Packed):
                held.clear()


def packing_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] is few rows to be multiplied without a gradient, where `Packed` works."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() <= PACKED_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and packing_is_usable(x.dtype)
    )


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = product(gradient, weight.t())
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ x.reshape(-1, x.shape[-1])  # MKL is the faster one for this shape
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db
