"""What a flag's value may be: argparse types that say in one sentence what is wrong."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

SWITCH = argparse.BooleanOptionalAction  # --name and --no-name, as every switch of vLLM has them
SCALE = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number, 32k (thousands) or 32K (1024s), in a range."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
        value = round(float(match[1]) * SCALE[match[2]]) if match else low - 1
        if match and not match[2] and match[1].isdigit():
            value = int(match[1])
        if value < low or (high is not None and value > high):
            bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return parse


def length(text: str) -> int | None:
    """An argparse type: a number of tokens, or `auto` (vLLM's -1, too): the model's, as far as memory allows."""
    return None if text in ("auto", "-1") else integer(2)(text)


def logprobs(text: str) -> int:
    """An argparse type: a number of logprobs, or -1: all."""
    return -1 if text == "-1" else integer(0)(text)


def seconds(text: str) -> float:
    """An argparse type: a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return value


def paths(text: str) -> tuple[str, ...]:
    """An argparse type: paths with commas between them."""
    given = tuple(path.strip() for path in text.split(",") if path.strip())
    wrong = [path for path in given if not path.startswith("/")]
    if wrong or not given:
        raise argparse.ArgumentTypeError(f"{(wrong or [text])[0]!r} is no path, as /health")
    return given


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: an object in JSON."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return given


class Lookup(NamedTuple):
    """--speculative-config: tokens that are proposed a step, the longest and the shortest n-gram looked for."""

    tokens: int
    longest: int
    shortest: int


def lookup(text: str) -> Lookup:
    """An argparse type: vLLM's JSON for proposing tokens by prompt lookup, with its defaults."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(given, dict) or given.get("method") != "ngram":
        raise argparse.ArgumentTypeError(f'{text!r} must be an object whose "method" is "ngram", the one there is')
    names = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
    strange = sorted(given.keys() - {"method", *names})
    if strange:
        raise argparse.ArgumentTypeError(f"{strange[0]!r} is none of its keys: method, {', '.join(names)}")
    for name in names:
        value = given.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= 64):
            raise argparse.ArgumentTypeError(f"{name} is {value!r} and must be a whole number from 1 to 64")
    tokens, longest, shortest = (given.get(name) for name in names)
    if tokens is None:
        raise argparse.ArgumentTypeError(f"{names[0]} is missing: the tokens that are proposed in a step")
    longest, shortest = longest or shortest or 5, shortest or longest or 5
    if shortest > longest:
        raise argparse.ArgumentTypeError(
            f"prompt_lookup_min is {shortest} and prompt_lookup_max {longest}, which is less"
        )
    return Lookup(tokens, longest, shortest)
