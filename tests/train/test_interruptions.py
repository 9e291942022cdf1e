"""Runs in this process that go wrong in every way but being killed: the disk, the numbers, a stop in the middle."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import pretrained
from train import checkpoint, launch, loop
from train.__main__ import main
from train.checkpoint import checkpoints
from train.config import RecipeError
from train.guard import Diverged
from train.keeper import Keeper
from train.language import LanguageTask
from train.metrics import read
from train.signals import Interrupted
from train.task import Found

Losses = Callable[..., list[float]]
ALWAYS = "checkpoint.every=1"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is to the one that writes: a write takes a part, or nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def at(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[loop.Trainer], Any]) -> None:
    """Call `do` when update `step` is about to begin."""
    update = loop.Trainer._update

    def watched(self: loop.Trainer, *arguments: Any) -> bool:
        if self.progress.step == step - 1:
            do(self)
        return update(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_update", watched)


# ------------------------------------------------------------ written while training goes on


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_written_beside_training_is_the_state_of_its_step(
    tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, although the next update has been made long before the folder has its name."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    begin = Keeper.begin

    def remember(self: Keeper, ephemeral: bool) -> None:
        state = self.optimizer.state
        states[self.progress.step] = {
            key: tensor.detach().clone()
            for name, p in self.model.named_parameters()
            for key, tensor in [(name, p), *((f"{name}/{part}", t) for part, t in state[p].items())]
        }
        begin(self, ephemeral)

    kept: dict[int, dict[str, torch.Tensor]] = {}
    write = checkpoint.write

    def keep(run_dir: Path, snapshot: checkpoint.Snapshot, *rest: Any) -> bool:
        named = write(run_dir, snapshot, *rest)
        folder = checkpoint.folder(run_dir, snapshot.step)
        checkpoint.verify(folder)
        kept[snapshot.step] = checkpoint.load_file(folder / "model.safetensors") | checkpoint.load_file(
            folder / "optimizer.safetensors"
        )
        return named

    monkeypatch.setattr(Keeper, "begin", remember)
    monkeypatch.setattr(checkpoint, "write", keep)
    tiny(ALWAYS, f"optim.name={name}")
    assert sorted(states) == list(range(1, 12))
    for step, state in states.items():
        assert state.keys() == kept[step].keys()
        assert all(torch.equal(state[key], kept[step][key]) for key in state), step
    assert [path.name for path in checkpoints(tiny.folder / "run")] == ["step-12", "step-11"]


def test_ephemeral_ones_are_due_by_the_clock_and_may_not_hold_up_training(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    due = Keeper.due

    def watched(self: Keeper) -> bool:
        assert self.writer is not None
        self.writer.waited = 0.0 if self.progress.step < 6 else 100.0  # seconds, for the newest
        asked.append(due(self))
        return asked[-1]

    monkeypatch.setattr(Keeper, "due", watched)
    tiny("checkpoint.ephemeral=1e-9", "checkpoint.every=100")
    assert asked == [True] * 6 + [False] * 6
    assert [path.name for path in checkpoints(tiny.folder / "run")] == ["step-12"]


def test_a_state_that_proves_to_be_broken_is_no_checkpoint(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight goes bad in update 7: the checkpoint of step 7 is being written when the next loss shows it."""

    def break_after(self: loop.Trainer) -> None:
        step = self.optimizer.step

        def broken() -> None:
            step()
            with torch.no_grad():
                self.bare.norm.weight[0] = math.nan

        monkeypatch.setattr(self.optimizer, "step", broken)

    at(monkeypatch, 7, break_after)
    with pytest.raises(Diverged) as stopped:
        tiny(ALWAYS, "optim.max_skips=3")
    run = tiny.folder / "run"
    newest = checkpoints(run)[0]
    assert newest.name == "step-6"
    checkpoint.verify(newest)
    assert all(bool(t.isfinite().all()) for t in checkpoint.load_file(newest / "model.safetensors").values())
    assert str(stopped.value).startswith(
        "3 updates in a row were skipped, the last because the loss is not finite (nan); the run stops at step 10. "
        f"Of its checkpoints the newest is {newest}. "
    )
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert [row["step"] for row in read(run / "metrics.jsonl") if "skip" in row] == [8, 9, 10]


def test_a_rate_that_explodes_ends_with_a_sentence_and_a_model_that_is_whole(
    tiny, tiny_yaml: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tiny.folder / "run"
    options = [f"run.dir={run}", "optim.lr=1e30", "schedule.warmup=6", "optim.clip=null", "train.steps=60"]
    assert main([str(tiny_yaml), *options, ALWAYS]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("10 updates in a row were skipped, the last because the ")
    assert " is not finite (" in said.err
    assert "Traceback" not in said.err
    for folder in checkpoints(run):
        weights = checkpoint.load_file(folder / "model.safetensors")
        assert all(bool(t.isfinite().all()) for t in weights.values())
    assert not (run / "live").exists()


def test_no_run_resumes_with_another_judgement(tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike is one because of the updates before it, which a checkpoint has to know."""
    monkeypatch.setattr("train.guard.HISTORY", 6)
    options = [
        "train.steps=20",
        "optim.spike=1",
        "optim.max_skips=100",
        "checkpoint.every=5",
        "checkpoint.keep=9",
        "optim.lr=0.05",
    ]
    monkeypatch.setattr("train.guard.LEAST_LOSS", 0.001)
    monkeypatch.setattr("train.guard.LEAST_NORM", 0.001)
    whole = tiny(*options, name="whole")
    assert figures(whole, "skipped")[-1] > 1
    run = tiny.folder / "again"
    shutil.copytree(tiny.folder / "whole", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny.folder / "whole"), str(run)))
    for folder in checkpoints(run)[:-2]:
        shutil.rmtree(folder)
    rows = tiny(*options, name="again")
    for key in ("loss", "grad_norm", "skipped", "skip", "skip_loss"):
        assert figures(rows, key) == figures(whole, key)


# ------------------------------------------------------------ stopped in the middle


def test_a_stop_between_micro_batches_gives_the_update_up(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["train.micro_batch=2", "log.every=4", "model.dropout=0.1"]
    whole = tiny(*options, name="whole")
    with monkeypatch.context() as patch:
        at(patch, 7, lambda self: os.kill(os.getpid(), signal.SIGTERM))
        tiny(*options, status=143)
    assert "Stopped by SIGTERM at step 6, with a checkpoint." in capsys.readouterr().out
    rows = tiny(*options)
    assert figures(rows) == figures(whole)  # of four updates each, one of them half before and half after the stop
    assert figures(rows, "grad_norm") == figures(whole, "grad_norm")


@pytest.mark.parametrize("number", [2, 4], ids=["in the middle", "at the end"])
def test_a_stop_in_an_evaluation_gives_it_up_and_it_is_made_first(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    options = ["eval.every=3", "model.dropout=0.1"]
    whole = tiny(*options, name="whole")
    with monkeypatch.context() as patch:
        check = launch.Launch.check
        calls = []

        def stopping(self: launch.Launch) -> None:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            check(self)

        patch.setattr(launch.Launch, "check", stopping)
        tiny(*options, status=130)
    run = tiny.folder / "run"
    newest = checkpoints(run)[0]
    assert checkpoint.number(newest) == 3 * number
    assert checkpoint.read_progress(newest).evaluated == 3 * (number - 1)
    assert not (run / "model-last").exists()
    rows = tiny(*options)
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert figures(rows) == figures(whole)
    assert figures(rows, "validation_loss") == figures(whole, "validation_loss")


def test_an_evaluation_that_is_made_again_has_one_row(tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["eval.every=6", "checkpoint.average=2"]
    whole = tiny(*options, name="whole")
    with monkeypatch.context() as patch:
        check = launch.Launch.check

        def stopping(self: launch.Launch) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            check(self)

        patch.setattr(launch.Launch, "check", stopping)
        tiny(*options, status=143)  # in the evaluation at step 6
    with monkeypatch.context() as patch:
        at(patch, 7, lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny(*options)  # right after it
    tiny(*options)
    shutil.rmtree(tiny.folder / "run" / "model-last")
    rows = tiny(*options)  # killed, as it were, while it saved the average
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert figures(rows, "validation_loss") == figures(whole, "validation_loss")
    assert len(figures(rows, "averaged")) == 1


def test_one_evaluation_that_is_no_number_is_not_the_best_for_ever(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = LanguageTask.evaluate, []

    def found(self: LanguageTask, *arguments: Any) -> Found | None:
        calls.append(1)
        made = evaluate(self, *arguments)
        return made if len(calls) > 1 or made is None else replace(made, loss=math.nan)

    monkeypatch.setattr(LanguageTask, "evaluate", found)
    rows = tiny("eval.every=6")
    progress = checkpoint.read_progress(checkpoints(tiny.folder / "run")[0])
    assert (progress.best_step, progress.best_loss) == (12, figures(rows, "validation_loss")[-1])
    assert (tiny.folder / "run" / "model").is_dir()


def test_a_stop_before_the_first_update_ends_at_once(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at(patch, 1, lambda self: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            tiny()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoints(tiny.folder / "run") == []
    tiny()


# ------------------------------------------------------------ the disk


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tiny, figures: Losses, capsys: pytest.CaptureFixture
) -> None:
    whole, run = tiny(name="whole"), tiny.folder / "run"
    tiny()
    shutil.rmtree(run / "model-last")
    (newest, before) = checkpoints(run)
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    capsys.readouterr()
    rows = tiny()
    said = capsys.readouterr()
    assert said.err == (
        f"{newest} cannot be read (optimizer.safetensors is not what was written: its checksum differs). "
        f"The run goes on from {before.name}.\n"
    )
    assert f"continues at step {checkpoint.number(before)}" in said.out
    assert figures(rows) == figures(whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["damaged-step-12", "step-12", "step-8"]


def test_a_checkpoint_that_is_too_new_is_refused_and_not_gone_behind(tiny) -> None:
    tiny("train.steps=8")
    newest = checkpoints(tiny.folder / "run")[0]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(RecipeError) as refused:
        tiny("train.steps=12")
    assert refused.value.problems == [f"{newest} was written by a newer version of Heed; this one reads format 2."]
    assert checkpoints(tiny.folder / "run")[0] == newest


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = tiny("log.every=1", name="whole")
    full = files_of_at_most(2000)  # a few rows of metrics.jsonl, and no weights
    with monkeypatch.context() as patch:
        at(patch, 6, lambda self: full.__enter__())
        at(patch, 11, lambda self: full.__exit__(None, None, None))
        rows = tiny("log.every=1", "checkpoint.every=2", "eval.every=3")
    said = capsys.readouterr().out
    assert (
        f"a checkpoint could not be written (File too large); the newest is {tiny.folder}/run/checkpoints/step-4,"
        in said
    )
    assert "metrics.jsonl could not be written (File too large); the rows are kept until it can." in said
    assert "step 6: its folder could not be written (" in said
    assert figures(rows) == figures(whole)
    run = tiny.folder / "run"
    assert [path.name for path in checkpoints(run)] == ["step-12", "step-10"]
    for folder in checkpoints(run):
        checkpoint.verify(folder)
    left = [path.name for path in run.rglob(".*")]
    assert left == []


def test_a_disk_that_is_full_at_the_end_is_a_sentence_and_the_same_command_ends_the_run(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, run = tiny(name="whole"), tiny.folder / "run"
    with monkeypatch.context() as patch:
        at(patch, 10, lambda self: full.__enter__())
        full = files_of_at_most(20_000)
        try:
            tiny(status=1)
        finally:
            full.__exit__(None, None, None)
    assert (
        "Ended at step 12, and its checkpoint could not be written (File too large); the newest is "
        f"{checkpoints(run)[0]}. What was there stays, and the same command continues." in capsys.readouterr().out
    )
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name != "step-4"] == ["step-8"]
    assert figures(tiny()) == figures(whole)
    assert pretrained.load(run / "model-last").config == pretrained.load(tiny.folder / "whole" / "model-last").config


def test_a_folder_that_can_no_longer_be_written_costs_a_checkpoint_and_not_the_run(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without rights and mounts, which tests may not have: a file stands where the folder should be."""
    there, away = tiny.folder / "run" / "checkpoints", tiny.folder / "away"

    def close(self: loop.Trainer) -> None:
        assert self.keeper.writer is not None
        self.keeper.writer.finish()
        there.rename(away)
        there.touch()

    def reopen(self: loop.Trainer) -> None:
        there.unlink()
        away.rename(there)

    whole = tiny(name="whole")
    with monkeypatch.context() as patch:
        at(patch, 7, close)
        at(patch, 11, reopen)
        rows = tiny()
    assert "a checkpoint could not be written (" in capsys.readouterr().out
    assert figures(rows) == figures(whole)
    assert [path.name for path in checkpoints(tiny.folder / "run")] == ["step-12", "step-4"]


def test_a_folder_that_cannot_be_written_at_the_start_is_refused(tiny, tiny_yaml: Path) -> None:
    (tiny.folder / "run").touch()
    with pytest.raises(RecipeError, match=r"run\.dir is .*, and it cannot be written \("):
        tiny()
