"""What gpu_kernels.py computes, written out in torch, for any device: what the kernels are held against, and what
stands in for them where there is no GPU. Slow: a loop over tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import explicit_attention, may_attend
from lm.positions import rotate


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    window: int | None,
    tokens: int,
    splits: int = 1,
) -> None:
    """See gpu_kernels.attend_pages."""
    if splits > 1 and tokens > 1:
        raise ValueError(f"{splits} parts of the keys are for tiles of one token, not of {tokens}.")
    for sequence, row, count, position in tiles.tolist():
        if count > tokens:
            raise ValueError(f"a tile has {count} rows; {tokens} were promised at most.")
        total = position + count
        blocks = tables[sequence, : -(-total // keys.shape[2])]
        k, v = (x[:, blocks].flatten(1, 2)[:, :total].transpose(0, 1) for x in (keys, values))  # [S, KV, D]
        seen = torch.arange(total, device=q.device)
        mask = may_attend(seen[position:], seen, window)
        out[row : row + count] = explicit_attention(q[None, row : row + count], k[None], v[None], mask[None])[0][0]


def place(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    heads: int,
    angles: Tensor | None,
    norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """See gpu_kernels.place."""
    kv, dim = keys.shape[0], keys.shape[3]
    q, k, v = qkv.unflatten(1, (-1, dim)).split((heads, kv, kv), dim=1)
    if norms is not None:
        q_norm, k_norm, eps = norms
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if angles is not None:
        table = angles[positions.long()]
        q, k = rotate(q, table), rotate(k, table)
    for pages, x in ((keys, k), (values, v)):
        pages.flatten(1, 2)[:, slots.long()] = x.transpose(0, 1)
    return q.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See gpu_kernels.rms_norm; any leading shape."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def swiglu(both: Tensor) -> Tensor:
    """See gpu_kernels.swiglu."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
