"""A progress bar for work whose size is known or not; nothing at all where the output is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, size: int | None, unit: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error while the block runs, and give the function that takes how much is done by now.

    `size` None: unknown, the bar pulses. `unit`: "bytes" are shown as kB, MB, ...; others are counted.
    """
    if not show or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount, progress.TimeRemainingColumn())
    # What the block writes to standard output must stay there: rich would show it above the bar, on standard error.
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(what, total=size)
        yield lambda done: bars.update(task, completed=done)
