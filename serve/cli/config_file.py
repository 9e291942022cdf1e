"""--config FILE: flags as YAML, in vLLM's form, each key a flag without its dashes. `model` is MODEL itself.

model: runs/demo/model
port: 8001
max-model-len: 32k
enable-prefix-caching: false
override-generation-config: {temperature: 0.5}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from serve.cli.parser import Parser, UsageError

MODEL = "model"


def read(file: str, parser: Parser) -> argparse.Namespace:
    """What the command line would be parsed to if it said what the file says.

    Raises UsageError, which names file, key and value.
    """
    import yaml

    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        place = f", line {where.line + 1}" if where is not None else ""
        raise UsageError(f"--config {file} is not YAML{place}: {getattr(error, 'problem', error)}") from None
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UsageError(f"--config {file} is a {type(given).__name__}; it must be keys with values, as `port: 8000`")
    model: list[str] = []
    flags: list[str] = []
    for key, value in given.items():
        name = str(key).replace("_", "-")
        if name == MODEL:
            if not isinstance(value, str):
                raise UsageError(f"{file}: model is {value!r} and must be a folder or a GGUF file")
            model = [value]
        else:
            flags += _words(file, name, value, parser)
    return parser.parse_args([*model, *flags])


def _words(file: str, name: str, value: Any, parser: Parser) -> list[str]:
    """One key as a flag, tried on the parser, so that what is wrong is told with its place."""
    flag = parser.flag(name)
    if flag is None or name in ("config", "help"):
        raise UsageError(f"{file}: {_shown(name)} is no flag that a file can have (its value is {_shown(value)})")
    made = _spelled(flag, name, value)
    try:
        if made is None:
            raise UsageError("the value must be true or false" if flag.nargs == 0 else "there is no value")
        parser.parse_args([MODEL, *made])
    except UsageError as error:
        raise UsageError(f"{file}: {name} is {_shown(value)}: {error}") from None
    return made


def _spelled(flag: argparse.Action, name: str, value: Any) -> list[str] | None:
    """The words of the command line that say it; None where it has none."""
    if flag.nargs == 0:
        if not isinstance(value, bool):
            return None
        off = [f"--no-{name}"] if isinstance(flag, argparse.BooleanOptionalAction) else []
        return [f"--{name}"] if value else off
    if value is None or (isinstance(value, list) and not value):
        return None
    if flag.nargs in ("+", "*"):
        return [f"--{name}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
    text = json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
    return [f"--{name}={text}"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
