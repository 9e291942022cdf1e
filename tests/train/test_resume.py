"""Real processes: a run that is stopped in every way and moved to other ranks is the run that never was.

Each start costs seconds, so one test lives through what several would. test_kill.py has those that are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from train import checkpoint
from train.__main__ import main
from train.live import Live
from train.metrics import read

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "-q"]
ONE = ["--config_file", "configs/accelerate/cpu.yaml"]
TWO = ["--config_file", "configs/accelerate/cpus.yaml"]
SOON = 25  # seconds in which a run that is asked to stop has written its checkpoint and ended
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

    def trainer(self, rank: int = 0) -> psutil.Process:
        """The process that trains as `rank`: the launcher's child."""
        children = psutil.Process(self.process.pid).children()
        if len(children) == 1:
            return children[0]
        (found,) = [child for child in children if child.environ().get("RANK") == str(rank)]
        return found

    def family(self) -> list[psutil.Process]:
        """The launcher and all that it has started."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def end(self, seconds: float = 120, family: Sequence[psutil.Process] = ()) -> int:
        """The exit status, when all of the group's processes and of `family` have ended."""
        deadline = time.monotonic() + seconds
        status = self.process.wait(seconds)
        _, alive = psutil.wait_procs(family, timeout=max(0.0, deadline - time.monotonic()))
        assert not alive, self.said()[-2000:]
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


def test_asked_to_stop_in_every_way_it_is_bit_by_bit_the_run_that_never_was(
    launch, tiny, tiny_yaml: Path, tmp_path: Path, figures: Losses, capfd: pytest.CaptureFixture
) -> None:
    options = ["train.steps=500", "checkpoint.every=200", "model.dropout=0.1", "optim.name=muon", "eval.every=100"]
    run = tmp_path / "run"

    with launch(ONE, *options) as orphaned:  # the launcher does not pass it on: it ends, and its trainer sees that
        orphaned.reach(run, 20)
        family = orphaned.family()
        orphaned.process.send_signal(signal.SIGTERM)
        assert orphaned.end(SOON, family) == -signal.SIGTERM
    first = newest(run)
    assert f"Stopped because its launcher is gone at step {first}, with a checkpoint." in orphaned.said()

    with launch(ONE, *options) as stopped:
        stopped.reach(run, first + 20)
        assert main([str(tiny_yaml), f"run.dir={run}", *options]) == 2  # another command for the same folder
        trainer, family = stopped.trainer(), stopped.family()
        assert f"{run} is in use: process {trainer.pid} on " in capfd.readouterr().err
        trainer.send_signal(signal.SIGTERM)
        assert stopped.end(SOON, family) == 1  # what the launcher makes of its trainer's 143
    second = newest(run)
    assert f"continues at step {first}" in stopped.said()
    assert f"Stopped by SIGTERM at step {second}, with a checkpoint." in stopped.said()

    with launch(ONE, *options) as interrupted:
        interrupted.reach(run, second + 20)
        family = interrupted.family()
        os.killpg(interrupted.process.pid, signal.SIGINT)  # Ctrl-C reaches all that runs in the terminal
        assert interrupted.end(SOON, family) != 0
    third = newest(run)
    assert f"Stopped by SIGINT at step {third}, with a checkpoint." in interrupted.said()
    assert first < second < third < 500
    assert read(run / "metrics.jsonl")[-1]["step"] == third
    assert not (run / "model-last").exists()

    rows, whole = tiny(*options), tiny(*options, name="whole")  # to the end; and without a break
    assert f"continues at step {third}" in capfd.readouterr().out
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for key in ("loss", "grad_norm", "lr", "validation_loss"):
        assert figures(rows, key) == figures(whole, key), key
    for name in ("model", "model-last"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (run / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_two_processes_stop_at_one_step_and_one_goes_on_where_they_did(
    launch, tiny, tmp_path: Path, figures: Losses
) -> None:
    """AdamW, at a rate at which a difference in the last bit does not grow; test_loop says what Muon makes of one."""
    # Of 3 sequences a rank: two micro-batches, of 2 and 1.
    options = ["train.steps=300", "optim.lr=1e-3", "eval.every=50", "train.micro_batch=2"]
    run = tmp_path / "run"
    with launch(TWO, *options) as launched:
        launched.reach(run, 47)
        family = launched.family()
        launched.trainer(rank=1).send_signal(signal.SIGTERM)  # to one alone, and not the one that writes
        assert launched.end(SOON, family) == 1
    assert "2 process(es)" in launched.said()
    first = newest(run)
    assert f"Stopped by a signal to another rank at step {first}, with a checkpoint." in launched.said()

    with Live(run), launch(TWO, *options) as launched:  # this process has the folder, and neither waits for the other
        assert launched.end() == 1
    assert f"{run} is in use: process {os.getpid()} on " in launched.said()

    launched.log.unlink()
    with launch(TWO, *options) as launched:
        launched.reach(run, first + 20)
        family = launched.family()
        launched.process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
        launched.end(SOON, family)
    assert launched.said().count("continues at step") == 1  # one of the two speaks
    together = read(run / "metrics.jsonl")
    assert first < newest(run) == together[-1]["step"] < 300

    rows, whole = tiny(*options), tiny(*options, name="whole")  # the same run goes on alone; and alone from the start
    assert rows[: len(together)] == together
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert figures(rows) == pytest.approx(figures(whole), abs=1e-5)
    assert figures(rows, "validation_loss") == pytest.approx(figures(whole, "validation_loss"), abs=1e-5)


def test_what_one_process_began_two_end(launch, tiny, tmp_path: Path, figures: Losses) -> None:
    options = ["optim.lr=1e-3", "train.steps=30", "checkpoint.every=10", "checkpoint.keep=9"]
    whole, run = tiny(*options, name="whole"), tmp_path / "run"
    tiny(*options)
    for folder in checkpoint.checkpoints(run)[:-1]:
        shutil.rmtree(folder)
    with launch(TWO, *options) as launched:
        assert launched.end() == 0, launched.said()
    assert "continues at step 10" in launched.said()
    assert "2 process(es)" in launched.said()
    rows = read(run / "metrics.jsonl")
    assert figures(rows)[:10] == figures(whole)[:10]
    assert figures(rows) == pytest.approx(figures(whole), rel=1e-6)


def test_before_its_first_update_it_ends_at_once_and_after_a_second_ctrl_c_too(tiny_yaml: Path, tmp_path: Path) -> None:
    """One micro-batch an update, of seconds: what is asked in it is done after it."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = [f"run.dir={run}", "train.batch_tokens=240000", "checkpoint.every=1", "data.validation=null"]

    def start() -> subprocess.Popen:
        with log.open("wb") as output:
            command = [sys.executable, "-u", "-m", "train", str(tiny_yaml), *options]
            return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def wait(process: subprocess.Popen, what: str) -> None:
        deadline = time.monotonic() + 120
        while what not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)

    process = start()
    wait(process, "wandb: off")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM before the first update: there was nothing new to keep." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert checkpoint.checkpoints(run) == []

    process = start()
    wait(process, "step 1/")
    time.sleep(0.3)  # into the second update
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == 128 + signal.SIGINT
    assert "Stopped at once, without another checkpoint." in log.read_text()
    assert not list(run.rglob(".*"))  # nothing half written


def newest(run: Path) -> int:
    return checkpoint.number(checkpoint.checkpoints(run)[0])


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
