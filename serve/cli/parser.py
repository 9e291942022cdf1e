"""argparse with one sentence for what is wrong, without the whole usage before it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

UNKNOWN = "unrecognized arguments"


class UsageError(Exception):
    """The command line cannot be: one sentence."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError. Flags may be written with underscores, as vLLM takes them; abbreviations are none."""

    def __init__(self, **settings: object) -> None:
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        if message.startswith(UNKNOWN):
            message += "; the other flags of vLLM are for --engine vllm"
        raise UsageError(message)

    def flag(self, name: str) -> argparse.Action | None:
        """The flag of that name, without its dashes."""
        return self._option_string_actions.get(f"--{name}")


def dashed(argv: Sequence[str]) -> list[str]:
    """--max_model_len=8 as --max-model-len=8; values are left as they are."""

    def spell(word: str) -> str:
        match = re.match(r"--[a-z][a-z0-9_-]*", word)
        return word if match is None else match[0].replace("_", "-") + word[match.end() :]

    return [spell(word) for word in argv]
