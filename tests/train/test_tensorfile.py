"""Our own writer of safetensors files: what the format's library reads back, whatever the tensors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from train import tensorfile

SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=8), st.tuples(SHAPES, st.sampled_from(list(tensorfile.DTYPES))), max_size=6))
def test_the_library_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, table: dict) -> None:
    table.pop("__metadata__", None)
    tensors = {name: (torch.rand(shape) * 100).to(dtype) for name, (shape, dtype) in table.items()}
    file = tmp_path_factory.mktemp("file") / "tensors.safetensors"
    size, checksum = tensorfile.write(file, tensors)
    assert (size, checksum) == tensorfile.checksum(file)
    assert size == file.stat().st_size
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_pieces_end_where_they_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE", 4096)
    for count in (1, 1000, 1024, 5000):
        tensors = {
            "odd": torch.arange(count, dtype=torch.uint8),
            "wide": torch.randn(count),
            "turned": torch.rand(9, 5).T,
        }
        file = tmp_path / f"{count}.safetensors"
        assert tensorfile.write(file, tensors) == tensorfile.checksum(file)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(file).items())


def test_a_file_system_without_direct_writes_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One refuses such a file at once, another its first write."""
    tensors = {"a": torch.randn(5000)}
    expected = tensorfile.write(tmp_path / "direct", tensors)
    opened, written = os.open, os.write

    def refuses(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuses)
    assert tensorfile.write(tmp_path / "plain", tensors) == expected
    monkeypatch.undo()

    first = [True]

    def fails(file: int, piece: memoryview) -> int:
        if first.pop() if first else False:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(file, piece)

    monkeypatch.setattr(os, "write", fails)
    assert tensorfile.write(tmp_path / "late", tensors) == expected
    assert (tmp_path / "late").read_bytes() == (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()
