"""Translators trained for seconds: every architecture learns, a run continues exactly, and a batch may be split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import translate
from train import translation
from train.checkpoint import checkpoints, read_progress
from train.config import Recipe, load
from train.metrics import read
from train.pair_prepare import prepare_pairs
from train.translation import TranslationTask, fits

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "transformer": "encoder_layers: 1, decoder_layers: 1, width: 32, heads: 2, mlp_width: 64, dropout: 0.1",
    "rnnsearch": "hidden: 24, embedding: 16, maxout: 16, dropout: 0.1",
    "decoder": "layers: 2, width: 32, heads: 2, dropout: 0.1",
    "prefix": "layers: 2, width: 32, heads: 2, prefix: true",
}
RECIPE = """
data: {{synthetic: copy, rows: 800, symbols: 8, length: 5, validation: 0.05, cache: {cache}}}
tokenizer: {{kind: words}}
model: {{architecture: {architecture}, context: 16, {shape}}}
optim: {{name: muon, lr: 0.01, weight_decay: 0}}
train: {{steps: 12, batch_tokens: 256, threads: 1, label_smoothing: 0.1}}
eval: {{every: 6, bleu: 10, bleu_tokenize: none}}
checkpoint: {{every: 6}}
log: {{every: 1, wandb: null}}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def recipe(cache: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def made(kind: str, *overrides: str, name: str = "run") -> Recipe:
        path = tmp_path / "recipe.yaml"
        architecture = "decoder" if kind == "prefix" else kind
        path.write_text(RECIPE.format(cache=cache, architecture=architecture, shape=SHAPES[kind]), encoding="utf-8")
        return load(path, [f"run.dir={tmp_path / name}", *overrides])

    return made


@pytest.fixture
def run(recipe: Callable[..., Recipe]) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Trains in this process; the rows of metrics.jsonl."""
    threads = torch.get_num_threads()

    def ran(kind: str, *overrides: str, name: str = "run", status: int = 0) -> list[dict[str, Any]]:
        from accelerate.state import AcceleratorState

        from train import loop

        AcceleratorState._reset_state(reset_partial_state=True)
        asked = recipe(kind, *overrides, name=name)
        assert loop.run(asked) == status
        return read(Path(asked.run.dir) / "metrics.jsonl")

    yield ran
    torch.set_num_threads(threads)


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", SHAPES)
def test_each_architecture_learns_is_judged_and_leaves_a_folder(
    kind: str, run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = run(kind)
    trained = [row for row in rows if "loss" in row]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.02
    assert trained[-1]["nll"] != trained[-1]["loss"]  # smoothed, with the plain loss beside it
    held = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in held] == [6, 12]
    assert held[-1]["validation_perplexity"] == pytest.approx(torch.tensor(held[-1]["validation_loss"]).exp().item())
    assert held[-1]["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:none")
    assert {"validation_bleu", "validation_chrf", "validation_exact", "chrf_signature"} <= held[-1].keys()
    assert (tmp_path / "run/samples/attention-12.png").is_file()
    folder = tmp_path / "run/model"
    written = json.loads((folder / "config.json").read_text())
    assert written["eos_token_id"] == 2
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    assert ("library_name: transformers" in card) == (kind in ("decoder", "prefix"))
    from lm.translate import Translator, translate

    translator = Translator.load(folder)
    (found,) = translate(translator.model, translator.tokenizer, ["1 2 3"], beam=2)
    assert set(found.text.split()) <= {str(number) for number in range(8)}


@pytest.mark.parametrize("kind", ["transformer", "rnnsearch", "prefix"])
def test_a_run_continues_exactly(kind: str, run: Callable[..., list[dict[str, Any]]]) -> None:
    constant = "schedule.kind=constant"  # as long runs as short ones
    whole = run(kind, constant, name="whole")
    run(kind, constant, "train.steps=6", name="parts")
    parts = run(kind, constant, name="parts")
    assert losses(parts) == losses(whole)
    held = [row["validation_loss"] for row in whole if "validation_loss" in row]
    assert [row["validation_loss"] for row in parts if "validation_loss" in row][-1] == held[-1]


def test_a_stop_while_it_translates_gives_the_evaluation_up_and_it_is_made_first(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("transformer", name="whole")
    with monkeypatch.context() as patch:
        search, batches = translate.beam_search, []

        def signalled(*arguments: Any) -> Any:
            batches.append(1)
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return search(*arguments)

        patch.setattr(translate, "beam_search", signalled)
        patch.setattr(translation, "TRANSLATED", 1)  # a source is a batch
        run("transformer", status=143)
    assert len(batches) == 2  # of ten
    (newest,) = checkpoints(tmp_path / "run")
    assert (read_progress(newest).step, read_progress(newest).evaluated) == (6, 0)
    rows = run("transformer")
    assert losses(rows) == losses(whole)
    held = [[row["validation_bleu"] for row in each if "validation_bleu" in row] for each in (rows, whole)]
    assert held[0] == held[1]
    assert len(held[0]) == 2


@pytest.mark.parametrize("kind", ["transformer", "rnnsearch"])
def test_an_update_is_the_same_however_it_is_split(kind: str, run: Callable[..., list[dict[str, Any]]]) -> None:
    whole = losses(run(kind, "model.dropout=0", "train.steps=4", name="whole"))
    parts = losses(run(kind, "model.dropout=0", "train.steps=4", "train.micro_batch=5", name="parts"))
    assert parts == pytest.approx(whole, rel=2e-5)


def test_ranks_share_the_rows_of_one_batch(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("transformer")
    task = TranslationTask(asked, prepare_pairs(asked, progress=False))
    rows = task.batches.rows(3)
    for world in (1, 3, len(rows) + 2):
        shares = [task.micro_batches(3, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        counted = [int((batch["tgt_output"] != -100).sum()) for share in shares for batch in share]
        assert sum(counted) == task.targets(3)
        assert all(share for share in shares)  # never empty: a rank without a row has one that does not count
    small = recipe("transformer", "train.micro_batch=4")
    task = TranslationTask(small, prepare_pairs(small, progress=False))
    shares = [task.micro_batches(3, rank, 2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    assert max(len(batch["src"]) for share in shares for batch in share) == 4


def test_two_ranks_train_as_one(
    recipe: Callable[..., Recipe], run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    quick = ("model.dropout=0", "train.steps=4", "eval.every=4", "checkpoint.average=1")
    alone = run("transformer", *quick, name="alone")
    asked = recipe("transformer", *quick, name="two")
    config = tmp_path / "two.yaml"
    config.write_text(asked.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(config)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    two = read(tmp_path / "two/metrics.jsonl")
    assert losses(two) == pytest.approx(losses(alone), rel=2e-4)
    held = [[row["validation_loss"] for row in rows if "validation_loss" in row] for rows in (alone, two)]
    assert held[1] == pytest.approx(held[0], rel=2e-4)
    averaged = [[row for row in rows if "averaged" in row] for rows in (alone, two)]
    assert [len(rows) for rows in averaged] == [1, 1]


def test_pairs_that_do_not_fit_are_left_out_and_said(
    recipe: Callable[..., Recipe], run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("transformer", "model.context=4", "train.steps=1", "eval.every=null")
    said = capsys.readouterr().out
    asked = recipe("transformer", "model.context=4")
    train = prepare_pairs(asked, progress=False).train
    left_out = sum(max(len(pair[0]), len(pair[1])) > 3 for pair in map(train.__getitem__, range(len(train))))
    assert f"{left_out:,} of {len(train):,} pairs are too long" in said
    longest = recipe("transformer", "data.longest=2")
    assert len(fits(train, longest)) == sum(len(train[row][0]) <= 2 for row in range(len(train)))
    joined = recipe("decoder", "model.context=6")
    assert len(fits(train, joined)) == sum(2 * len(train[row][0]) + 1 <= 6 for row in range(len(train)))


def test_the_command_that_scores_a_folder(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.__main__ import main

    run("transformer", "train.steps=2", "eval.every=null")
    capsys.readouterr()
    (tmp_path / "source").write_text("1 2 3\n4 5\n\n")
    (tmp_path / "target").write_text("1 2 3\n4 5\n6\n")
    files = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    folder, out = str(tmp_path / "run/model"), tmp_path / "out"
    assert main(["evaluate", folder, *files, "--beam", "2", "--tokenize", "none", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "pairs        3, 7 target tokens; 1 pairs that are empty or too long have no loss" in said
    assert "beam 2, length penalty 0.6, nrefs:1|case:mixed|eff:no|tok:none" in said
    assert len(out.read_text().split("\n")) == 4
    (tmp_path / "target").write_text("1\n")
    assert main(["evaluate", folder, *files]) == 2
    assert "has 3 lines and --target" in capsys.readouterr().err
    assert main(["evaluate", folder, *files, "--beam", "0"]) == 2
