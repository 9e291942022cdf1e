"""The training run, from a recipe to a model folder.

The data order, the schedule and dropout are functions of the update count, so a checkpoint holds weights, optimizer
state and a few numbers, and the same command continues where the last one stopped. The loss of an update is the sum
over its targets divided by their number in the *global* batch: equal under any split into micro-batches and ranks.
What is learned, from what, and how it is judged is the task's (train/task.py).
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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train import checkpoint, launch, plot, resume, task
from train.checkpoint import Progress
from train.config import Recipe
from train.estimate import peak_flops
from train.metrics import Metrics
from train.optim import make_optimizer
from train.progress import Say, clock
from train.schedule import factor
from train.task import Task
from train.tracking import Tracker


def run(recipe: Recipe) -> int:
    """Train to the end of the recipe, or until a signal asks to stop. Returns the exit status. Raises RecipeError."""
    recipe = launch.settle(recipe)
    here = launch.start(recipe)
    run_dir = Path(recipe.run.dir)
    resume_from = resume.find(recipe, run_dir)
    return Trainer(task.make(recipe), here, run_dir, resume_from).train()


class Trainer:
    """One rank's part of one run."""

    def __init__(self, task: Task, here: launch.Launch, run_dir: Path, resume_from: Path | None):
        self.task, self.here, self.run_dir = task, here, run_dir
        self.recipe = recipe = task.recipe
        torch.manual_seed(recipe.run.seed)  # the same weights on every rank
        self.bare: nn.Module = task.model()
        self.optimizer: Any = make_optimizer(self.bare, recipe.optim)
        self.model, self.optimizer = here.accelerator.prepare(self.bare, self.optimizer)
        self.bare = here.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Without Accelerate's wrapper, which would skip steps of its own.
        self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.progress = Progress()
        if resume_from is not None:
            self.progress = resume.load(resume_from, self.bare, self.optimizer, task.fingerprint)
        self.progress.data = task.fingerprint
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
        self.tracker = Tracker.start(recipe, self.run_dir, self.task.fingerprint, main=here.main)
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

    def _batch(self, update: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an update's global batch, on the device."""
        return [
            {name: tensor.to(self.here.device, non_blocking=True) for name, tensor in batch.items()}
            for batch in self.task.micro_batches(update, self.here.rank, self.here.world)
        ]

    def _update(self, micro_batches: list[dict[str, Tensor]], window: Window) -> None:
        here, recipe, progress = self.here, self.recipe, self.progress
        rate = factor(recipe.schedule, progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if self.task.config.dropout:
            launch.seed_step(recipe.run.seed, progress.step, here.rank)
        targets = self.task.targets(progress.step)  # of the global batch
        for number, micro_batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with nullcontext() if last else here.accelerator.no_sync(self.model):
                loss = self.model(micro_batch, self.task.smoothing)
                # DDP and FSDP average gradients over the ranks; the sum is what is meant.
                here.accelerator.backward(loss.total * (here.world / targets))
            window.loss = window.loss + loss.total.detach()
            window.nll = window.nll + loss.nll
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
        counts, here = self.task.config.parameters(), self.here
        where = f"{launch.device_name(here.device)}, {here.world} process(es)"
        if here.device.type == "cpu":
            where += f", {torch.get_num_threads()} thread(s) each"
        begun = f"continues at step {self.progress.step}" if self.progress.step else "begins"
        if self.recipe.model.from_ is not None and not self.progress.step:
            begun += f" from {self.recipe.model.from_}"
        epochs = self.task.epoch(self.steps)
        self.say.sentence(
            f"{self.run_dir} {begun}: {counts['total']:,} parameters, {self.steps:,} {self.task.describe()} "
            f"({epochs:.2f} epochs), {self.recipe.train.dtype}, on {where}."
        )
        self.say.sentence(self.tracker.describe())

    def _log(self, window: Window, now: float, left: float) -> None:
        loss, nll = (total / window.targets for total in self.here.sum([window.loss, window.nll]))
        seconds = now - window.began
        speed = window.targets / seconds
        mfu = speed * self.task.flops_per_target / (self.peak * self.here.world) if self.peak else None
        bytes_per_target = self.task.bytes_per_target
        row = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "bits_per_byte": nll / math.log(2) / bytes_per_target if bytes_per_target else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": window.norm,
            "tokens_per_second": speed,
            "mfu": mfu,
            "memory_gib": launch.memory_gib(self.here.device),
            "data_wait": window.waited / seconds,
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
        }
        if self.task.smoothing:
            row["nll"] = nll
        if self.metrics is not None:
            self.metrics.log(row)
            self.tracker.log(row)
        self.say.row(row, self.steps, left)

    def _evaluate(self) -> None:
        progress, here = self.progress, self.here
        self.model.eval()
        found = self.task.evaluate(self.model if here.fsdp2 else self.bare, here)
        if found is not None:
            row = {"step": progress.step, "tokens": progress.tokens, **found.row}
            if self.metrics is not None:
                self.metrics.log(row)
                self.tracker.log(row)
            best = progress.best_loss is None or found.loss < progress.best_loss
            self.say.sentence(f"step {progress.step}: {found.says}" + (", the best so far" if best else ""))
            if best:
                progress.best_loss, progress.best_step = found.loss, progress.step
                self._save_folder(self.run_dir / "model")
        if here.main and not here.fsdp2 and (samples := self.task.samples(self.bare)):
            self.tracker.samples(progress.step, list(samples))
            first = samples[0]
            self.say.sentence(f"    {first[0]!r} -> {first[1][:200]!r}")
        self.model.train()
        if here.main:
            plot.loss_curve(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png")

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
            self.task.save(self.bare, folder, weights, dtype, self.run_dir, self.progress.step)
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
        self.loss: Tensor | float = 0.0  # the objective in nats, this rank's
        self.nll: Tensor | float = 0.0  # without label smoothing
        self.targets = 0  # of all ranks
        self.norm: float | None = None  # of the last update's gradient, before clipping
