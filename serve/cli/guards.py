"""Flags of who may connect, from where, and what a connection may cost."""

from __future__ import annotations

import argparse
import json
from argparse import _ArgumentGroup as Group
from collections.abc import Sequence
from typing import Any

from serve.cli.types import SWITCH, integer, seconds


class Words(argparse.Action):
    """Words, or lists of words in JSON as vLLM takes them: a tuple of all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found: list[str] = []
        for text in values:
            try:
                found += _listed(text) if (text.startswith("[") and '"' in text) or text == "[]" else [text]
            except ValueError:
                raise argparse.ArgumentError(self, f"{text!r} is not a list of texts in JSON") from None
        setattr(namespace, self.dest, tuple(found))


def _listed(text: str) -> Sequence[str]:
    given = json.loads(text)
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise ValueError
    return given


def add(guards: Group) -> None:
    """Adds the flags; each is a field of ServerConfig under its name."""
    guards.add_argument(
        "--allowed-hosts",
        nargs="+",
        action=Words,
        default=(),
        metavar="NAME",
        help="names that a request's Host header may have, beside localhost and --host; * is any (default: those alone "
        "on a loopback address, any on others)",
    )
    guards.add_argument(
        "--allowed-origins",
        nargs="+",
        action=Words,
        default=(),
        metavar="ORIGIN",
        help="whose pages in a browser may read answers; * is any (default: nobody's)",
    )
    for name, what in (("--allowed-methods", "methods"), ("--allowed-headers", "headers")):
        guards.add_argument(
            name, nargs="+", action=Words, default=("*",), metavar="NAME", help=f"{what} that those pages may use"
        )
    guards.add_argument("--allow-credentials", action=SWITCH, default=False, help="those pages may send cookies")
    guards.add_argument(
        "--client-timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="that a request's head and its body may each take to come, and an answer may lie unread",
    )
    guards.add_argument(
        "--max-connections",
        type=integer(1, 1 << 20),
        default=4096,
        help="open at once; beyond, the one that has been idle longest is closed",
    )
    guards.add_argument(
        "--h11-max-incomplete-event-size",
        type=integer(256, 1 << 30),
        default=1 << 16,
        metavar="BYTES",
        help="of a request's line and headers; larger ones are answered 431",
    )
    guards.add_argument(
        "--h11-max-header-count", type=integer(8, 1 << 20), default=256, help="headers of a request; more: 431"
    )
    guards.add_argument(
        "--enable-request-id-headers",
        action=SWITCH,
        default=False,
        help="answers have the header X-Request-Id: the request's own, or a new one",
    )
    guards.add_argument(
        "--sse-keep-alive-interval",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="after which a stream without news gets a comment, so that proxies keep it open; 0: none",
    )
    guards.add_argument(
        "--max-log-len",
        type=integer(0),
        default=0,
        metavar="CHARACTERS",
        help="of a prompt that --enable-log-requests shows",
    )
