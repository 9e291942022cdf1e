"""Flags of vLLM that have one meaning here: taken where they ask for what is so anyway, else refused by a sentence."""

from __future__ import annotations

import argparse
from argparse import _ArgumentGroup as Group
from collections.abc import Callable

# What each may be, in vLLM's words: how it is here is the only way there is.
ONLY = {
    ("--tensor-parallel-size", "-tp"): ("1",),
    ("--pipeline-parallel-size", "-pp"): ("1",),
    ("--data-parallel-size", "-dp"): ("1",),
    ("--api-server-count",): ("1",),
    ("--kv-cache-dtype",): ("auto",),
    ("--load-format",): ("auto", "safetensors"),
    ("--tokenizer-mode",): ("auto", "hf"),
    ("--runner",): ("auto", "generate"),
    ("--logprobs-mode",): ("raw_logprobs",),
    ("--prefix-caching-hash-algo",): ("sha256",),
    ("--chat-template-content-format",): ("auto",),
    ("--cpu-offload-gb",): ("0",),
    ("--structured-outputs-config.backend",): ("auto", "guidance"),
    ("--long-prefill-token-threshold",): ("0",),
}
ALWAYS = ("--enable-chunked-prefill",)  # a switch that cannot be off,
EITHER = (  # and those of no effect
    *("--enforce-eager", "--async-scheduling", "--trust-remote-code", "--disable-log-stats"),
    "--enable-server-load-tracking",
)


def add(group: Group) -> None:
    """Adds the flags, none of which becomes a setting."""
    for names, values in ONLY.items():
        group.add_argument(*names, type=_one_of(values), metavar="|".join(values))
    for name in ALWAYS:
        group.add_argument(name, action="store_true")
    for name in EITHER:
        group.add_argument(name, action=argparse.BooleanOptionalAction)
    group.add_argument("--gpu-memory-utilization", type=_share, metavar="SHARE")


def _one_of(values: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(
                f"{text!r} is for --engine vllm; the native engine has {' or '.join(values)}"
            )
        return text

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and of at most 1")
    return value
