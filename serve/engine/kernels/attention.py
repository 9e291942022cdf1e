"""What attention is told, field by field as team.h has it, and its limits."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

CELL = 16  # neighbouring keys that are loaded together: blocks are a multiple of it
MAX_DIM = 256  # of a head
TILE = 6  # queries that share the registers that hold keys and values, on most processors
PART_NUMBERS = 12288  # query numbers that a part may have: rows times the dimension, rounded up to a cell


def rows_of_part(dim: int) -> int:
    """Queries that a part may have: tokens times the heads that share a KV head."""
    return PART_NUMBERS // (-(-dim // CELL) * CELL)


class Step(ctypes.Structure):
    """What the layers of a step have in common. part: int64 [parts, 4]; tables: int32."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("size", c_int64),
        ("blocks", c_int64),
        ("is_bf16", c_int64),
        ("parts", c_int64),
        ("threads", c_int64),
        ("part", c_void_p),
        ("tables", c_void_p),
    )


class Layer(ctypes.Structure):
    """Pointers to a layer's tensors, and the strides between rows of q, k and v, in numbers. window: 0 for none."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("window", c_int64),
    )
