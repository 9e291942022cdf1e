"""Triton kernels of the paged decoder on a GPU. `unverified`: run by Triton's interpreter on a CPU and compiled for
sm_80 and sm_90, never on the hardware.

torch brings two attentions that could read pages, and neither serves mixed batches here. Its FlashAttention takes a
block table from torch 2.12 on, and only pages of 256 tokens or a multiple. FlexAttention's decoding kernel is compiled
anew for each batch size, seconds each, and works in tiles as long as a page. The kernel below takes pages of any size
in tiles of its own, is compiled once a model, and can be captured in a CUDA graph: nothing about a batch but its number
of tiles is known when it is launched.

Rows are tokens of many sequences, one after the other, as everywhere in the engine. Keys and values of a layer are
[KV, blocks, size, D] (pages.py), and arithmetic is in fp32 around the products of the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

KEYS = 64  # a tile of keys; of fp32, which no tensor core multiplies exactly, a quarter
SPLITS = 16  # into how many parts the keys of a row are cut at most, so that few rows keep a whole GPU busy
LOG2E = 1.4426950408889634


# What differs from step to step is not specialised on: a variant is compiled for each combination, seconds each.
@triton.jit(do_not_specialize=["window", "splits", "table_row"], do_not_specialize_on_alignment=["tables", "tiles"])
def _attend(
    q, keys, values, tables, tiles, out, parts, peaks, sums,
    scale, q_row, head_stride, block_stride, table_row, window, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One tile of queries, one KV head, one part of the keys. Lane m is query token m // GROUP_P, head m % GROUP_P."""
    tile, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + 4 * tile)
    row = tl.load(tiles + 4 * tile + 1)
    count = tl.load(tiles + 4 * tile + 2)
    position = tl.load(tiles + 4 * tile + 3)

    lane = tl.arange(0, M)
    token, member = lane // GROUP_P, lane % GROUP_P
    real = (token < count) & (member < GROUP)
    head = kv * GROUP + member
    d = tl.arange(0, D_P)
    at = (row + token).to(tl.int64) * q_row + head * D
    query = tl.load(q + at[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    seen_by = position + token

    end = position + count
    first = tl.maximum(position - window + 1, 0) // N * N  # nobody in the tile sees a key before
    span = tl.cdiv(tl.cdiv(end - first, N), splits) * N
    begin = first + part * span
    stop = tl.minimum(begin + span, end)

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D_P], tl.float32)
    base = kv.to(tl.int64) * head_stride
    for start in range(begin, stop, N):
        key = start + tl.arange(0, N)
        inside = key < stop
        block = tl.load(tables + sequence.to(tl.int64) * table_row + key // SIZE, mask=inside, other=0).to(tl.int64)
        cell = base + block * block_stride + (key % SIZE) * D
        k = tl.load(keys + cell[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + cell[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        score = tl.dot(query, k, input_precision="ieee") * scale
        distance = seen_by[:, None] - key[None, :]
        score = tl.where(inside[None, :] & (distance >= 0) & (distance < window), score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen no key yet has no peak
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher

    cell = (row + token).to(tl.int64) * HEADS + head
    if SPLIT:
        cell = cell * MOST + part
        tl.store(parts + cell[:, None] * D + d[None, :], mixed, mask=real[:, None] & (d < D)[None, :])
        tl.store(peaks + cell, peak, mask=real)
        tl.store(sums + cell, total, mask=real)
    else:
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + cell[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty),
            mask=real[:, None] & (d < D)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["tiles"])
def _join(
    tiles, parts, peaks, sums, out, splits,
    HEADS: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head together: each has its own peak, to whose height its sums are."""
    row = tl.load(tiles + 4 * tl.program_id(0) + 1)
    cell = row.to(tl.int64) * HEADS + tl.program_id(1)
    part, d = tl.arange(0, MOST), tl.arange(0, D_P)
    there = part < splits
    peak = tl.load(peaks + cell * MOST + part, mask=there, other=float("-inf"))
    share = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(share * tl.load(sums + cell * MOST + part, mask=there, other=0.0), 0)
    mixed = tl.load(
        parts + (cell * MOST + part)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    )
    tl.store(out + cell * D + d, (tl.sum(mixed * share[:, None], 0) / total).to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _place(
    qkv, q_norm, k_norm, angles, positions, slots, q, keys, values,
    eps, head_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    NORMS: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """One head of one row of qkv [N, (HEADS + 2 KV) D]: normed and rotated, queries to q, keys and values to slots."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D_P)
    there = d < D
    source = qkv + (row * (HEADS + 2 * KV) + head) * D
    x = tl.load(source + d, mask=there, other=0.0).to(tl.float32)
    if head < HEADS + KV:
        across = (d + D // 2) % D  # the other of its pair
        y = tl.load(source + across, mask=there, other=0.0).to(tl.float32)
        if NORMS:
            norm = q_norm if head < HEADS else k_norm
            root = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            x = x * root * tl.load(norm + d, mask=there, other=0.0).to(tl.float32)
            y = y * root * tl.load(norm + across, mask=there, other=0.0).to(tl.float32)
        if ROTATES:
            angle = angles + tl.load(positions + row).to(tl.int64) * 2 * D
            cos = tl.load(angle + d, mask=there, other=0.0).to(tl.float32)
            sin = tl.load(angle + D + d, mask=there, other=0.0).to(tl.float32)
            x = x * cos + y * sin  # lm.positions: the table's sines carry the sign
    x = x.to(q.dtype.element_ty)
    if head < HEADS:
        tl.store(q + (row * HEADS + head) * D + d, x, mask=there)
    else:
        cell = tl.load(slots + row).to(tl.int64) * D
        if head < HEADS + KV:
            tl.store(keys + (head - HEADS).to(tl.int64) * head_stride + cell + d, x, mask=there)
        else:
            tl.store(values + (head - HEADS - KV).to(tl.int64) * head_stride + cell + d, x, mask=there)


@triton.jit
def _norm(x, weight, out, eps, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, WIDTH_P)
    there = at < WIDTH
    value = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    value = value * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gate(both, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < INNER
    gate = tl.load(both + row * 2 * INNER + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * INNER + INNER + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)


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
    """Attention of query tiles over pages, into their rows of `out`.

    q, out [N, H, D], contiguous; keys, values [KV, blocks, size, D] of one layer; tables int32 [sequences, blocks of
    the longest]; tiles int32 [tiles, 4]: a sequence (row of tables), the tile's first row of q, how many rows it has
    (1 to `tokens`), the position of the first. A query sees the keys up to its own position, `window` of them at most.
    With splits (1 to SPLITS) above 1, which single tokens alone can have, the keys of a tile are read in so many parts
    at once.
    """
    if splits > 1 and tokens > 1:
        raise ValueError(f"{splits} parts of the keys are for tiles of one token, not of {tokens}.")
    heads, dim = q.shape[1:]
    kv = keys.shape[0]
    group = heads // kv
    lanes = triton.next_power_of_2(group)
    rows = max(16, triton.next_power_of_2(tokens * lanes))
    split = splits > 1
    parts = peaks = sums = out
    if split:
        parts = torch.empty((*q.shape[:2], SPLITS, dim), dtype=torch.float32, device=q.device)
        peaks, sums = torch.empty((2, *q.shape[:2], SPLITS), dtype=torch.float32, device=q.device)
    _attend[(len(tiles), kv, splits)](
        q, keys, values, tables, tiles, out, parts, peaks, sums,
        dim**-0.5 * LOG2E, q.stride(0), keys.stride(0), keys.stride(1), tables.stride(0),
        2**31 - 1 if window is None else window, splits,
        HEADS=heads, GROUP=group, GROUP_P=lanes, D=dim, D_P=_padded(dim),
        SIZE=keys.shape[2], M=rows, N=KEYS if q.dtype.itemsize == 2 else KEYS // 4, SPLIT=split, MOST=SPLITS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if split:
        _join[(len(tiles), heads)](
            tiles, parts, peaks, sums, out, splits, HEADS=heads, D=dim, D_P=_padded(dim), MOST=SPLITS, num_warps=1
        )


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
    """qkv [N, (H + 2 KV) D] -> q [N, H, D], normed and rotated; keys and values go to the slots of the pages.

    positions and slots int32 [N], slot = block * size + offset. angles: lm.positions' table [context, 2, D], or None
    where nothing is rotated. norms: the per-head RMS norms' weights of q and k [D] and their epsilon, or None.
    """
    kv, dim = keys.shape[0], keys.shape[3]
    q = torch.empty((len(qkv), heads, dim), dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    _place[(len(qkv), heads + 2 * kv)](
        qkv, q_norm, k_norm, qkv if angles is None else angles, positions, slots, q, keys, values,
        eps, keys.stride(0),
        HEADS=heads, KV=kv, D=dim, D_P=_padded(dim), NORMS=norms is not None, ROTATES=angles is not None,
        num_warps=1,
    )  # fmt: skip
    return q


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, width], weight [width] -> [N, width] (arXiv 1910.07467, eq. 4)."""
    out = torch.empty_like(x)
    width = x.shape[1]
    _norm[(len(x),)](x, weight, out, eps, WIDTH=width, WIDTH_P=triton.next_power_of_2(width), num_warps=_warps(width))
    return out


def swiglu(both: Tensor) -> Tensor:
    """Gate and up side by side [N, 2 inner] -> silu(gate) * up [N, inner]."""
    inner = both.shape[1] // 2
    out = torch.empty((len(both), inner), dtype=both.dtype, device=both.device)
    _gate[(len(both), triton.cdiv(inner, 1024))](both, out, INNER=inner, BLOCK=1024, num_warps=4)
    return out


def _padded(dim: int) -> Any:
    return max(16, triton.next_power_of_2(dim))


def _warps(width: int) -> int:
    return max(1, min(8, triton.next_power_of_2(width) // 512))
