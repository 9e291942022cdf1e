"""`accelerate launch -m train CONFIG [key=value ...]`, and the other verbs, such as `python -m train evaluate ...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.signals import Signals

# Before torch is imported: a thread that waits for another spins for some microseconds, which bridges the gap between
# two operations, and then sleeps. By default it spins far longer; where another program wants the core (a browser on a
# laptop), each of a step's hundreds of small operations then takes as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Where a rank is gone, torch's own warnings would bury the sentence that says which.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

VERBS = {  # each module has main(argv) -> exit status; a bare CONFIG trains
    "evaluate": "train.perplexity",
    "dashboard": "train.dashboard",
    "preflight": "train.preflight",
}

USAGE = """usage: accelerate launch -m train CONFIG [section.key=value ...] [--dry-run]
       python -m train evaluate FOLDER --text FILE [--context N] [--stride N] [--tokens N] [--dtype DTYPE]
       python -m train evaluate FOLDER --source FILE --target FILE [--beam N] [--length-penalty ALPHA] [--tokenize KIND]
       python -m train dashboard ...
       python -m train preflight CONFIG [section.key=value ...] --nodes N --node R --address HOST:PORT [--seconds S]

CONFIG is a recipe such as configs/demo.yaml, where every key is explained. --dry-run prints what the run would be."""


def main(argv: list[str] | None = None) -> int:
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read has read enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 128 + signal.SIGPIPE


def _main(argv: list[str]) -> int:
    if argv and argv[0] in VERBS:
        return importlib.import_module(VERBS[argv[0]]).main(argv[1:])
    options = [word for word in argv if word.startswith("-")]
    if "-h" in options or "--help" in options:
        print(USAGE)
        return 0
    words = [word for word in argv if not word.startswith("-")]
    unknown = [option for option in options if option != "--dry-run"]
    if unknown or not words or "=" in words[0]:
        problem = f"{unknown[0]} is not an option." if unknown else "a recipe file must come first."
        print(f"{problem}\n\n{USAGE}", file=sys.stderr)
        return 2
    return train(words[0], words[1:], dry_run="--dry-run" in options)


def train(path: str, overrides: list[str], *, dry_run: bool) -> int:
    from train.signals import Interrupted, Signals, sentence

    with Signals() as signals:  # before the imports that take seconds
        try:
            return _train(path, overrides, signals, dry_run=dry_run)
        except Interrupted:
            print(sentence(signals), file=sys.stderr)
            return signals.status


def _train(path: str, overrides: list[str], signals: Signals, *, dry_run: bool) -> int:
    from train.config import RecipeError, load
    from train.guard import Diverged

    try:
        recipe = load(path, overrides)
        if dry_run:
            from train.estimate import main_dry_run
            from train.launch import settle

            print("\n".join(main_dry_run(settle(recipe))))
            return 0
        from train.loop import run

        return run(recipe, signals)
    except RecipeError as error:
        _complain(error.problems)
        return 2
    except Diverged as error:
        _complain([str(error)])
        return 1


def _complain(problems: list[str]) -> None:
    """On the screen, once for all ranks of a machine, which find the same; and in the launcher's table."""
    from train.watch import tell_launcher

    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in problems:
            print(problem, file=sys.stderr)
    tell_launcher(" ".join(problems))


if __name__ == "__main__":
    sys.exit(main())
