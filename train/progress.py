"""What a training run says on the console: a bar where there is a terminal, a line for each log row where there is none."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Say:
    """Prints on the main rank only. Sentences go above the bar."""

    def __init__(self, main: bool, steps: int, done: int):
        self.main = main
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if main and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("train"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), console=self.console
            )
            self.task = self.bar.add_task("train", total=steps, completed=done, line="")
            self.bar.start()

    def sentence(self, text: str) -> None:
        if self.main:
            self.console.print(text, markup=False)

    def step(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def row(self, row: dict[str, float | int | None], steps: int, left: float) -> None:
        """A log row as a line: loss, lr, gradient norm, tokens/s, MFU, memory, data wait, time left."""
        mfu = row.get("mfu")
        parts = [
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"norm {row['grad_norm']:.2f}",
            f"{row['tokens_per_second']:,.0f} tok/s",
            f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
            f"{row['memory_gib']:.2f} GiB",
            f"data {row['data_wait']:.1%}",
            f"{clock(left)} left",
        ]
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], line=" | ".join(parts))
        elif self.main:
            self.console.print(f"step {row['step']}/{steps} | " + " | ".join(parts), markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """72 -> 1:12, 3672 -> 1:01:12."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
