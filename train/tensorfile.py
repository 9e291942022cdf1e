"""A safetensors file written from tensors where they lie: no copy of them all, little processor time, and a checksum.

safetensors' own `save_file` copies every tensor to bytes first, and a write through the page cache costs the processor
more than a second for each gigabyte, which a training run on a CPU has no use for. Here the file passes in pieces
through one aligned buffer, which the disk reads itself (O_DIRECT) where the file system can do that. Copying, summing
and writing a piece release Python's lock: a thread that writes leaves the training thread alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PIECE = 4 << 20  # bytes of a write, and of a sum
BLOCK = 4096  # O_DIRECT writes whole blocks
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors to a new file and return its bytes and its checksum. Not yet synced. Raises OSError."""
    arrays = [_header(tensors), *(_bytes(tensors[name]) for name in _order(tensors))]
    size = sum(array.size for array in arrays)
    sums = hashlib.blake2b(digest_size=16)
    memory = mmap.mmap(-1, PIECE)  # on a page's boundary, as O_DIRECT wants it
    buffer = np.frombuffer(memory, dtype=np.uint8)
    file = _open(path)
    try:
        for filled in _pieces(arrays, buffer):
            length = -(-filled // BLOCK) * BLOCK
            buffer[filled:length] = 0
            sums.update(_sum(buffer[:length]))
            _write_all(file, memoryview(memory)[:length])
        os.ftruncate(file, size)  # the last block was a whole one
    finally:
        os.close(file)
    return size, sums.hexdigest()


def checksum(path: Path) -> tuple[int, str]:
    """The bytes and the checksum of a file as it is. Raises OSError."""
    sums, size = hashlib.blake2b(digest_size=16), 0
    buffer = np.empty(PIECE, dtype=np.uint8)
    with open(path, "rb", buffering=0) as file:
        while filled := _read_piece(file.fileno(), buffer):
            length = -(-filled // BLOCK) * BLOCK
            buffer[filled:length] = 0
            sums.update(_sum(buffer[:length]))
            size += filled
    return size, sums.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _order(tensors: dict[str, Tensor]) -> list[str]:
    """Wide types first, as the format's alignment wants them."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: dict[str, Tensor]) -> np.ndarray:
    """The length of the header, eight bytes, and the header: JSON with each tensor's type, shape and place."""
    table, place = {}, 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _pieces(arrays: list[np.ndarray], buffer: np.ndarray) -> Iterator[int]:
    """Fill `buffer` with what follows in `arrays`, again and again; how many bytes it holds each time."""
    filled = 0
    for array in arrays:
        done = 0
        while done < array.size:
            count = min(array.size - done, buffer.size - filled)
            np.copyto(buffer[filled : filled + count], array[done : done + count])
            done, filled = done + count, filled + count
            if filled == buffer.size:
                yield filled
                filled = 0
    if filled:
        yield filled


def _sum(piece: np.ndarray) -> bytes:
    """The piece's 64-bit words added up, modulo 2**64: as fast as memory, and no changed bit escapes it."""
    return int(np.add.reduce(piece.view(np.uint64))).to_bytes(8, "little")


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:  # a file system that knows no O_DIRECT
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_all(file: int, piece: memoryview) -> None:
    while piece:
        try:
            written = os.write(file, piece)
        except OSError as error:  # blocks of another size than ours, or the odd rest of a short write
            direct = getattr(os, "O_DIRECT", 0)
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & direct:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~direct)
            continue
        piece = piece[written:]


def _read_piece(file: int, buffer: np.ndarray) -> int:
    """Fill the buffer as far as the file goes; how many bytes it holds."""
    filled, view = 0, memoryview(buffer.data)
    while filled < len(view) and (count := os.readv(file, [view[filled:]])):
        filled += count
    return filled
