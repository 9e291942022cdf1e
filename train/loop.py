"""The training run, from a recipe to a model folder.

The data order, the schedule and dropout are functions of the update count, so a checkpoint holds weights, optimizer
state and a few numbers, and the same command continues where the last one stopped. The loss of an update is the sum
over its targets divided by their number in the *global* batch: equal under any split into micro-batches and ranks.
What is learned, from what, and how it is judged is the task's (train/task.py).
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train import average, checkpoint, launch, plot, resume, task
from train.checkpoint import Progress
from train.config import Recipe, RecipeError
from train.estimate import peak_flops
from train.guard import Diverged, Guard
from train.keeper import Keeper
from train.metrics import Metrics
from train.optim import make_optimizer
from train.progress import Say, clock
from train.schedule import factor
from train.signals import Signals
from train.task import Task
from train.tracking import Tracker
from train.window import Window

SLOW = 5.0  # seconds of an update above which ranks ask each other between its micro-batches whether to stop


def run(recipe: Recipe, signals: Signals | None = None) -> int:
    """Train to the end of the recipe, or until a signal asks to stop. Returns the exit status.

    Raises RecipeError for what cannot run, signals.Interrupted for a signal before the first update, guard.Diverged.
    """
    recipe = launch.settle(recipe)
    run_dir = Path(recipe.run.dir)
    with nullcontext(signals) if signals is not None else Signals() as signals:
        here = launch.start(recipe)
        with here.watch, resume.Claim(recipe, run_dir, here) as claim:
            learned = task.make(recipe)
            found = claim.checkpoint.name if claim.checkpoint else None
            here.agree("data", the_prepared_data=learned.fingerprint, the_checkpoint_to_continue_from=found)
            return Trainer(learned, here, run_dir, claim.checkpoint, signals).train()


class Trainer:
    """One rank's part of one run."""

    def __init__(self, task: Task, here: launch.Launch, run_dir: Path, resume_from: Path | None, signals: Signals):
        self.task, self.here, self.run_dir, self.signals = task, here, run_dir, signals
        here.stopping = lambda: signals.number is not None
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
        self.guard = Guard(recipe.optim.spike, self.progress.guard)
        self.window = Window(self.progress.window)
        self.keeper = Keeper(
            here, run_dir, recipe.checkpoint, self.bare, self.optimizer, self.progress, self._bring_progress
        )
        self.stop = self.due = self.slow = False  # what the ranks agreed on in the last update

    def train(self) -> int:
        recipe, here, progress = self.recipe, self.here, self.progress
        if progress.step >= self.steps and not here.any(here.main and not self._has_its_folder()):
            if here.main:
                print(
                    f"{self.run_dir} is finished: {progress.step} steps are done. Its model: {self.run_dir / 'model'}"
                )
            return 0
        self._open()
        if here.main:
            self.signals.at_once = lambda: checkpoint.clean(self.run_dir)
        self.tracker = Tracker.start(recipe, self.run_dir, self.task.fingerprint, main=here.main)
        self.say = Say(here.main, self.steps, progress.step)
        status = 1
        try:
            self._announce()
            self._loop()
            status = self._finish()
        finally:
            self.keeper.close()
            self.say.close()
            self.tracker.finish(0 if status == self.signals.status else status)  # stopped is not failed
            if self.metrics is not None:
                self.metrics.close()
        return status

    def _has_its_folder(self) -> bool:
        """Whether a run that has all its steps has their model too. Killed between its last checkpoint and its folder
        it has none or, if it was once shorter, an older one."""
        try:
            written = (self.run_dir / "model-last" / "config.json").stat().st_mtime_ns
            return written >= (checkpoint.folder(self.run_dir, self.progress.step) / "state.json").stat().st_mtime_ns
        except OSError:
            return False

    def _open(self) -> None:
        """The files of the run's folder. Raises RecipeError, on every rank, where it cannot be written."""
        self.metrics: Metrics | None = None
        problem = None
        if self.here.main:
            aside = self.run_dir / f".config.yaml.writing-{os.getpid()}"
            try:
                checkpoint.clean(self.run_dir)
                aside.write_text(self.recipe.to_yaml(), encoding="utf-8")
                aside.replace(self.run_dir / "config.yaml")
                self.metrics = Metrics(self.run_dir, self.progress.step, self._is_made_again)
            except OSError as error:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
                problem = f"run.dir is {self.run_dir}, and it cannot be written ({error.strerror or error})."
        if self.here.any(problem is not None):
            raise RecipeError([problem] if problem else [])

    def _is_made_again(self, row: dict[str, Any]) -> bool:
        """Whether a row is of an evaluation that was made after the checkpoint, at its step."""
        if row["step"] != self.progress.step or "validation_loss" not in row:
            return False
        return self.progress.step >= self.steps if "averaged" in row else self._evaluation_is_due()

    # ------------------------------------------------------------ the loop

    def _loop(self) -> None:
        recipe, progress = self.recipe, self.progress
        self.model.train()
        if self._evaluation_is_due() and not self._evaluate():  # the run was stopped in it, and is again
            return
        began, first = time.perf_counter(), progress.step
        before = progress.seconds
        self.window.began = began
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self._batch, progress.step)
            while progress.step < self.steps:
                self.here.watch.at(f"update {progress.step + 1}")
                asked = time.perf_counter()
                micro_batches = waiting.result()
                self.window.waited += time.perf_counter() - asked
                waiting = pool.submit(self._batch, progress.step + 1)
                if not self._update(micro_batches, self.window):
                    return
                self.signals.training()
                now = time.perf_counter()
                progress.seconds = before + now - began
                if progress.step % recipe.log.every == 0 or progress.step == self.steps:
                    left = (now - began) / (progress.step - first) * (self.steps - progress.step)
                    self._log(self.window, now, left)
                    self.window = Window()
                self.say.step(progress.step)
                if self.stop or (self._evaluation_is_due() and not self._evaluate()):
                    return
                if progress.step < self.steps:
                    self.keeper.after_update(self.due, healthy=self.guard.streak == 0)
                if problem := self.keeper.problem():
                    self.say.sentence(f"step {progress.step}: {problem}")
                began += time.perf_counter() - now  # not training time
                self.window.began += time.perf_counter() - now

    def _batch(self, update: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an update's global batch, on the device."""
        return [
            {name: tensor.to(self.here.device, non_blocking=True) for name, tensor in batch.items()}
            for batch in self.task.micro_batches(update, self.here.rank, self.here.world)
        ]

    def _update(self, micro_batches: list[dict[str, Tensor]], window: Window) -> bool:
        """One update, or none where its numbers are bad. False: given up, because a rank is asked to stop."""
        here, recipe, progress = self.here, self.recipe, self.progress
        began = time.perf_counter()
        rate = factor(recipe.schedule, progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if self.task.config.dropout:
            launch.seed_step(recipe.run.seed, progress.step, here.rank)
        targets = self.task.targets(progress.step)  # of the global batch
        checks = self._checks(len(micro_batches))
        loss: Tensor | float = 0.0
        nll: Tensor | float = 0.0
        for number, micro_batch in enumerate(micro_batches, 1):
            if number <= checks and here.any(here.stopping()):
                self.optimizer.zero_grad(set_to_none=True)
                return False
            last = number == len(micro_batches)
            if last:
                here.watch.arrive()  # its gradients wait for the other ranks'
            with nullcontext() if last else here.accelerator.no_sync(self.model):
                found = self.model(micro_batch, self.task.smoothing)
                # DDP and FSDP average gradients over the ranks; the sum is what is meant.
                here.accelerator.backward(found.total * (here.world / targets))
            loss, nll = loss + found.total.detach(), nll + found.nll
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm: Any = total.full_tensor() if isinstance(total, DTensor) else total
        # One exchange an update tells every rank the same: what to judge by, and what to do after it.
        loss, nll, norm, stop, due, seconds = here.sum(
            [loss, nll, norm, here.stopping(), self.keeper.due(), time.perf_counter() - began]
        )
        loss, nll, norm = loss / targets, nll / targets, norm / here.world
        self.stop, self.due, self.slow = stop > 0, due > 0, seconds / here.world > SLOW
        reason = self.guard.judge(loss, norm)
        self.keeper.prove(reason is None)
        if reason is None:
            if recipe.optim.clip is not None and norm > recipe.optim.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.optim.clip, total)
            self.optimizer.step()
            window.add(loss, nll, norm, targets)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += targets
        window.targets += targets
        if reason is not None:
            self._skip(reason, loss, norm)
        return True

    def _checks(self, own: int) -> int:
        """Before how many of its micro-batches a rank asks whether to stop: equally many on each. Where updates are
        short, before none: at their end it is asked anyway."""
        here = self.here
        if here.world == 1:
            return own
        return int(min(here.sum([own * (rank == here.rank) for rank in range(here.world)]))) if self.slow else 0

    def _bring_progress(self) -> None:
        self.progress.guard, self.progress.window = self.guard.state(), self.window.state()

    def _skip(self, reason: str, loss: float, norm: float) -> None:
        """An update was left out: count it, say it, and end the run after too many in a row. Raises Diverged."""
        progress, most = self.progress, self.recipe.optim.max_skips
        progress.skipped += 1
        self.say.sentence(f"step {progress.step}: {reason}; the update is skipped.")
        self._record(
            {"step": progress.step, "tokens": progress.tokens, "skip": reason, "skip_loss": loss, "skip_norm": norm}
        )
        if self.guard.streak < most:
            return
        self.keeper.close()
        raise Diverged(
            f"{most} updates in a row were skipped, the last because {reason}; the run stops at step {progress.step}. "
            f"Of its checkpoints {self.keeper.newest()}. A lower rate, a longer warm-up or cleaner data may help "
            "(optim.lr, schedule.warmup); optim.max_skips says how many are too many."
        )

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
        loss, nll = window.means()
        seconds = now - window.began
        speed = window.targets / seconds
        mfu = speed * self.task.flops_per_target / (self.peak * self.here.world) if self.peak else None
        bytes_per_target = self.task.bytes_per_target
        row: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "bits_per_byte": nll / math.log(2) / bytes_per_target if bytes_per_target and nll is not None else None,
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
        self._record(row)
        self.say.row(row, self.steps, left)

    def _record(self, row: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        known = self.metrics.problem
        self.metrics.log(row)
        self.tracker.log(row)
        if self.metrics.problem and not known:
            self.say.sentence(
                f"step {row['step']}: metrics.jsonl could not be written ({self.metrics.problem}); the rows are kept "
                "until it can."
            )

    def _evaluation_is_due(self) -> bool:
        every, step = self.recipe.eval.every, self.progress.step
        if every is None or step == 0 or self.progress.evaluated == step:
            return False
        return step % every == 0 or step >= self.steps

    def _evaluate(self) -> bool:
        """Held-out loss, and the folder of the best model. False: given up, because a rank is asked to stop; the run
        that continues begins with it."""
        progress, here = self.progress, self.here
        here.watch.at(f"the evaluation after update {progress.step}")
        self.model.eval()
        try:
            found = self.task.evaluate(self.model if here.fsdp2 else self.bare, here)
        except launch.Abandoned:
            return False
        finally:
            self.model.train()
        if found is not None:
            self._record({"step": progress.step, "tokens": progress.tokens, **found.row})
            # What is not a number is no best: nothing would ever be below it.
            best = math.isfinite(found.loss) and (progress.best_loss is None or found.loss < progress.best_loss)
            self.say.sentence(f"step {progress.step}: {found.says}" + (", the best so far" if best else ""))
            if best and (why := self._save_folder(self.run_dir / "model")) is not None:
                self.say.sentence(f"step {progress.step}: its folder could not be written ({why}); the run goes on.")
            elif best:
                progress.best_loss, progress.best_step = found.loss, progress.step
        if here.main and not here.fsdp2 and not here.stopping():
            self._show_samples()
        self._draw()
        progress.evaluated = progress.step
        return True

    def _show_samples(self) -> None:
        self.model.eval()
        if samples := self.task.samples(self.bare):
            self.tracker.samples(self.progress.step, list(samples))
            first = samples[0]
            self.say.sentence(f"    {first[0]!r} -> {first[1][:200]!r}")
        with suppress(OSError):  # a full disk: there are others later
            for name, path in self.task.pictures(self.bare, self.run_dir, self.progress.step):
                self.tracker.image(self.progress.step, name, path)
        self.model.train()

    def _draw(self) -> None:
        if self.here.main:
            with suppress(OSError):  # a full disk: there is another picture later
                plot.loss_curve(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png")

    def _save_folder(self, folder: Path) -> str | None:
        """The model as a Hugging Face folder, in the dtype that it was trained in. Why it failed, on every rank."""
        weights = checkpoint.gather(self.bare.state_dict(), self.here.main)
        problem = None
        if self.here.main:
            dtype = torch.bfloat16 if self.recipe.train.dtype == "bf16" else torch.float32
            try:
                self.task.save(self.bare, folder, weights, dtype, self.run_dir, self.progress.step)
            except (OSError, SafetensorError) as error:
                problem = str(getattr(error, "strerror", None) or error)
        failed = self.here.any(problem is not None)
        return problem or ("the main rank could not write" if failed else None)

    def _save_average(self, folder: Path) -> str | None:
        """The mean of the last checkpoints' weights, evaluated and saved; the model's stay what they are. Every rank
        reads them, as it would to continue. Why it failed, on every rank."""
        assert self.recipe.checkpoint.average is not None
        progress, here, parameters = self.progress, self.here, dict(self.bare.named_parameters())
        here.watch.at("the average of the last checkpoints")
        folders, problems = average.whole(checkpoint.lasting(self.run_dir))
        folders = folders[: self.recipe.checkpoint.average]
        for problem in problems:
            self.say.sentence(f"{problem} It is left out of the average.")
        unread = None
        try:
            mean = average.average(folders)
        except checkpoint.CheckpointError as error:
            unread = str(error)
        if here.any(unread is not None):  # before the ranks evaluate together
            return unread or "another rank cannot read the checkpoints"
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            checkpoint.put(mean, parameters)
            self.model.eval()
            with suppress(launch.Abandoned):
                found = self.task.evaluate(self.model if here.fsdp2 else self.bare, here)
                if found is not None:
                    row = {"step": progress.step, "tokens": progress.tokens, "averaged": len(folders), **found.row}
                    self._record(row)
                    self.say.sentence(f"the average of the last {len(folders)} checkpoints: {found.says}")
            return self._save_folder(folder)
        finally:
            self.model.train()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])

    def _finish(self) -> int:
        """The last checkpoint, and after the last step the model's folder. Returns the exit status."""
        progress = self.progress
        ended = progress.step >= self.steps  # beyond, where a later command has asked for fewer
        why = self.keeper.save(ephemeral=not ended)
        if why is not None:
            self.say.sentence(
                f"Ended at step {progress.step}, and its checkpoint could not be written ({why}); "
                f"{self.keeper.newest()}. What was there stays, and the same command continues."
            )
            return 1
        if not ended or self._evaluation_is_due():  # which was given up for the signal
            by = self.signals.why or "by a signal to another rank"
            self.say.sentence(f"Stopped {by} at step {progress.step}, with a checkpoint. The same command continues.")
            return self.signals.status
        averaged = self.recipe.checkpoint.average is not None
        folders = ["model"] * (averaged or progress.best_loss is None) + ["model-last"]
        for name in folders:
            save = self._save_average if averaged and name == "model" else self._save_folder
            if (why := save(self.run_dir / name)) is not None:
                self.say.sentence(
                    f"All {progress.step} steps are done, and {self.run_dir / name} could not be written ({why}). The "
                    "checkpoint stands; the same command writes it."
                )
                return 1
        self._draw()
        if self.here.main:
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
        return 0
