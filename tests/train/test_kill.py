"""Killed without warning, some times while a checkpoint was being written: the run is the one that never was."""

from __future__ import annotations

from pathlib import Path

from bench.kill import killed
from train.checkpoint import checkpoints, verify


def test_killed_at_random_moments_it_is_bit_by_bit_the_run_never_killed(tmp_path: Path) -> None:
    found = killed(tmp_path, kills=4, seed=3)
    assert found.differences == []
    assert len(found.killed_at) == 4
    assert found.while_writing >= 1
    assert all(to <= at for at, to in zip(found.killed_at, found.resumed_from, strict=True))
    for folder in checkpoints(tmp_path / "killed"):
        verify(folder)
    assert not list((tmp_path / "killed").rglob(".*"))  # nothing half written is left
