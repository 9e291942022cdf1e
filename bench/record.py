"""What every benchmark shares: the machine's name, a command timed from outside, a result as JSON with all raw
samples.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lm.cpu import cpu_info

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WORK = ROOT / ".cache" / "bench"  # runs and peers' files; may be deleted


def machine() -> str:
    """The processor or GPU, how much of it, and what it can do that matters to speed."""
    from train.launch import cores, device_name

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    flags = cpu_info("flags").split()
    isa = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{device_name(torch.device('cpu'))}, {cores()} cores ({', '.join(isa)}), torch {torch.__version__}"


def timed(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> float:
    """Wall seconds of a command as a whole process. Its output is shown only if it fails, which ends the benchmark."""
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n`{' '.join(command)}` ended with status {done.returncode}.")
    return seconds


def train_command(recipe: str, *overrides: str) -> list[str]:
    """Our trainer as a user starts it."""
    config = "gpu" if torch.cuda.is_available() else "cpu"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "-q",
        "--config_file",
        f"configs/accelerate/{config}.yaml",
    ]
    return [*launcher, "-m", "train", recipe, *overrides]


def _write(name: str, benchmark: str, command: str, figures: dict[str, Any]) -> Path:
    """bench/results/NAME.json: what was measured, where, when and by which command."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    made = {"machine": machine(), "command": command, "date": datetime.date.today().isoformat()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": benchmark, **made, **figures}, indent=2) + "\n", encoding="utf-8")
    return path


def save(
    name: str,
    benchmark: str,
    command: str,
    sides: dict[str, dict[str, Any]],
    ratio: float | None,
    *,
    statistic: str,
    **more: Any,
) -> None:
    """bench/results/NAME.json. sides: name -> {"samples": [...], "unit": ...}; statistic ("median" or "mean") is
    how docs sum them up.
    """
    path = _write(name, benchmark, command, {"statistic": statistic, "sides": sides, "ratio": ratio, **more})
    for side, values in sides.items():
        middle = getattr(statistics, statistic)(values["samples"])
        print(f"{side}: {statistic} {middle:.4g} {values['unit']} of {[round(s, 4) for s in values['samples']]}")
    print(f"ratio {ratio:.3f}" if ratio is not None else "no ratio", f"-> {path.relative_to(ROOT)}")


def save_table(
    name: str,
    benchmark: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
    *,
    note: str | None = None,
    **more: Any,
) -> None:
    """bench/results/NAME.json, a table: each row has a value (or a list of samples) for each column; docs show it with
    `<!-- figures: table NAME -->`.
    """
    path = _write(name, benchmark, command, {"note": note, "columns": list(columns), "rows": list(rows), **more})
    print(f"{benchmark} -> {path.relative_to(ROOT)}")
    for row in rows:
        print("  " + "; ".join(f"{column} {row.get(column)}" for column in columns))
