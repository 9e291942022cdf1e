"""The wandb mirror of a run: online with a key, offline without one, and never a reason for a run to end.

metrics.jsonl is the truth (train/metrics.py). wandb gets the same rows under grouped names, each with its own `step`:
wandb's internal counter only moves forward, so after a resume it would drop the repeated steps; with `step` as the axis
of every chart they are kept, beside the rows that they repeat.
"""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from train.config import Recipe

ID_FILE = "wandb_id"
# Where a metrics.jsonl key stands in wandb; a key that is not here is a figure of training, `train/KEY`.
PERFORMANCE = frozenset({"tokens_per_second", "mfu", "memory_gib", "data_wait", "seconds"})


def grouped(key: str) -> str:
    """The wandb name of a metrics.jsonl key: `train/loss`, `eval/loss` for `validation_loss`, `perf/mfu`; or `step`."""
    if key == "step":
        return key
    if key.startswith("validation_"):
        return "eval/" + key.removeprefix("validation_")
    return ("perf/" if key in PERFORMANCE else "train/") + key


class Tracker:
    """Sends rows, samples and pictures to one wandb run. Every method is safe to call when tracking is off."""

    def __init__(self, run: Any = None) -> None:
        """`run` is a started wandb run, or None for a tracker that does nothing (another rank, `log.wandb` null)."""
        self._run = run
        self._samples: list[tuple[Any, ...]] = []

    @classmethod
    def start(cls, recipe: Recipe, run_dir: str | Path, fingerprint: str, *, main: bool) -> Tracker:
        """Starts or continues the run whose id stands in RUN/wandb_id; the whole recipe is its config.

        WANDB_MODE is obeyed; without it the run is online where an API key or a login for the server is found, else
        offline. It never asks a question. Where wandb cannot start, one sentence says so and the tracker does nothing.
        """
        if not main or not recipe.log.wandb or os.environ.get("WANDB_MODE") == "disabled":
            return cls()
        run_dir = Path(run_dir)
        config = {**recipe.to_dict(), "data_fingerprint": fingerprint}
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE") or (
                "online" if _has_login(wandb.setup().settings.base_url) else "offline"
            )
            modes = ["offline"] if mode in ("offline", "dryrun") else [mode, "offline"]
            for attempt in modes:
                try:
                    return cls(_init(wandb, recipe, run_dir, config, attempt))
                except Exception as error:
                    if attempt == modes[-1]:
                        raise
                    _warn(f"wandb could not start {attempt} ({_sentence(error)}), so this run is logged offline")
                    wandb.teardown()  # the failed attempt still holds the run's id
        except Exception as error:  # whatever wandb raises: a run is worth more than its mirror
            _warn(f"wandb could not start ({_sentence(error)}); the run goes on, its figures are in metrics.jsonl")
        return cls()

    def describe(self) -> str:
        """One line for the console: where the run can be seen, or how it is uploaded."""
        if self._run is None:
            return "wandb: off"
        if self._run.offline:
            return f"wandb: offline; upload the run with `{sync_command(Path(self._run.dir).parents[2])}`"
        return f"wandb: {self._run.url}"

    def log(self, row: Mapping[str, object]) -> None:
        """One metrics.jsonl row; values that are None are left out."""
        self._safely(lambda run: run.log({grouped(key): value for key, value in row.items() if value is not None}))

    def samples(self, step: int, samples: Iterable[tuple[str, ...]]) -> None:
        """What the model wrote at `step`, as (prompt, completion), or (source, translation, reference). The table
        grows: the last one has them all."""
        self._samples += [(step, *sample) for sample in samples]

        def send(run: Any) -> None:
            import wandb

            columns = ["step", "prompt", "completion"]
            if self._samples and len(self._samples[0]) > len(columns):
                columns = ["step", "source", "translation", "reference"]
            table = wandb.Table(columns=columns, data=[list(row) for row in self._samples])
            run.log({"eval/samples": table, "step": step})

        self._safely(send)

    def image(self, step: int, name: str, path: str | Path) -> None:
        """A picture file under the name `name`, for example `train/loss_curve`."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path)), "step": step})

        self._safely(send)

    def summary(self, figures: Mapping[str, object]) -> None:
        """Final figures, shown as the run's columns in wandb's table of runs."""
        self._safely(lambda run: run.summary.update({f"final/{key}": value for key, value in figures.items()}))

    def finish(self, exit_code: int = 0) -> None:
        """Ends the wandb run; `exit_code` other than 0 marks it as failed. Later calls do nothing."""
        self._safely(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _safely(self, send: Callable[[Any], object]) -> None:
        """Calls wandb; its first failure is said once and ends the tracking, not the run."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # as in start
            self._run = None
            _warn(f"wandb stopped ({_sentence(error)}); the run goes on, its figures are in metrics.jsonl")


def sync_command(run_dir: str | Path) -> str:
    """The command that uploads a run's offline data: all its parts, in the order in which they were written."""
    return f"wandb sync {_shown(Path(run_dir))}/wandb/offline-run-*"


def _init(wandb: Any, recipe: Recipe, run_dir: Path, config: dict[str, Any], mode: str) -> Any:
    """One `wandb.init`. Quiet, because the trainer's own lines say what there is to say; no console capture, because a
    progress bar is no log."""
    run_dir.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=recipe.log.wandb,
        group=recipe.log.group,
        tags=list(recipe.log.tags or []) or None,
        name=run_dir.resolve().name,
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=config,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _run_id(run_dir: Path) -> str:
    """The id in RUN/wandb_id, made on the first start, so that every resume continues one wandb run."""
    path = run_dir / ID_FILE
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh


def _has_login(base_url: str) -> bool:
    """Whether wandb would find credentials for its server: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(base_url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _shown(path: Path) -> str:
    """A path as a person would type it: relative to where they are, when it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _sentence(error: Exception) -> str:
    """The first line of what an error says, without its final stop."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}.", file=sys.stderr, flush=True)
