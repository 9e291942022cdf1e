"""What the verbs share when they write to standard output."""

from __future__ import annotations

import os
import sys


def reader_left() -> None:
    """After BrokenPipeError: the reader has had enough, as `| head` has. Python would complain of it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
