"""What a training run says on the console: a bar where there is a terminal, else a line for each log row."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class Bar(Progress):
    """A bar with the figures on a line of their own, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["line"], no_wrap=True, overflow="ellipsis")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read along has stopped; rich would end the process."""


class Say:
    """Prints on the main rank only. Sentences go above the bar. A terminal that is gone is no reason to stop."""

    def __init__(self, main: bool, steps: int, done: int):
        self.main = main
        self.console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar: Bar | None = None
        if main and self.console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("train", total=steps, completed=done, line="", left="")
            self.bar.start()

    def sentence(self, text: str) -> None:
        if self.main:
            with suppress(OSError):
                self.console.print(text, markup=False)

    def step(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def row(self, row: dict[str, Any], steps: int, left: float) -> None:
        """A log row as a line: loss, lr, gradient norm, tokens/s, MFU, memory, data wait, time left."""
        mfu, norm, loss = row.get("mfu"), row.get("grad_norm"), row["loss"]
        parts = [
            f"loss {loss:.4f}" if loss is not None else "loss n/a",  # no update since the last row was made
            f"lr {row['lr']:.2e}",
            f"norm {norm:.2f}" if norm is not None else "norm n/a",
            f"{row['tokens_per_second']:,.0f} tok/s",
            f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
            f"{row['memory_gib']:.2f} GiB",
            f"data {row['data_wait']:.1%}",
        ]
        remaining = f"{clock(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], line="  ".join(parts), left=remaining)
        elif self.main:
            self.sentence(f"step {row['step']}/{steps} | " + " | ".join([*parts, remaining]))

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.stop()


def clock(seconds: float) -> str:
    """72 -> 1:12, 3672 -> 1:01:12."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
