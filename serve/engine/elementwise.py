"""What lies between the products and the attention of a block, through the C kernels where there are some.

Each class takes over a part of lm's block: a norm, the rotation, the activation. Without kernels, and in a dtype or on
a device that they do not know, it calls lm's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import ACTIVATIONS
from lm.decoder import Attention
from lm.layers import RMSNorm, squared_relu
from lm.positions import rotate
from serve.engine.kernels import Kernels


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Norm(nn.Module):
    """lm's RMSNorm or LayerNorm. x [..., width], contiguous -> the same shape and dtype."""

    def __init__(self, module: nn.Module, kernels: Kernels | None):
        super().__init__()
        assert isinstance(module, (RMSNorm, nn.LayerNorm))
        self.module = module
        self.eps, self.centred = module.eps, int(isinstance(module, nn.LayerNorm))
        self.weight = module.weight.detach().float().contiguous()
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self._kernel = kernels.call.heed_norm if kernels else None
        self._arguments = (self.weight.data_ptr(), pointer(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            return self.module(x)
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._kernel(
            x.data_ptr(),
            out.data_ptr(),
            *self._arguments,
            x.numel() // width,
            width,
            self.eps,
            self.centred,
            x.dtype is torch.bfloat16,
        )
        return out


class Rotation:
    """The norm of each head of q and k, where the model has it, and the rotation; in place."""

    def __init__(self, attention: Attention, heads: int, kv_heads: int, rotates: bool, kernels: Kernels | None):
        self.heads, self.kv_heads, self.dim, self.rotates = heads, kv_heads, attention.dim, rotates
        self.norms = (attention.q_norm, attention.k_norm) if attention.qk_norm else None
        self._weights = [norm.weight.detach().float().contiguous() for norm in self.norms or ()]
        self.pointers: list[int | None] = [*map(pointer, self._weights)] or [None, None]
        self._eps = attention.q_norm.eps if attention.qk_norm else 0.0
        self._kernel = kernels.call.heed_rotate if kernels else None

    def __call__(self, qkv: Tensor, table: Tensor | None) -> None:
        """qkv [N, (H + 2 KV) * D], the heads of q, of k, of v; table fp32 [..., 2, D] for the N rows, contiguous, or
        None.
        """
        if not self.rotates:
            table = None
        if table is None and self.norms is None:
            return
        if self._kernel is None:
            self._in_torch(qkv, table)
            return
        rows, width = qkv.shape
        self._kernel(
            qkv.data_ptr(),
            pointer(table),
            *self.pointers,
            rows,
            width,
            self.heads,
            self.kv_heads,
            self.dim,
            self._eps,
            qkv.dtype is torch.bfloat16,
        )

    def _in_torch(self, qkv: Tensor, table: Tensor | None) -> None:
        table = None if table is None else table.view(len(qkv), 2, self.dim)
        parts = qkv.view(len(qkv), -1, self.dim).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        for i in range(2):
            part = parts[i] if self.norms is None else self.norms[i](parts[i])
            parts[i].copy_(part if table is None else rotate(part, table))


class Activation:
    """lm's MLP between its matrices: x [N, inner], of SwiGLU [N, gate | up] -> [N, inner], in x's dtype. SwiGLU
    has no kernel here: with kernels it is part of the product before it.
    """

    def __init__(self, name: str, inner: int, kernels: Kernels | None):
        self.name, self.inner = name, inner
        self._kind = ACTIVATIONS.index(name)  # the C file has the same order
        self._kernel = kernels.call.heed_activate if kernels and name != "swiglu" else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            return self._in_torch(x)
        out = x.new_empty(len(x), self.inner)
        self._kernel(x.data_ptr(), out.data_ptr(), len(x), self.inner, self._kind, x.dtype is torch.bfloat16)
        return out

    def _in_torch(self, x: Tensor) -> Tensor:
        if self.name == "swiglu":
            gate, up = x.split(self.inner, dim=-1)
            return F.silu(gate) * up
        if self.name == "relu2":
            return squared_relu(x)
        return F.gelu(x, approximate="tanh" if self.name == "gelu_tanh" else "none")


def softcap(logits: Tensor, cap: float, kernels: Kernels | None) -> Tensor:
    """cap tanh(logits / cap), fp32."""
    logits = logits.float().contiguous()
    if kernels is None:
        return cap * torch.tanh(logits / cap)
    kernels.call.heed_softcap(logits.data_ptr(), logits.numel(), cap)
    return logits


def kernels_for(dtype: torch.dtype, device: torch.device, kernels: Kernels | None) -> Kernels | None:
    """`kernels`, where they know this dtype and device."""
    known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return kernels if known else None
