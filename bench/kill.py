"""A run that is killed without warning at random moments, each time continued by the same command, beside the run that
never was: are their losses equal to the last bit?

    make bench-kill            (or python -m bench.kill --kills 20)

Every second kill waits for a checkpoint to be half written. A small decoder with dropout, Muon and evaluations, on a
CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.record import ROOT, WORK, save, train_command
from train.metrics import read

WORDS = ("the", "of", "king", "and", "to", "thou", "art", "lord", "my", "what", "is", "love", "night", "day", "no")
STEPS_A_KILL = 40
COMPARED = ("loss", "grad_norm", "lr", "validation_loss", "skipped")


@dataclass
class Found:
    """What became of a killed run."""

    killed_at: list[int] = field(default_factory=list)  # the newest step that was logged
    resumed_from: list[int] = field(default_factory=list)  # 0: from the start
    while_writing: int = 0  # kills that left a half-written checkpoint
    differences: list[str] = field(default_factory=list)  # from the run never killed: none


def killed(folder: Path, kills: int, seed: int) -> Found:
    """Train in FOLDER/killed, SIGKILL the launcher and the trainer `kills` times, and compare with FOLDER/whole.

    Raises RuntimeError where a command does not end as it must.
    """
    drawn = random.Random(seed)
    recipe = _recipe(folder, STEPS_A_KILL * (kills + 1), seed)
    run, whole = folder / "killed", folder / "whole"
    _end(_start(recipe, whole, folder / "whole.log"), folder / "whole.log")
    found = Found()
    for number in range(kills):
        _kill(_start(recipe, run, folder / "killed.log"), folder / "killed.log", run, drawn, number % 2 == 1)
        found.while_writing += _half_written(run)
        found.killed_at.append(_logged(run))
        found.resumed_from.append(_newest(run))
        print(f"kill {number + 1}: after step {found.killed_at[-1]}; goes on from {found.resumed_from[-1]}", flush=True)
    log = folder / "last.log"
    _end(_start(recipe, run, log), log)
    found.differences = _differences(run, whole)
    return found


def _kill(process: subprocess.Popen[bytes], log: Path, run: Path, drawn: random.Random, writing: bool) -> None:
    """SIGKILL to launcher and trainer, some updates after they began; `writing`: while a checkpoint is half written."""
    try:
        goal = _newest(run) + drawn.randint(1, STEPS_A_KILL)
        _wait(process, log, lambda: "continues at" in _said(log) or "begins" in _said(log))  # has rewound its rows
        _wait(process, log, lambda: _logged(run) >= goal)
        time.sleep(drawn.uniform(0, 0.02))
        if writing:
            _wait(process, log, lambda: _half_written(run))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _recipe(folder: Path, steps: int, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(seed)
    text = folder / "text.txt"
    text.write_text(" ".join(drawn.choice(WORDS) for _ in range(1500)), encoding="utf-8")
    recipe = {
        "data": {"text": str(text), "cache": str(folder / "cache")},
        "tokenizer": {"kind": "characters"},
        "model": {"context": 16, "layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
        "optim": {"name": "muon", "lr": 0.01},
        "train": {"steps": steps, "batch_tokens": 96, "threads": 1},
        "eval": {"every": 25},
        "checkpoint": {"every": 10, "ephemeral": 0.05},
        "log": {"every": 1, "wandb": None},
    }
    path = folder / "kill.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _start(recipe: Path, run: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            train_command(str(recipe), f"run.dir={run}"),
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait(300):
        raise RuntimeError(f"the command ended with status {process.returncode}:\n{_said(log)[-2000:]}")


def _wait(process: subprocess.Popen[bytes], log: Path, condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"it did not come so far (exit status {process.poll()}):\n{_said(log)[-2000:]}")
        time.sleep(0.001)


def _said(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _logged(run: Path) -> int:
    rows = read(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def _newest(run: Path) -> int:
    from train.checkpoint import checkpoints, number

    found = checkpoints(run)
    return number(found[0]) if found else 0


def _half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.writing-*"))


def _differences(run: Path, whole: Path) -> list[str]:
    """Where two runs differ: rows of metrics.jsonl, files of the models."""
    ours, theirs = (
        [{key: row.get(key) for key in ("step", *COMPARED)} for row in read(side / "metrics.jsonl")]
        for side in (run, whole)
    )
    found = [] if len(ours) == len(theirs) else [f"{len(ours)} rows and {len(theirs)}"]
    found += [f"{a} and {b}" for a, b in zip(ours, theirs, strict=False) if a != b]
    for name in ("model/model.safetensors", "model-last/model.safetensors"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = WORK / "kill"
    shutil.rmtree(folder, ignore_errors=True)
    found = killed(folder, options.kills, options.seed)
    if found.differences:
        sys.exit("\n".join(["The killed run is another one:", *found.differences[:20]]))
    repeated = [at - to for at, to in zip(found.killed_at, found.resumed_from, strict=True)]
    save(
        "kill",
        f"{options.kills} SIGKILLs at random moments, {found.while_writing} while a checkpoint was half written",
        "python -m bench.kill",
        {"updates repeated after a kill": {"samples": repeated, "unit": "updates"}},
        None,
        statistic="median",
        note="Losses, gradient norms and models equal to the last bit to those of the run never killed.",
        killed_at=found.killed_at,
        resumed_from=found.resumed_from,
    )


if __name__ == "__main__":
    main()
