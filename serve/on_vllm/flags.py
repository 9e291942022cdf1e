"""Our flags as `vllm serve` takes them: the same names pass unchanged, also all that only vLLM has.

What vLLM spells otherwise is spelled so, what only the native engine has is refused with vLLM's way, and where our
defaults are the safer ones (loopback, a bounded queue, a drain) they are said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve.api.server import ServerConfig
from serve.cli.parser import UsageError, dashed

ENGINE, DRY_RUN, CONFIG = "--engine", "--dry-run", "--config"
SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-q": "--quantization",
}

# Flags of the native engine alone: what is done about it with vLLM.
NATIVE = {
    "--max-body-bytes": "vLLM has no such limit; a router before it has (nginx: client_max_body_size)",
    "--max-connections": "vLLM has no such limit; a router before it has (nginx: worker_connections, limit_conn)",
    "--client-timeout": "vLLM waits for ever; a router before it does not (nginx: client_body_timeout)",
    "--allowed-hosts": "vLLM looks at no Host header; a router before it does (nginx: server_name)",
    "--batch-invariant": "vLLM's way is the environment variable VLLM_BATCH_INVARIANT=1, on the GPUs it supports",
    "--no-batch-invariant": "vLLM's way is the environment variable VLLM_BATCH_INVARIANT, off unless it is set",
    "--no-disable-log-stats": "vLLM logs statistics unless --disable-log-stats is given",
}


class Flag(NamedTuple):
    """A flag with its dashes, and the words that follow it."""

    name: str
    values: tuple[str, ...]


class CommandLine(NamedTuple):
    """MODEL, and all flags in order, those of --config first: the last of a name counts."""

    model: str
    flags: tuple[Flag, ...]

    def get(self, name: str) -> tuple[str, ...] | None:
        """The words of a flag; None where it is not given."""
        return next((flag.values for flag in reversed(self.flags) if SHORT.get(flag.name, flag.name) == name), None)

    def number(self, name: str, default: int) -> int:
        """Raises UsageError for what is no whole number of at least 1."""
        words = self.get(name)
        if words is None:
            return default
        if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 1:
            raise UsageError(f"{name} is {' '.join(words)!r} and must be a whole number of at least 1")
        return int(words[0])


def wants_vllm(argv: Sequence[str]) -> bool:
    """Whether --engine vllm is asked for, on the command line or in the file of --config."""
    try:
        chosen = [flag.values for flag in _read(argv)[1] if flag.name == ENGINE]
    except UsageError:  # the native command line says what is wrong
        return False
    return bool(chosen) and chosen[-1][:1] == ("vllm",)


def read(argv: Sequence[str]) -> CommandLine:
    """Raises UsageError where MODEL is missing or a file cannot be read."""
    words, flags = _read(argv)
    # `--engine vllm MODEL` is as clear as MODEL before all flags; behind another flag it might be a value of that.
    for flag in flags:
        if flag.name == ENGINE:
            words += flag.values[1:]
    if len(words) != 1:
        wrong = f"{' '.join(words)} cannot be MODEL" if words else "MODEL is missing"
        raise UsageError(f"{wrong}: with --engine vllm one folder stands before all flags")
    return CommandLine(words[0], tuple(flags))


def _read(argv: Sequence[str]) -> tuple[list[str], list[Flag]]:
    model, given = _split(dashed(argv))
    from_file: list[Flag] = []
    for flag in given:
        if flag.name == CONFIG:
            if len(flag.values) != 1:
                raise UsageError(f"--config is {' '.join(flag.values)!r} and must be one file")
            named, from_file = _file(flag.values[0])
            model = model or named
    return model, [*from_file, *(flag for flag in given if flag.name != CONFIG)]


def _split(words: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """What stands before the first flag, and the flags."""
    model: list[str] = []
    flags: list[Flag] = []
    for word in words:
        if match := re.fullmatch(r"(--?[a-zA-Z][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            flags.append(Flag(match[1], () if match[2] is None else (match[2],)))
        elif flags:
            flags[-1] = Flag(flags[-1].name, (*flags[-1].values, word))
        else:
            model.append(word)
    return model, flags


def _file(file: str) -> tuple[list[str], list[Flag]]:
    """A YAML file's keys as flags, by vLLM's rule: true is the flag, false its --no- form, a list its words."""
    import yaml

    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or error
        raise UsageError(f"--config {file} cannot be read as YAML: {reason}") from None
    if not isinstance(given, dict):
        raise UsageError(f"--config {file} is a {type(given).__name__}; it must be keys with values, as `port: 8000`")
    model: list[str] = []
    flags: list[Flag] = []
    for key, value in given.items():
        name = f"--{key}".replace("_", "-")
        if name == "--model":
            model = [str(value)]
        elif isinstance(value, bool):
            flags.append(Flag(name if value else name.replace("--", "--no-", 1), ()))
        else:
            flags.append(Flag(name, _words(value)))
    return model, flags


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(str(one) for one in value)
    return (json.dumps(value) if isinstance(value, dict) else str(value),)


def translate(line: CommandLine, settings: Mapping[str, str]) -> list[str]:
    """The words behind `vllm serve MODEL`: what was given, then our defaults and `settings` where nothing was given.

    Raises UsageError for a flag that only the native engine has.
    """
    words: list[str] = []
    for flag in line.flags:
        name = SHORT.get(flag.name, flag.name)
        if name in NATIVE:
            raise UsageError(f"{name} belongs to the native engine: {NATIVE[name]}")
        if name == "--quantization" and flag.values == ("int8",):
            raise UsageError(
                "--quantization int8 belongs to the native engine: vLLM's ways are fp8 and others of its own"
            )
        if name in (ENGINE, DRY_RUN) or (name in settings and line.get(name) in ((), ("auto",))):
            continue
        words += [flag.name, *SPELLED.get(name, _as_given)(flag)]
    defaults = ServerConfig()
    ours = {
        "--host": defaults.host,
        "--served-model-name": line.model,
        "--max-num-queued-reqs": str(defaults.max_num_queued_reqs),
        "--shutdown-timeout": str(math.ceil(defaults.shutdown_timeout)),
    }
    if line.get("--uds") is not None:
        del ours["--host"]
    for name, value in (ours | dict(settings)).items():
        if line.get(name) in (None, ("auto",)):
            words += [name, value]
    return words


def _as_given(flag: Flag) -> Sequence[str]:
    return flag.values


def _whole_seconds(flag: Flag) -> Sequence[str]:
    """vLLM takes whole seconds: 0.5 is 1."""
    try:
        return [str(math.ceil(float(word))) for word in flag.values]
    except (ValueError, OverflowError):
        raise UsageError(f"{flag.name} is {' '.join(flag.values)!r} and must be a number of seconds") from None


def _listed(flag: Flag) -> Sequence[str]:
    """vLLM takes one list in JSON."""
    return flag.values if flag.values[:1] and flag.values[0].startswith("[") else [json.dumps(flag.values)]


SPELLED: dict[str, Callable[[Flag], Sequence[str]]] = {
    "--shutdown-timeout": _whole_seconds,
    "--sse-keep-alive-interval": _whole_seconds,
    "--allowed-origins": _listed,
    "--allowed-methods": _listed,
    "--allowed-headers": _listed,
}
