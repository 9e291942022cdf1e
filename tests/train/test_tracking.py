"""The wandb mirror: what is really written offline, one id over resumes, and failures that never end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.tracking import Tracker, grouped

# A run in a process of its own: wandb keeps global state, and its service must end with it.
SCRIPT = """
import sys
from types import SimpleNamespace
from train.tracking import Tracker

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
recipe = SimpleNamespace(
    log=SimpleNamespace(wandb="heed-test", group="group", tags=("a", "b")),
    to_dict=lambda: {"model": {"layers": 2}, "optim": {"lr": 0.5}},
)
tracker = Tracker.start(recipe, folder, "fingerprint-of-the-data", main=True)
print(tracker.describe())
for step in range(first, last + 1):
    tracker.log({"step": step, "loss": 1.0 / step, "mfu": None, "tokens_per_second": 10.0, "validation_loss": 2.0})
tracker.samples(last, [("Once", " upon a time")])
tracker.summary({"loss": 0.25})
tracker.finish(0)
tracker.log({"step": last + 1, "loss": 0.0})
print("done")
"""


def run(
    folder: Path, first: int, last: int, *, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {**clean, "HOME": str(folder), "NETRC": str(folder / "netrc"), **(extra or {})}
    command = [sys.executable, "-c", SCRIPT, str(folder / "run"), str(first), str(last)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )


def records(folder: Path) -> list:
    """The protobuf records of every offline part of a run, oldest first: wandb's own file, read as its format says.

    The file is LevelDB's log: after 7 bytes of header, blocks of 32 KiB with chunks of checksum (4), length (2),
    type (1) and data; a record is one full chunk (1) or a first (2), middle (3) and last (4) one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = Record()
                record.ParseFromString(parts)
                found.append(record)
                parts = b""
    return found


def history(folder: Path) -> list[dict]:
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def test_names_are_grouped() -> None:
    names = ["step", "loss", "lr", "validation_loss", "validation_bits_per_byte", "mfu", "data_wait"]
    assert [grouped(name) for name in names] == [
        "step",
        "train/loss",
        "train/lr",
        "eval/loss",
        "eval/bits_per_byte",
        "perf/mfu",
        "perf/data_wait",
    ]


def test_offline_without_a_key_and_a_resumed_run_keeps_its_id_and_its_replayed_steps(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):  # killed after step 4, resumed from a checkpoint at step 2
        done = run(tmp_path, first, last)
        assert done.returncode == 0, done.stderr
        assert "wandb sync" in done.stdout
        assert done.stderr == ""
        assert done.stdout.endswith("done\n")
    rows = history(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 3, 4, 5]
    assert all("perf/mfu" not in row for row in rows)
    assert rows[0]["eval/loss"] == 2.0
    assert any(name.startswith("eval/samples") for row in rows for name in row)
    runs = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(tmp_path / "run" / "wandb_id").read_text().strip()}
    assert {run.project for run in runs} == {"heed-test"}
    assert {run.run_group for run in runs} == {"group"}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model"] == {"layers": 2}
    assert config["data_fingerprint"] == "fingerprint-of-the-data"
    axes = [record.metric for record in records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in axes)
    summaries = [record.summary for record in records(tmp_path) if record.WhichOneof("record_type") == "summary"]
    final = {item.key or ".".join(item.nested_key): item.value_json for summary in summaries for item in summary.update}
    assert final["final/loss"] == "0.25"
    tables = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/eval/*.json"))
    assert json.loads(tables[0].read_text())["columns"] == ["step", "prompt", "completion"]


def test_a_server_that_cannot_be_reached_means_offline_with_one_sentence(tmp_path: Path) -> None:
    extra = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    done = run(tmp_path, 1, 2, extra=extra)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert "logged offline" in done.stderr
    assert [row["step"] for row in history(tmp_path) if "train/loss" in row] == [1, 2]


def test_wandb_mode_disabled_is_obeyed(tmp_path: Path) -> None:
    done = run(tmp_path, 1, 2, extra={"WANDB_MODE": "disabled"})
    assert done.stdout == "wandb: off\ndone\n"
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_folder_that_cannot_be_written_ends_the_mirror_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    done = run(tmp_path, 1, 2)
    assert done.returncode == 0
    assert done.stdout == "wandb: off\ndone\n"
    assert done.stderr.count("\n") == 1
    assert "the run goes on" in done.stderr


class Broken:
    """A wandb run whose every call fails."""

    offline = True

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("the service went away.\nMore lines.")


def test_a_failure_in_the_middle_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(Broken())
    for step in range(3):
        tracker.log({"step": step, "loss": 1.0})
    tracker.samples(3, [("a", "b")])
    tracker.summary({"loss": 1.0})
    tracker.finish(1)
    said = capsys.readouterr().err
    assert (
        said == "warning: wandb stopped (the service went away); the run goes on, its figures are in metrics.jsonl.\n"
    )


def test_other_ranks_and_runs_without_a_project_track_nothing(tmp_path: Path) -> None:
    from types import SimpleNamespace

    off = SimpleNamespace(log=SimpleNamespace(wandb=None, group=None, tags=()), to_dict=dict)
    on = SimpleNamespace(log=SimpleNamespace(wandb="heed", group=None, tags=()), to_dict=dict)
    for recipe, main in ((off, True), (on, False)):
        tracker = Tracker.start(recipe, tmp_path, "", main=main)  # type: ignore[arg-type]
        assert tracker.describe() == "wandb: off"
        tracker.finish()
    assert list(tmp_path.iterdir()) == []
