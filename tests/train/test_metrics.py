"""metrics.jsonl: every row on disk at once, rewound exactly on a resume, and readable whatever cut it off."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics import FILE, REPLAYED, Metrics, read


def test_rows_are_on_disk_when_log_returns(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.log({"step": 1, "loss": 2.5})
    assert json.loads((tmp_path / FILE).read_text()) == {"step": 1, "loss": 2.5}


@settings(max_examples=60, deadline=None)
@given(written=st.integers(0, 30), every=st.integers(1, 5), resume=st.integers(0, 40), torn=st.booleans())
def test_resume_keeps_rows_up_to_its_step_and_moves_the_rest_aside(
    tmp_path_factory: pytest.TempPathFactory, written: int, every: int, resume: int, torn: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    metrics = Metrics(folder)
    rows = [{"step": step, "loss": 1.0 / step} for step in range(every, written + 1, every)]
    for row in rows:
        metrics.log(row)
    metrics.close()
    if torn:
        with (folder / FILE).open("a") as file:
            file.write('{"step": 99, "lo')
    Metrics(folder, resume).close()
    assert read(folder / FILE) == [row for row in rows if row["step"] <= resume]
    assert read(folder / REPLAYED) == [row for row in rows if row["step"] > resume]
    # Every line that is left is whole, so any reader of JSON lines can take the file.
    assert all(json.loads(line) for line in (folder / FILE).read_text().splitlines())


def test_what_a_full_disk_does_not_take_waits_until_it_does(tmp_path: Path) -> None:
    """A limit on the size of a file is to the one that writes what a full disk is: a part is written, then nothing."""
    metrics = Metrics(tmp_path)
    file = tmp_path / FILE
    metrics.log({"step": 1, "loss": 1.5})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        for step in (2, 3):
            metrics.log({"step": step, "loss": 1.5})
            assert metrics.problem == "File too large"
            assert file.read_bytes() == before  # whole lines only
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    metrics.log({"step": 4, "loss": 1.5})
    assert metrics.problem is None
    assert [row["step"] for row in read(file)] == [1, 2, 3, 4]


def test_a_disk_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither written nor made shorter can the file be; later it can again."""

    def gone(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    metrics = Metrics(tmp_path)
    metrics.log({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", gone)
        patch.setattr(os, "ftruncate", gone)
        metrics.log({"step": 2})
        assert metrics.problem == "Input/output error"
    metrics.log({"step": 3})
    metrics.close()
    assert metrics.problem is None
    assert [row["step"] for row in read(tmp_path / FILE)] == [1, 2, 3]


def test_tensors_and_numpy_scalars_become_numbers_and_nan_becomes_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.log(
        {"step": np.int64(3), "loss": torch.tensor(1.5), "lr": np.float32(0.5), "grad_norm": math.inf, "mfu": None}
    )
    metrics.log({"step": 4, "loss": float("nan")})
    assert read(tmp_path / FILE) == [
        {"step": 3, "loss": 1.5, "lr": 0.5, "grad_norm": None, "mfu": None},
        {"step": 4, "loss": None},
    ]
    assert "NaN" not in (tmp_path / FILE).read_text()


def test_a_row_without_a_step_or_with_a_list_is_refused(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    with pytest.raises(ValueError, match="step"):
        metrics.log({"loss": 1.0})
    with pytest.raises(TypeError, match="list"):
        metrics.log({"step": 1, "loss": [1.0]})
    assert (tmp_path / FILE).read_text() == ""


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) == []
