"""Checkpoints: complete or absent, exactly what was saved, the newest first, and refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm import DecoderConfig, DecoderLM
from train import checkpoint, tensorfile
from train.checkpoint import CheckpointError, Progress, checkpoints
from train.config import Optim
from train.optim import Optimizer, make_optimizer

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "context": 16,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "norm": "layer",
    "bias": True,
}
TOKENS = torch.randint(40, (4, 17), generator=torch.Generator().manual_seed(3))


def build(name: str = "muon", seed: int = 0, **shape: Any) -> tuple[DecoderLM, Optimizer]:
    torch.manual_seed(seed)
    model = DecoderLM(DecoderConfig(**(SHAPE | shape)))
    return model, make_optimizer(model, Optim(name=name))


def update(model: DecoderLM, optimizer: Optimizer) -> None:
    model({"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]})[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: DecoderLM, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    moments = {f"{names[p]}/{part}": t for p, parts in optimizer.state.items() for part, t in parts.items()}
    return dict(model.named_parameters()) | moments


def write(run: Path, step: int, keep: int = 2, **figures: Any) -> None:
    model, optimizer = build()
    update(model, optimizer)
    checkpoint.save(run, model, optimizer, Progress(step=step, **figures), keep, main=True)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_loaded_is_what_was_saved_and_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    model, optimizer = build(name)
    for _ in range(3):
        update(model, optimizer)
    progress = Progress(step=3, tokens=192, skipped=1, seconds=1.5, best_loss=2.25, best_step=2)
    checkpoint.save(tmp_path, model, optimizer, progress, 2, main=True)

    other, fresh = build(name, seed=1)
    assert checkpoint.load(tmp_path / "checkpoints" / "step-3", other, fresh) == progress
    for _ in range(3):
        ours, theirs = everything(model, optimizer), everything(other, fresh)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        update(model, optimizer)
        update(other, fresh)


def test_it_is_three_files_without_pickle(tmp_path: Path) -> None:
    write(tmp_path, 5, best_loss=1.0)
    folder = tmp_path / "checkpoints" / "step-5"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert (
        sum(t.numel() for t in load_file(folder / "model.safetensors").values())
        == DecoderConfig(**SHAPE).parameters()["total"]
    )
    assert json.loads((folder / "state.json").read_text())["step"] == 5


def test_newest_first_and_retention_after(tmp_path: Path) -> None:
    for step in (90, 100, 110, 120):
        write(tmp_path, step, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-120",
        "step-110",
        "step-100",
    ]  # by number, not by name
    write(tmp_path, 130, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-130"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-130"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 10, tokens=1)
    write(tmp_path, 10, tokens=2)
    (folder,) = checkpoints(tmp_path)
    assert checkpoint.read_progress(folder).tokens == 2


def test_one_that_cannot_be_replaced_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10, tokens=1)
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if ".writing-" in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 10, tokens=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]
    assert checkpoint.read_progress(tmp_path / "checkpoints" / "step-10").tokens == 1


@pytest.mark.parametrize("copied", [False, True])
def test_training_waits_until_what_is_its_own_is_written_and_not_for_copies(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    taken = checkpoint.snapshot(model, optimizer, Progress(step=1), main=True)
    assert taken is not None
    happened: list[str] = []
    write = tensorfile.write

    def written(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
        happened.append("written")
        return write(path, tensors)

    monkeypatch.setattr(tensorfile, "write", written)
    checkpoint.write(tmp_path, replace(taken, copied=copied), 1, read=lambda: happened.append("read"))
    assert happened[:3] == (["read", "written", "written"] if copied else ["written", "written", "read"])


def test_what_is_cleaned_away_while_it_is_written_gets_no_name(tmp_path: Path) -> None:
    """As by a second Ctrl-C, in the moment before the name."""
    write(tmp_path, 10, keep=1)
    model, optimizer = build()
    taken = checkpoint.snapshot(model, optimizer, Progress(step=20), main=True)
    assert taken is not None

    def cleaned() -> bool:
        checkpoint.clean(tmp_path)
        return True

    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path, taken, keep=1, good=cleaned)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]


def test_an_ephemeral_one_stays_until_there_is_a_newer_one(tmp_path: Path) -> None:
    model, optimizer = build()

    def take(step: int, ephemeral: bool) -> list[str]:
        update(model, optimizer)
        taken = checkpoint.snapshot(model, optimizer, Progress(step=step), main=True, ephemeral=ephemeral)
        assert taken is not None
        checkpoint.write(tmp_path, taken, keep=2)
        return [path.name.removeprefix("step-") for path in checkpoints(tmp_path)]

    assert take(1, True) == ["1"]
    assert take(2, True) == ["2"]
    assert take(3, False) == ["3"]
    assert take(4, True) == ["4", "3"]
    assert take(5, True) == ["5", "3"]
    assert take(6, False) == ["6", "3"]
    assert take(7, True) == ["7", "6", "3"]
    assert take(8, False) == ["8", "6"]
    assert [path.name for path in checkpoint.lasting(tmp_path)] == ["step-8", "step-6"]


def test_one_that_is_not_good_gets_no_name(tmp_path: Path) -> None:
    write(tmp_path, 10, keep=1)
    model, optimizer = build()
    taken = checkpoint.snapshot(model, optimizer, Progress(step=20), main=True)
    assert taken is not None
    assert not checkpoint.write(tmp_path, taken, keep=1, good=lambda: False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]


def test_what_is_half_written_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 10)
    there = tmp_path / "checkpoints"
    half = there / ".step-20.writing-1234"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (there / "step-30").mkdir()  # by hand, say: without its state
    (there / "step-x").mkdir()
    (there / "step-7.old").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10"]
    write(tmp_path, 20)
    assert not half.exists()  # of a process that was killed
    assert [path.name for path in checkpoints(tmp_path)] == ["step-20", "step-10"]


@pytest.mark.parametrize("write_fails_at", ["model.safetensors", "optimizer.safetensors", "state.json", "rename"])
def test_a_failure_in_the_middle_leaves_the_older_ones(
    write_fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10, keep=1)

    def failing(original: Callable[..., Any], here: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if here(*arguments):
                raise OSError(28, "No space left on device")
            return original(*arguments, **named)

        return call

    if write_fails_at == "rename":
        monkeypatch.setattr(Path, "rename", failing(Path.rename, lambda path, target: "step-20" in path.name))
    elif write_fails_at == "state.json":
        monkeypatch.setattr(Path, "write_text", failing(Path.write_text, lambda path, text: path.name == "state.json"))
    else:
        monkeypatch.setattr(tensorfile, "write", failing(tensorfile.write, lambda path, _: path.name == write_fails_at))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 20, keep=1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]
    (folder,) = checkpoints(tmp_path)
    checkpoint.verify(folder)
    checkpoint.load(folder, *build())


def test_the_files_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(len(list((tmp_path / "checkpoints").glob("step-*")))))
    write(tmp_path, 10)
    assert synced
    assert set(synced[:3]) == {0}


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    model, optimizer = build()
    update(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, Progress(step=1), 2, main=False)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ refusals


def state(folder: Path, **values: Any) -> None:
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


Break = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda f: state(f, format=99), "FOLDER was written by a newer version of Heed; this one reads format 2."),
        (lambda f: state(f, format="x"), "FOLDER/state.json cannot be read ("),
        (lambda f: state(f, surprise=1), "FOLDER/state.json cannot be read ("),
        (lambda f: (f / "state.json").write_text("{"), "FOLDER/state.json cannot be read ("),
        (lambda f: (f / "state.json").write_text("[]"), "FOLDER/state.json cannot be read ("),
        (lambda f: (f / "state.json").write_text("{}"), "FOLDER/state.json cannot be read ("),
        (lambda f: (f / "model.safetensors").unlink(), "FOLDER cannot be read ("),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "FOLDER cannot be read ("),
        (lambda f: (f / "optimizer.safetensors").write_bytes(b""), "FOLDER cannot be read ("),
        (
            lambda f: shutil.copy(f / "optimizer.safetensors", f / "model.safetensors"),
            "FOLDER holds the weights of another model than the recipe's.",
        ),
        (
            lambda f: shutil.copy(f / "model.safetensors", f / "optimizer.safetensors"),
            "FOLDER holds the state of another optimizer than the recipe's.",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(how: Break, sentence: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    (folder,) = checkpoints(tmp_path)
    how(folder)
    model, optimizer = build(seed=1)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(folder, model, optimizer)
    assert str(refused.value).startswith(sentence.replace("FOLDER", str(folder)))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda file: os.truncate(file, 5000), " has 5,000 bytes, and "),
        (lambda file: file.write_bytes(file.read_bytes() + b"more"), " were written"),
        (lambda file: flip(file, bit=8 * 100 + 3), "is not what was written: its checksum differs"),
        (lambda file: flip(file, bit=8 * file.stat().st_size - 1), "its checksum differs"),
        (lambda file: zero(file, 4096, 8192), "its checksum differs"),
        (lambda file: file.unlink(), "No such file or directory"),
    ],
    ids=["shorter", "longer", "a bit", "the last bit", "a page", "gone"],
)
def test_what_the_disk_has_lost_is_found_before_it_is_trained_on(
    name: str, how: Break, sentence: str, tmp_path: Path
) -> None:
    write(tmp_path, 10)
    (folder,) = checkpoints(tmp_path)
    checkpoint.verify(folder)
    how(folder / name)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.verify(folder)
    assert sentence in str(refused.value)
    assert name in str(refused.value)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def zero(file: Path, first: int, last: int) -> None:
    content = bytearray(file.read_bytes())
    content[first:last] = bytes(last - first)
    file.write_bytes(content)


def test_one_of_the_first_format_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (folder,) = checkpoints(tmp_path)
    state(folder, format=1, files={}, ephemeral=None)
    checkpoint.verify(folder)
    assert checkpoint.load(folder, *build()).step == 10


@pytest.mark.parametrize("shape", [{"width": 64}, {"layers": 1}, {"vocab_size": 41}, {"bias": False}], ids=str)
def test_another_models_weights_are_refused(shape: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, 10)
    (folder,) = checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="holds the weights of another model"):
        checkpoint.load(folder, *build(**shape))


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (folder,) = checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="holds the state of another optimizer"):
        checkpoint.load(folder, *build("adamw"))
