"""One command at a time in a folder, and no lock that outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.config import RecipeError
from train.live import Live

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from train.live import Live
with Live(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process, which holds RUN until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_live_folder_is_refused_with_its_holder(holder: subprocess.Popen, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RecipeError) as refused:
        Live(run)
    (sentence,) = refused.value.problems
    assert sentence.startswith(f"{run} is in use: process {holder.pid} on ")
    assert holder.poll() is None


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_however_its_holder_ends_the_folder_is_free(how: str, holder: subprocess.Popen, tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder.send_signal(signal.SIGKILL) if how == "killed" else holder.communicate()
    holder.wait()
    if how == "killed":
        (run / "something").touch()
    with Live(run):
        assert f"process {os.getpid()} on " in (run / "live").read_text()
    assert not (run / "live").exists()
    assert run.exists() == (how == "killed")  # one that stayed empty goes again


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(5)]
    said = [process.stdout.readline() for process in processes if process.stdout]
    assert sorted(said) == [""] * 4 + ["held\n"]
    (holder,) = [process for process, line in zip(processes, said, strict=True) if line]
    for process in processes:
        _, problem = process.communicate()
        assert process is holder or f"is in use: process {holder.pid} on " in problem
    assert not (run / "live").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError) as refused:
        Live(tmp_path / "file" / "run")
    assert refused.value.problems[0].startswith(f"run.dir is {tmp_path / 'file' / 'run'}, and it cannot be written (")
