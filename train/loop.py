"""The training run, from a recipe to a model folder.

The data order, the schedule and dropout are functions of the update count, so a checkpoint holds weights, optimizer
state and a
few numbers, and the same command continues where the last one stopped. The loss of an update is the sum over its
targets divided by their number in the *global* batch: equal under any split into micro-batches and ranks.
"""

from __future__ import annotations

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lm import pretrained
from lm.decoder import Block, DecoderLM
from lm.sampling import SamplingParams
from lm.search import generate
from train import card, checkpoint, launch, origin, plot, resume
from train.checkpoint import Progress
from train.config import Recipe, RecipeError
from train.data import Batches
from train.estimate import peak_flops
from train.evaluate import evaluate
from train.metrics import Metrics
from train.optim import make_optimizer
from train.prepare import Prepared, prepare
from train.progress import Say, clock
from train.schedule import factor
from train.tracking import Tracker


def run(recipe: Recipe) -> int:
    """Train to the end of the recipe, or until a signal asks to stop. Returns the exit status. Raises RecipeError."""
    recipe = launch.settle(recipe)
    here = launch.start(recipe)
    run_dir = Path(recipe.run.dir)
    resume_from = resume.find(recipe, run_dir)
    prepared = prepare(recipe)  # one rank builds, under a lock; the others wait for it
    return Trainer(recipe, here, run_dir, prepared, resume_from).train()


class Trainer:
    """One rank's part of one run."""

    def __init__(
        self, recipe: Recipe, here: launch.Launch, run_dir: Path, prepared: Prepared, resume_from: Path | None
    ):
        self.recipe, self.here, self.run_dir, self.data = recipe, here, run_dir, prepared
        self.config = recipe.decoder_config(prepared.tokenizer.vocab_size)
        self.prompts = _prompts(recipe, prepared)
        self.batches = Batches(
            prepared.train,
            context=recipe.model.context,
            batch_tokens=recipe.train.batch_tokens,
            seed=recipe.run.seed,
            eos_id=prepared.tokenizer.eos_id,
            document_mask=recipe.data.document_mask,
        )
        torch.manual_seed(recipe.run.seed)  # the same weights on every rank
        self.bare = DecoderLM(self.config) if recipe.origin is None else origin.load(recipe)
        self.bare.recompute = recipe.train.activation_checkpointing
        self.optimizer: Any = make_optimizer(self.bare, recipe.optim)
        if recipe.train.compile:
            compile_blocks(self.bare)
        self.model, self.optimizer = here.accelerator.prepare(self.bare, self.optimizer)
        self.bare = here.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.optimizer = getattr(
            self.optimizer, "optimizer", self.optimizer
        )  # Accelerate's wrapper would skip steps of its own
        self.progress = Progress()
        if resume_from is not None:
            self.progress = resume.load(resume_from, self.bare, self.optimizer, prepared.fingerprint)
        self.progress.data = prepared.fingerprint
        self.steps = recipe.total_steps
        self.peak = peak_flops(launch.device_name(here.device), recipe.train.dtype)
        self.stopping = False

    def train(self) -> int:
        recipe, here, progress = self.recipe, self.here, self.progress
        # Killed between its last checkpoint and its folder, a run has all its steps and yet no model.
        if progress.step >= self.steps and not here.any(here.main and not (self.run_dir / "model-last").is_dir()):
            if here.main:
                print(
                    f"{self.run_dir} is finished: {progress.step} steps are done. Its model: {self.run_dir / 'model'}"
                )
            return 0
        if here.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            aside = self.run_dir / f".config.yaml.writing-{os.getpid()}"
            aside.write_text(recipe.to_yaml(), encoding="utf-8")
            aside.replace(self.run_dir / "config.yaml")
        self.metrics = Metrics(self.run_dir, resume_step=progress.step) if here.main else None
        self.tracker = Tracker.start(recipe, self.run_dir, self.data.fingerprint, main=here.main)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self.say = Say(here.main, self.steps, progress.step)
        status = 1
        try:
            self._announce()
            self._loop()
            self._finish()
            status = 0
        finally:
            self.say.close()
            self.tracker.finish(status)
            if self.metrics is not None:
                self.metrics.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return status

    # ------------------------------------------------------------ the loop

    def _loop(self) -> None:
        recipe, progress = self.recipe, self.progress
        began, first = time.perf_counter(), progress.step
        before = progress.seconds
        window = Window()
        self.model.train()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self._batch, progress.step)
            while progress.step < self.steps:
                asked = time.perf_counter()
                micro_batches = waiting.result()
                window.waited += time.perf_counter() - asked
                waiting = pool.submit(self._batch, progress.step + 1)
                self._update(micro_batches, window)
                now = time.perf_counter()
                progress.seconds = before + now - began
                if progress.step % recipe.log.every == 0 or progress.step == self.steps:
                    left = (now - began) / (progress.step - first) * (self.steps - progress.step)
                    self._log(window, now, left)
                    window = Window()
                self.say.step(progress.step)
                stopping = self.here.any(self.stopping)
                due = recipe.eval.every is not None and progress.step % recipe.eval.every == 0
                if due or (recipe.eval.every is not None and progress.step == self.steps):
                    self._evaluate()
                    began += time.perf_counter() - now  # not training time
                    window.began += time.perf_counter() - now
                if progress.step % recipe.checkpoint.every == 0 or progress.step == self.steps or stopping:
                    now = time.perf_counter()
                    self._checkpoint()
                    began += time.perf_counter() - now
                    window.began += time.perf_counter() - now
                if stopping:
                    return

    def _batch(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's rows of the update's global batch, in micro-batches, on the device."""
        total, (rank, world) = self.batches.sequences, (self.here.rank, self.here.world)
        first, last = rank * total // world, (rank + 1) * total // world
        size = self.recipe.train.micro_batch or last - first
        return [
            {
                name: t.to(self.here.device, non_blocking=True)
                for name, t in self.batches.batch(step, slice(row, min(row + size, last))).items()
            }
            for row in range(first, last, size)
        ]

    def _update(self, micro_batches: list[dict[str, Tensor]], window: Window) -> None:
        here, recipe, progress = self.here, self.recipe, self.progress
        rate = factor(recipe.schedule, progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if self.config.dropout:
            launch.seed_step(recipe.run.seed, progress.step, here.rank)
        targets = self.batches.sequences * self.batches.context  # of the global batch; each window is full
        for number, micro_batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with nullcontext() if last else here.accelerator.no_sync(self.model):
                loss, _ = self.model(micro_batch)
                # DDP and FSDP average gradients over the ranks; the sum is what is meant.
                here.accelerator.backward(loss * (here.world / targets))
            window.loss = window.loss + loss.detach()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm):
            if recipe.optim.clip is not None and norm > recipe.optim.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.optim.clip, total)
            self.optimizer.step()
            window.norm = norm
        else:
            progress.skipped += 1
            self.say.sentence(f"step {progress.step + 1}: the gradient is not finite ({norm}); the update is skipped.")
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += targets
        window.targets += targets

    # ------------------------------------------------------------ what is said and kept

    def _announce(self) -> None:
        counts, here = self.config.parameters(), self.here
        where = f"{launch.device_name(here.device)}, {here.world} process(es)"
        if here.device.type == "cpu":
            where += f", {torch.get_num_threads()} thread(s) each"
        begun = f"continues at step {self.progress.step}" if self.progress.step else "begins"
        if self.recipe.model.from_ is not None and not self.progress.step:
            begun += f" from {self.recipe.model.from_}"
        epochs = self.batches.epoch(self.steps)
        self.say.sentence(
            f"{self.run_dir} {begun}: {counts['total']:,} parameters, {self.steps:,} steps of "
            f"{self.recipe.train.batch_tokens:,} tokens "
            f"({epochs:.2f} epochs), {self.recipe.train.dtype}, on {where}."
        )
        self.say.sentence(self.tracker.describe())

    def _log(self, window: Window, now: float, left: float) -> None:
        (loss,) = self.here.sum([window.loss])
        loss /= window.targets
        seconds = now - window.began
        speed = window.targets / seconds
        flops = self.config.flops_per_token(self.batches.context)
        mfu = speed * flops / (self.peak * self.here.world) if self.peak else None
        split = self.data.train
        row = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * len(split) / split.bytes_total if split.bytes_total else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": window.norm,
            "tokens_per_second": speed,
            "mfu": mfu,
            "memory_gib": launch.memory_gib(self.here.device),
            "data_wait": window.waited / seconds,
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
        }
        if self.metrics is not None:
            self.metrics.log(row)
            self.tracker.log(row)
        self.say.row(row, self.steps, left)

    def _evaluate(self) -> None:
        recipe, progress, tokenizer = self.recipe, self.progress, self.data.tokenizer
        if self.data.validation is not None:
            held = evaluate(
                self.model if self.here.fsdp2 else self.bare,
                self.here,
                self.data.validation,
                context=self.batches.context,
                limit=recipe.eval.tokens,
                eos_id=tokenizer.eos_id,
                document_mask=recipe.data.document_mask,
            )
            self.model.train()
            row = {
                "step": progress.step,
                "tokens": progress.tokens,
                "validation_loss": held.loss,
                "validation_bits_per_byte": held.bits_per_byte,
            }
            if self.metrics is not None:
                self.metrics.log(row)
                self.tracker.log(row)
            bits = f", {held.bits_per_byte:.4f} bits a byte" if held.bits_per_byte is not None else ""
            best = progress.best_loss is None or held.loss < progress.best_loss
            self.say.sentence(
                f"step {progress.step}: held-out loss {held.loss:.4f}{bits}" + (", the best so far" if best else "")
            )
            if best:
                progress.best_loss, progress.best_step = held.loss, progress.step
                self._save_folder(self.run_dir / "model")
        if self.here.main and recipe.eval.prompts and not self.here.fsdp2:
            self._sample()
        if self.here.main:
            plot.loss_curve(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png")

    def _sample(self) -> None:
        recipe, tokenizer = self.recipe, self.data.tokenizer
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=recipe.eval.sample_tokens, seed=recipe.run.seed)
        self.bare.eval()
        stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        # Each step of a sample has another shape: compiled blocks would be compiled again for each.
        with torch.compiler.set_stance("force_eager") if recipe.train.compile else nullcontext():
            outputs = generate(self.bare, self.prompts, params, stops)
        self.model.train()
        texts = [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(recipe.eval.prompts, outputs, strict=True)]
        self.tracker.samples(self.progress.step, texts)
        first = texts[0]
        self.say.sentence(f"    {first[0]!r} -> {first[1][:200]!r}")

    def _checkpoint(self) -> None:
        checkpoint.save(
            self.run_dir, self.bare, self.optimizer, self.progress, self.recipe.checkpoint.keep, main=self.here.main
        )
        self.here.wait()

    def _save_folder(self, folder: Path) -> None:
        """The model as a Hugging Face folder, in the dtype that it was trained in."""
        weights = checkpoint.gather(self.bare.state_dict(), self.here.main)
        if self.here.main:
            dtype = torch.bfloat16 if self.recipe.train.dtype == "bf16" else torch.float32
            pretrained.save(
                self.bare,
                folder,
                dtype=dtype,
                tokenizer=self.data.tokenizer,
                weights=weights,
                extra={"README.md": card.write(self.recipe, self.config, self.data, self.run_dir, self.progress.step)},
                **origin.kept(self.recipe, self.data.tokenizer),
            )
        self.here.wait()

    def _finish(self) -> None:
        progress = self.progress
        if progress.step < self.steps:
            self.say.sentence(
                f"Stopped by a signal at step {progress.step}, with a checkpoint. The same command continues."
            )
            return
        self._save_folder(self.run_dir / "model-last")
        if progress.best_loss is None:
            self._save_folder(self.run_dir / "model")
        if self.here.main:
            plot.loss_curve(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png")
            figures: dict[str, object] = {
                "steps": progress.step,
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "skipped": progress.skipped,
            }
            if progress.best_loss is not None:
                figures |= {"best_validation_loss": progress.best_loss, "best_step": progress.best_step}
            self.tracker.summary(figures)
            self.tracker.image(progress.step, "train/loss_curve", self.run_dir / "loss.png")
        self.say.sentence(f"Done in {clock(progress.seconds)} of training. The model is {self.run_dir / 'model'}.")

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True


class Window:
    """What is summed between two log rows."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds without a batch
        self.loss: Tensor | float = 0.0  # nats, this rank's
        self.targets = 0  # of all ranks
        self.norm: float | None = None  # of the last update's gradient, before clipping


def compile_blocks(model: DecoderLM) -> None:
    """torch.compile for what stands before and after attention in a block: one compilation serves every layer."""
    for block in model.layers:
        assert isinstance(block, Block)
        block.before = torch.compile(block.before)  # type: ignore[method-assign]
        block.after = torch.compile(block.after)  # type: ignore[method-assign]


def _prompts(recipe: Recipe, prepared: Prepared) -> list[list[int]]:
    """eval.prompts as ids, at most half a context of each. Raises RecipeError for one that cannot be continued."""
    context = recipe.model.context
    prompts = [prepared.tokenizer.encode(prompt)[-max(1, context // 2) :] for prompt in recipe.eval.prompts]
    problems = [
        f"eval.prompts holds {text!r}; a prompt must have at least one token."
        for text, ids in zip(recipe.eval.prompts, prompts, strict=True)
        if not ids
    ]
    if prompts and context < 2:
        problems.append(f"model.context is {context}; it must be at least 2 to continue eval.prompts.")
    if problems:
        raise RecipeError(problems)
    return prompts
