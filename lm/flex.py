"""FlexAttention for windows and document masks on a GPU. `unverified`: it has run on a CPU only, against the explicit
formula.

The kernel is compiled once for a shape; the block masks are built from index functions, so that no [T, T] mask exists.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def block_mask(
    batch: int, length: int, window: int | None, documents: Tensor | None, device: torch.device
) -> BlockMask:
    """Causal, within `window`, within one document (documents int [B, T]), as FlexAttention's sparse block mask."""

    def seen(b, h, query, key):
        inside = query >= key
        if window is not None:
            inside = inside & (query - key < window)
        if documents is not None:
            inside = inside & (documents[b, query] == documents[b, key])
        return inside

    create = _compiled()[1] if device.type == "cuda" else create_block_mask
    return create(
        seen, B=batch if documents is not None else None, H=None, Q_LEN=length, KV_LEN=length, device=device.type
    )


def flex_causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q [B, T, H, D], k and v [B, T, KV, D] -> [B, T, H, D]."""
    attend = _compiled()[0] if q.is_cuda else flex_attention
    out = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)
