"""The training loop: what it leaves behind, and that no way of cutting the work up changes what is learned."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm import pretrained
from lm.tokenizer import Tokenizer
from train import checkpoint, loop, resume
from train.config import RecipeError, load

Losses = Callable[..., list[float]]
TRAINING_KEYS = {
    "step",
    "tokens",
    "loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "memory_gib",
    "data_wait",
    "seconds",
    "skipped",
}


# ------------------------------------------------------------ what a run leaves


def test_a_run_leaves_all_that_it_should(tiny, capsys: pytest.CaptureFixture) -> None:
    rows = tiny("eval.every=5", "eval.prompts=[the, king]", "eval.sample_tokens=4", "log.every=3", "log.wandb=tiny")
    run = tiny.folder / "run"
    left = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "wandb_id", "checkpoints", "model", "model-last"} <= left
    assert not any(name.startswith(".") for name in left)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-12", "step-8"]
    assert (
        load(run / "config.yaml").to_dict()
        == tiny.recipe(
            "eval.every=5", "eval.prompts=[the, king]", "eval.sample_tokens=4", "log.every=3", "log.wandb=tiny"
        ).to_dict()
    )

    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [3, 6, 9, 12]
    assert all(row.keys() == TRAINING_KEYS for row in training)
    assert [row["tokens"] for row in training] == [288, 576, 864, 1152]
    assert all(row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2)) for row in training)  # ASCII
    held = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in held] == [5, 10, 12]
    assert all(row.keys() == {"step", "tokens", "validation_loss", "validation_bits_per_byte"} for row in held)

    for name in ("model", "model-last"):
        model = pretrained.load(run / name)
        assert model.config == tiny.recipe().decoder_config(Tokenizer.load(run / name).vocab_size)
    said = capsys.readouterr().out
    assert "begins: " in said
    assert "'the' -> '" in said
    assert f"The model is {run / 'model'}." in said


def test_the_model_is_the_best_and_model_last_the_last(tiny, monkeypatch: pytest.MonkeyPatch, figures: Losses) -> None:
    """From step 8 on each update makes it worse: the best is that of step 8."""
    monkeypatch.setattr(loop, "factor", lambda schedule, step, steps: 1.0 if step < 8 else -3.0)
    rows = tiny("eval.every=4", "optim.name=adamw")
    losses = figures(rows, "validation_loss")
    assert losses[1] == min(losses) < losses[2]
    best, last = (pretrained.load(tiny.folder / "run" / name).state_dict() for name in ("model", "model-last"))
    eighth = checkpoint.load_file(tiny.folder / "run" / "checkpoints" / "step-8" / "model.safetensors")
    twelfth = checkpoint.load_file(tiny.folder / "run" / "checkpoints" / "step-12" / "model.safetensors")
    assert all(torch.equal(best[name], eighth[name]) and torch.equal(last[name], twelfth[name]) for name in last)
    state = checkpoint.read_progress(tiny.folder / "run" / "checkpoints" / "step-12")
    assert (state.best_step, state.best_loss) == (8, losses[1])


def test_without_evaluation_the_model_is_the_last(tiny) -> None:
    tiny()
    run = tiny.folder / "run"
    best, last = (pretrained.load(run / name).state_dict() for name in ("model", "model-last"))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_prompts_alone_can_be_evaluated_before_the_first_row(tiny) -> None:
    rows = tiny("data.validation=null", "eval.every=2", "log.every=10", "eval.prompts=[the]", "train.steps=3")
    assert [row["step"] for row in rows] == [3]


def test_a_second_call_says_finished(tiny, capsys: pytest.CaptureFixture) -> None:
    rows = tiny()
    before = {path: path.stat().st_mtime_ns for path in (tiny.folder / "run").rglob("*")}
    capsys.readouterr()
    assert tiny() == rows
    assert capsys.readouterr().out == f"{tiny.folder / 'run'} is finished: 12 steps are done. Its model: " + (
        f"{tiny.folder / 'run' / 'model'}\n"
    )
    assert before == {path: path.stat().st_mtime_ns for path in (tiny.folder / "run").rglob("*")}


def test_a_finished_run_that_was_killed_before_its_folder_gets_it(tiny) -> None:
    tiny()
    run = tiny.folder / "run"
    kept = pretrained.load(run / "model").state_dict()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "model-last")
    tiny()
    again = pretrained.load(run / "model").state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# ------------------------------------------------------------ however the work is cut up


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_micro_batches_change_nothing(tiny, figures: Losses, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In bf16, Muon's products turn a difference in the last bit of a gradient into one of the third digit.
    monkeypatch.setattr("train.optim.bf16_is_fast", lambda device: False)
    whole = figures(tiny(f"optim.name={name}", name="whole"))
    for size in (1, 4):  # of 6 sequences: six times one, or four and two
        cut = figures(tiny(f"optim.name={name}", f"train.micro_batch={size}", name=f"cut-{size}"))
        assert cut == pytest.approx(whole, abs=1e-5 if name == "muon" else 1e-6)


def test_activation_checkpointing_changes_no_bit(tiny, figures: Losses) -> None:
    plain = figures(tiny("model.dropout=0.2", name="plain"))
    recomputed = figures(tiny("model.dropout=0.2", "train.activation_checkpointing=true", name="recomputed"))
    assert recomputed == plain


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_learn_the_same(tiny, figures: Losses) -> None:
    options = ["model.layers=1", "train.steps=3", "data.validation=null"]
    eager = figures(tiny(*options, name="eager"))
    sampling = ["eval.every=3", "eval.prompts=[the]", "eval.sample_tokens=4"]
    compiled = figures(tiny(*options, *sampling, "train.compile=true", name="compiled"))
    assert compiled == pytest.approx(eager, abs=1e-5)


def test_evaluating_and_sampling_in_between_change_no_bit(tiny, figures: Losses) -> None:
    plain = figures(tiny("model.dropout=0.2", name="plain"))
    watched = tiny("model.dropout=0.2", "eval.every=2", "eval.prompts=[the]", "eval.sample_tokens=3", name="watched")
    assert figures(watched) == plain
    assert len(figures(watched, "validation_loss")) == 6


def test_the_seed_decides_everything(tiny, figures: Losses) -> None:
    first = figures(tiny("model.dropout=0.2", name="a"))
    assert figures(tiny("model.dropout=0.2", name="b")) == first
    other = figures(tiny("model.dropout=0.2", "run.seed=2", name="c"))
    assert not set(other) & set(first)
    tiny(f"run.seed={2**32 - 1}", "model.dropout=0.2", "train.steps=2", name="d")  # the largest there is


def test_bf16_learns_as_fp32_does(tiny, figures: Losses) -> None:
    exact = figures(tiny("eval.every=12", name="exact"))
    rows = tiny("train.dtype=bf16", "eval.every=12", name="bf16")
    assert figures(rows) == pytest.approx(exact, abs=0.05)
    folder = tiny.folder / "bf16" / "model"
    assert all(p.dtype == torch.bfloat16 for p in pretrained.load(folder).parameters())  # what it is served in
    weights = checkpoint.load_file(tiny.folder / "bf16" / "checkpoints" / "step-12" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())  # what it is trained in


def test_documents_are_kept_apart(tiny, figures: Losses, tmp_path: Path) -> None:
    lines = "\n\n".join(f"king {number} is lord of night and day" for number in range(200))
    (tmp_path / "documents.txt").write_text(lines, encoding="utf-8")
    common = [f"data.text={tmp_path / 'documents.txt'}", 'data.separator="\\n\\n"', "eval.every=6"]
    rows = tiny(*common, "data.document_mask=true", name="masked")
    assert len(figures(rows, "validation_loss")) == 2
    assert figures(rows) != figures(tiny(*common, name="open"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_can_be_learned_by_heart(tiny, figures: Losses, tmp_path: Path, name: str) -> None:
    (tmp_path / "one.txt").write_text("what light is it?", encoding="utf-8")  # 17 characters: one window of 16
    options = [f"data.text={tmp_path / 'one.txt'}", "data.validation=null", "train.batch_tokens=16", "train.steps=100"]
    rows = tiny(*options, f"optim.name={name}", "optim.weight_decay=0", "log.every=10", "checkpoint.every=100")
    assert figures(rows)[-1] < 0.1
    model, tokenizer = pretrained.load(tiny.folder / "run" / "model"), Tokenizer.load(tiny.folder / "run" / "model")
    from lm.params import SamplingParams
    from lm.search import generate

    (ids,) = generate(model, [tokenizer.encode("what ")], SamplingParams(temperature=0.0, max_tokens=11))
    assert tokenizer.decode(ids) == "light is it"


# ------------------------------------------------------------ the arithmetic of one update


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm import DecoderLM
    from train.data import Batches
    from train.prepare import prepare

    seen: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_
    rows = tiny("train.micro_batch=4", "train.steps=1", "optim.clip=null")
    recipe = tiny.recipe()
    prepared = prepare(recipe, progress=False)
    batches = Batches(prepared.train, context=16, batch_tokens=96, seed=1337)
    torch.manual_seed(1337)
    model = DecoderLM(recipe.decoder_config(prepared.tokenizer.vocab_size))
    loss, count, _ = model(batches.batch(0))
    (loss / count).backward()
    seen.append(float(clip(model.parameters(), math.inf)))
    assert int(count) == 96
    assert rows[0]["loss"] == pytest.approx(float(loss.detach() / count), rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(seen[0], rel=1e-5)


def test_the_schedule_is_applied_to_the_peak(tiny, figures: Losses) -> None:
    rows = tiny("schedule.kind=wsd", "schedule.warmup=3", "schedule.decay=0.25", "schedule.floor=0", "train.steps=12")
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert figures(rows, "lr") == pytest.approx([0.01 * rate for rate in expected])


def test_an_update_with_an_infinite_gradient_is_left_out(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    update = loop.Trainer._update

    def poisoned(self: loop.Trainer, micro_batches: Any, window: Any) -> bool:
        hook = None
        if self.progress.step in (4, 5):
            hook = self.bare.norm.weight.register_hook(lambda gradient: gradient * math.inf)
        before = {name: p.detach().clone() for name, p in self.bare.named_parameters()}
        made = update(self, micro_batches, window)
        if hook is not None:
            hook.remove()
            assert all(torch.equal(before[name], p) for name, p in self.bare.named_parameters())
        return made

    monkeypatch.setattr(loop.Trainer, "_update", poisoned)
    rows = tiny("log.every=2")  # the third row's window has no update
    assert figures(rows, "skipped") == [0, 0, 2, 2, 2, 2]
    skips = [row for row in rows if "skip" in row]
    assert [(row["step"], row["skip"], row["skip_norm"]) for row in skips] == [
        (5, "the gradient is not finite (inf)", None),
        (6, "the gradient is not finite (inf)", None),
    ]
    assert all(math.isfinite(row["skip_loss"]) for row in skips)
    training = [row for row in rows if "loss" in row]
    assert (training[2]["grad_norm"], training[2]["loss"]) == (None, None)
    assert all(math.isfinite(row["loss"]) for row in training if row["step"] != 6)
    said = capsys.readouterr().out
    assert "step 5: the gradient is not finite" in said
    assert "norm n/a" in said


# ------------------------------------------------------------ continuing


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a real signal in the middle of update `step`."""
    update = loop.Trainer._update

    def stopped(self: loop.Trainer, *arguments: Any) -> bool:
        judge = self.guard.judge
        if self.progress.step == step - 1:  # after its last micro-batch

            def judged(*numbers: float) -> str | None:
                os.kill(os.getpid(), number)
                return judge(*numbers)

            monkeypatch.setattr(self.guard, "judge", judged)
        return update(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_update", stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_same_call_goes_on(
    tiny, figures: Losses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
) -> None:
    options = ["model.dropout=0.2", "optim.name=muon", "eval.every=3"]
    whole, handler = tiny(*options, name="whole"), signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, number)
        tiny(*options, status=128 + number)
    said = f"Stopped by {signal.Signals(number).name} at step 6, with a checkpoint. The same command continues."
    assert said in capsys.readouterr().out
    assert [path.name for path in checkpoint.checkpoints(tiny.folder / "run")] == ["step-6", "step-4"]
    assert not (tiny.folder / "run" / "model-last").exists()
    assert signal.getsignal(number) == handler
    rows = tiny(*options)
    assert "continues at step 6" in capsys.readouterr().out
    assert figures(rows) == figures(whole)
    assert figures(rows, "validation_loss") == figures(whole, "validation_loss")


def test_every_checkpoint_is_a_place_to_go_on_from(tiny, figures: Losses) -> None:
    options = ["model.dropout=0.2", "checkpoint.every=3", "checkpoint.keep=9"]
    whole = tiny(*options, name="whole")
    for step in (3, 6, 9):
        run = tiny.folder / f"from-{step}"
        shutil.copytree(tiny.folder / "whole", run)  # a moved run goes on too: its old name is no key that counts
        for path in checkpoint.checkpoints(run):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        rows = tiny(*options, name=run.name)
        assert figures(rows) == figures(whole)
        assert len(rows) == len(whole)


def test_a_longer_run_continues_a_finished_one(tiny, figures: Losses) -> None:
    first = figures(tiny("schedule.kind=constant", "train.steps=8"))
    rows = tiny("schedule.kind=constant", "train.steps=12")
    assert figures(rows)[:8] == first
    assert figures(rows) == figures(tiny("schedule.kind=constant", name="whole"))


def test_a_longer_run_killed_before_its_folder_gets_its_own_and_not_the_shorter_ones(tiny) -> None:
    options = ["schedule.kind=constant", "data.validation=null"]
    run = tiny.folder / "run"
    tiny(*options, "train.steps=8")
    shutil.copytree(run / "model-last", tiny.folder / "shorter")
    tiny(*options)
    kept = pretrained.load(run / "model-last").state_dict()
    shutil.rmtree(run / "model-last")
    shutil.move(tiny.folder / "shorter", run / "model-last")
    tiny(*options)
    again = pretrained.load(run / "model-last").state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_run_beyond_the_steps_that_are_asked_for_gets_its_folder(tiny, capsys: pytest.CaptureFixture) -> None:
    tiny("train.steps=8", "eval.every=4")
    shutil.rmtree(tiny.folder / "run" / "model-last")
    tiny("train.steps=6", "eval.every=4")
    assert "Stopped" not in capsys.readouterr().out
    assert (tiny.folder / "run" / "model-last").is_dir()
    assert [path.name for path in checkpoint.checkpoints(tiny.folder / "run")] == ["step-8", "step-4"]


def test_what_changes_no_past_step_may_change(tiny, figures: Losses) -> None:
    tiny("train.steps=6", "schedule.kind=constant")
    rows = tiny(
        "train.tokens=864",
        f"data.cache={tiny.folder / 'elsewhere'}",
        "schedule.kind=constant",
        "train.micro_batch=2",
        "eval.every=4",
        "checkpoint.keep=1",
        "log.every=2",
    )
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 8, 9]


def test_another_recipe_is_refused_with_all_its_keys(tiny) -> None:
    tiny("train.steps=4")
    before = (tiny.folder / "run" / "config.yaml").read_bytes()
    with pytest.raises(RecipeError) as refused:
        tiny("train.steps=4", "optim.lr=0.02", "model.qk_norm=true", "train.batch_tokens=48", "run.seed=1")
    where = f"and the run in {tiny.folder / 'run'} was begun with"
    rest = "; give another run.dir, or the old value."
    assert refused.value.problems == [
        f"run.seed is 1, {where} 1337{rest}",
        f"model.qk_norm is true, {where} false{rest}",
        f"optim.lr is 0.02, {where} 0.01{rest}",
        f"train.batch_tokens is 48, {where} 96{rest}",
    ]
    assert (tiny.folder / "run" / "config.yaml").read_bytes() == before


def test_other_text_under_the_same_path_is_refused(tiny, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be " * 30)
    tiny(f"data.text={file}", "train.steps=4")
    file.write_text("not to be or to be " * 30)  # the same characters, so the shapes fit
    with pytest.raises(RecipeError, match=r"the text or its tokenizer is not what the run of .*step-4 was begun with"):
        tiny(f"data.text={file}", "train.steps=8")


def test_resume_never_and_must(tiny) -> None:
    with pytest.raises(RecipeError) as refused:
        tiny("run.resume=must")
    run = tiny.folder / "run"
    assert refused.value.problems == [
        f"run.resume is must and {run} has no checkpoint; choose the run.dir of a run, or run.resume=auto."
    ]
    assert not run.exists()
    tiny("run.resume=never", "train.steps=4")
    with pytest.raises(RecipeError) as refused:
        tiny("run.resume=never", "train.steps=4")
    assert refused.value.problems == [
        f"run.resume is never and {run} holds a run; choose another run.dir, or run.resume=auto."
    ]
    assert len(tiny("run.resume=must", "train.steps=6")) == 6


def test_a_checkpoint_or_recipe_that_cannot_be_read_is_refused(tiny) -> None:
    tiny("train.steps=4")
    run = tiny.folder / "run"
    weights = run / "checkpoints" / "step-4" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(RecipeError, match=r"step-4 cannot be read \("):
        tiny("train.steps=6")
    weights.write_bytes(content)
    (run / "config.yaml").write_text("just a text")
    with pytest.raises(RecipeError, match=r"config\.yaml cannot be read; it must be the recipe"):
        tiny("train.steps=6")
    (run / "config.yaml").unlink()  # without it there is nothing to compare with, and the checkpoint still counts
    assert [row["step"] for row in tiny("train.steps=6")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_an_older_version_began_continues(tiny, tmp_path: Path) -> None:
    """Its recipe lacks the keys that have come since; their defaults do what it did."""
    tiny("train.steps=3")
    file = tmp_path / "run" / "config.yaml"
    recipe = yaml.safe_load(file.read_text())
    for section, key in (("model", "architecture"), ("train", "label_smoothing"), ("optim", "rho"), ("data", "rows")):
        del recipe[section][key]
    file.write_text(yaml.safe_dump(recipe))
    assert [row["step"] for row in tiny("train.steps=5")] == [1, 2, 3, 4, 5]
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"optim\.rho is 0\.9, and the run in .* was begun with 0\.95"):
        tiny("train.steps=6", "optim.rho=0.9")


def test_differences_are_told_by_key() -> None:
    old = {"train": {"steps": 1, "dtype": "fp32"}, "log": {"every": 1}}
    new = {"train": {"steps": 2, "dtype": "bf16"}, "log": {"every": 2}, "model": {"layers": 3}}
    assert resume.differences(old, new) == [("train.dtype", "fp32", "bf16"), ("model.layers", None, 3)]
    assert resume.differences(old, old) == []


# ------------------------------------------------------------ refusals before anything is written


def test_prompts_that_cannot_be_continued_are_refused(tiny) -> None:
    with pytest.raises(RecipeError) as refused:
        tiny('eval.prompts=[the, ""]', "eval.every=1")
    assert refused.value.problems == ["eval.prompts holds ''; a prompt must have at least one token."]
    assert not (tiny.folder / "run").exists()


def test_the_config_that_is_written_can_be_run(tiny) -> None:
    tiny("train.steps=2")
    written = yaml.safe_load((tiny.folder / "run" / "config.yaml").read_text())
    assert written["train"]["steps"] == 2
    assert written["run"]["dir"] == str(tiny.folder / "run")
