"""Real processes: a run that is killed, stopped and moved to other ranks is the run that never was.

Each start costs seconds, so one test lives through what several would: killed without warning, asked to stop, finished.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from train import checkpoint
from train.__main__ import main
from train.metrics import read

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "-q"]
ONE = ["--config_file", "configs/accelerate/cpu.yaml"]
# The launcher has no flag for several processes on a CPU; this one starts two, and the trainer keeps them to the CPU.
TWO = ["--multi_gpu", "--num_processes", "2"]
LONG = ["train.steps=160", "checkpoint.every=20"]
Losses = Callable[..., list[float]]


class Launched:
    """`accelerate launch ... -m train` as a process group of its own; all it says is in `log`."""

    def __init__(self, launcher: list[str], recipe: Path, options: list[str], log: Path):
        self.log = log
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*LAUNCH, *launcher, "-m", "train", str(recipe), *options],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def reach(self, run: Path, step: int, seconds: float = 120) -> None:
        """Wait until the run has logged `step`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            rows = read(run / "metrics.jsonl")
            if rows and rows[-1]["step"] >= step:
                return
            time.sleep(0.01)
        pytest.fail(f"step {step} did not come (exit status {self.process.poll()}):\n{self.said()[-3000:]}")

    def trainers(self) -> list[psutil.Process]:
        """The processes that train: the launcher's children."""
        return psutil.Process(self.process.pid).children()

    def end(self, seconds: float = 120) -> int:
        """The exit status, when all of the group's processes have ended."""
        status = self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return status
            time.sleep(0.02)
        pytest.fail("the launcher left processes behind")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(tiny_yaml: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[Launched]]:
    """launch(launcher flags, *overrides): a context in which it runs, and after which nothing of it does."""

    @contextmanager
    def start(launcher: list[str], *overrides: str) -> Iterator[Launched]:
        launched = Launched(launcher, tiny_yaml, [f"run.dir={tmp_path / 'run'}", *overrides], tmp_path / "log")
        try:
            yield launched
        finally:
            with suppress(ProcessLookupError):
                launched.kill()

    return start


def test_killed_stopped_and_continued_is_bit_by_bit_the_run_that_never_was(
    launch, tiny, tmp_path: Path, figures: Losses, capfd: pytest.CaptureFixture
) -> None:
    options = [*LONG, "model.dropout=0.1", "optim.name=muon", "eval.every=50"]
    run = tmp_path / "run"
    with launch(ONE, *options) as killed:
        killed.reach(run, 47)
        killed.kill()
    reached = read(run / "metrics.jsonl")[-1]["step"]
    newest = number_of(checkpoint.checkpoints(run)[0])
    assert 40 <= newest < 160
    assert not (run / "model-last").exists()

    with launch(ONE, *options) as stopped:
        stopped.reach(run, newest + 25)
        (trainer,) = stopped.trainers()
        trainer.send_signal(signal.SIGTERM)
        assert stopped.end() == 0
    assert f"continues at step {newest}" in stopped.said()
    assert "Stopped by a signal at step" in stopped.said()
    newest = number_of(checkpoint.checkpoints(run)[0])
    assert newest < 160
    assert read(run / "metrics.jsonl")[-1]["step"] == newest

    rows, whole = tiny(*options), tiny(*options, name="whole")  # to the end; and without a break
    assert f"continues at step {newest}" in capfd.readouterr().out
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for key in ("loss", "grad_norm", "lr", "validation_loss"):
        assert figures(rows, key) == figures(whole, key), key
    assert max(row["step"] for row in read(run / "metrics.replayed.jsonl")) == reached  # what the kill had cost
    for name in ("model", "model-last"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (run / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_two_processes_learn_what_one_does_and_one_goes_on_where_they_stopped(
    launch, tiny, tmp_path: Path, figures: Losses
) -> None:
    """AdamW, at a rate at which a difference in the last bit does not grow; test_loop says what Muon makes of one."""
    # Of 3 sequences a rank: two micro-batches, of 2 and 1.
    options = [*LONG, "optim.lr=1e-3", "eval.every=50", "train.micro_batch=2"]
    run = tmp_path / "run"
    with launch(TWO, *options) as launched:
        launched.reach(run, 47)
        launched.process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
        launched.end()
    assert "2 process(es)" in launched.said()
    assert "Stopped by a signal at step" in launched.said()
    assert launched.said().count("begins: ") == 1  # one of the two speaks
    together = read(run / "metrics.jsonl")
    assert 47 <= number_of(checkpoint.checkpoints(run)[0]) == together[-1]["step"] < 160

    rows, whole = tiny(*options), tiny(*options, name="whole")  # the same run goes on alone; and alone from the start
    assert rows[: len(together)] == together
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert figures(rows) == pytest.approx(figures(whole), abs=1e-5)
    assert figures(rows, "validation_loss") == pytest.approx(figures(whole, "validation_loss"), abs=1e-5)


def number_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# ------------------------------------------------------------ sentences and exit statuses


def test_a_recipe_that_cannot_go_on_is_exit_2_and_a_sentence_a_key(
    tiny, tiny_yaml: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny("train.steps=4")
    run = tiny.folder / "run"
    capsys.readouterr()
    assert main([str(tiny_yaml), f"run.dir={run}", "train.steps=4", "optim.lr=0.5", "model.layers=1"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(" is ")[0] for line in said.err.splitlines()] == ["model.layers", "optim.lr"]
    assert main([str(tiny_yaml), f"run.dir={run}", "train.stepz=4"]) == 2
    assert "train.stepz" in capsys.readouterr().err


def test_a_launch_that_is_half_set_up_is_refused(tiny_yaml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", str(tiny_yaml), f"run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"WORLD_SIZE": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("launch with a file from configs/accelerate/.\n")
    assert not (tmp_path / "run").exists()
