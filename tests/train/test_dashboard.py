"""The dashboard's specification, built offline: every chart draws names that runs really log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.dashboard import SECTIONS
from train.tracking import grouped

COMMAND = [sys.executable, "-c", "import sys; from train.dashboard import main; sys.exit(main(sys.argv[1:]))"]


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {**clean, "HOME": str(home), "NETRC": str(home / "netrc")}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def metrics_of(spec: object) -> set[str]:
    """Every metric name anywhere in a specification."""
    if isinstance(spec, dict):
        own = spec.get("metrics")
        found = {name for name in own if isinstance(name, str)} if isinstance(own, list) else set()
        return found.union(*[metrics_of(value) for value in spec.values()])
    if isinstance(spec, list):
        return set().union(*[metrics_of(value) for value in spec])
    return set()


@pytest.mark.parametrize("kind", [[], ["--report"]])
def test_the_spec_is_json_and_draws_each_figure_against_the_rows_own_step(kind: list[str], tmp_path: Path) -> None:
    done = run("--project", "heed-test", "--spec", *kind, home=tmp_path)
    assert done.returncode == 0, done.stderr
    spec = json.loads(done.stdout)
    wanted = {grouped(key) for charts in SECTIONS.values() for chart in charts for key in chart.keys}
    assert {"train/loss", "eval/loss", "perf/mfu", "train/lr"} <= wanted
    assert wanted <= metrics_of(spec)
    assert '"xAxis": "step"' in done.stdout
    assert "eval/samples" in done.stdout
    assert "heed-test" in done.stdout


def test_without_a_login_one_sentence_says_so(tmp_path: Path) -> None:
    done = run("--project", "heed-test", home=tmp_path)
    assert done.returncode == 2
    assert "could not be saved" in done.stderr
    assert "wandb login" in done.stderr
    assert "Traceback" not in done.stderr
