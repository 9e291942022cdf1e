"""Flags of what requests may ask, and of what answers look like."""

from __future__ import annotations

from argparse import _ArgumentGroup as Group

from serve.cli.types import integer


def add(answers: Group) -> None:
    """Adds the flags; each is a field of ServerConfig under its name."""
    answers.add_argument("--max-logprobs", type=integer(0), default=20, help="most logprobs that a request may ask for")
    answers.add_argument(
        "--generation-config",
        default="auto",
        help="auto: the folder's generation_config.json gives sampling defaults; vllm: none; or a folder",
    )
    answers.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that makes a prompt of messages (default: the model's own)",
    )
    answers.add_argument(
        "--trust-request-chat-template", action="store_true", help="accept a chat_template that comes with a request"
    )
    answers.add_argument(
        "--enable-prompt-tokens-details", action="store_true", help="usage says how many prompt tokens were cached"
    )
