"""Scaled dot-product attention (arXiv 1706.03762, section 3.2.1) and the policies that a decoder is given.

A policy is called `attend(layer, q, k, v)` with q [..., H, D], k and v [..., KV, D] (rotated and normed already) and
returns
[..., H, D]. The decoder knows no more of batches, caches or masks than that. Masks are boolean, True = "may attend".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lm import flex

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def may_attend(
    queries: Tensor,
    keys: Tensor,
    window: int | None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """Who may see whom: queries [..., Q] and keys [..., K] are positions -> bool [..., Q, K].

    A key is seen when it is not later than the query, inside the window, and in the same document.
    """
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if query_documents is not None and key_documents is not None:
        mask = mask & (query_documents.unsqueeze(-1) == key_documents.unsqueeze(-2))  # may add a batch dimension
    return mask


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v, written out, in fp32: what every fused path is held against.

    q [B, T, H, D], k and v [B, S, KV, D], mask bool, broadcastable to [B, T, S] -> output [B, T, H, D], weights [B, H,
    T, S]. Query head h reads key head h // (H / KV).
    """
    group = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.float()).to(q.dtype), weights


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same through torch's fused kernels: shapes as above, mask [B or 1, T, S] or None, -> [B, T, H, D].

    dropout: the share of the weights that is left out, in training.
    """
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # In bfloat16 the backward kernel takes three times as long as in float32 there.
        with torch.autocast("cpu", enabled=False):
            return fused_attention(q.float(), k.float(), v.float(), mask, causal, dropout)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class ExplicitAttend:
    """Causal attention over whole sequences [B, T, ...] by the written-out formula; the reference of the tests."""

    def __init__(self, windows: Sequence[int | None], documents: Tensor | None = None):
        self.windows, self.documents = windows, documents

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        mask = may_attend(positions, positions, self.windows[layer], self.documents, self.documents)
        return explicit_attention(q, k, v, mask if mask.dim() == 3 else mask.unsqueeze(0))[0]


class CausalAttend:
    """Causal attention over whole sequences [B, T, ...], fused: what training uses.

    A full layer goes to SDPA's FlashAttention. A window or a document mask goes to FlexAttention on a GPU, which skips
    the blocks that the mask empties, and to SDPA with a dense mask on a CPU. documents: int [B, T], or None.
    """

    def __init__(self, windows: Sequence[int | None], documents: Tensor | None = None):
        self.windows, self.documents = windows, documents
        self.masks: dict[int | None, Tensor | flex.BlockMask] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, window = q.shape[1], self.windows[layer]
        if window is not None and window >= length:
            window = None
        if window is None and self.documents is None:
            return fused_attention(q, k, v, None, causal=True)
        if window not in self.masks:
            self.masks[window] = self._mask(q, length, window)
        mask = self.masks[window]
        if isinstance(mask, Tensor):
            return fused_attention(q, k, v, mask)
        return flex.flex_causal_attention(q, k, v, mask)

    def _mask(self, q: Tensor, length: int, window: int | None) -> Tensor | flex.BlockMask:
        if q.is_cuda:
            return flex.block_mask(q.shape[0], length, window, self.documents, q.device)
        positions = torch.arange(length, device=q.device)
        mask = may_attend(positions, positions, window, self.documents, self.documents)
        return mask if mask.dim() == 3 else mask.unsqueeze(0)
