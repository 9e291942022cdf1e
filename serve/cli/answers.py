"""Flags of what requests may ask, and of what answers look like."""

from __future__ import annotations

from argparse import _ArgumentGroup as Group

from serve.api.reasoning import PARSERS as REASONING
from serve.api.tool_parsers import PARSERS
from serve.cli.types import SWITCH, integer, json_object, logprobs


def add(answers: Group) -> None:
    """Adds the flags; each is a field of ServerConfig under its name."""
    answers.add_argument(
        "--max-logprobs",
        type=logprobs,
        default=20,
        help="most logprobs that a request may ask for; -1: as many as there are tokens",
    )
    answers.add_argument(
        "--generation-config",
        default="auto",
        help="auto: the folder's generation_config.json gives sampling defaults; vllm: none; or a folder",
    )
    answers.add_argument(
        "--override-generation-config",
        type=json_object,
        metavar="JSON",
        help='sampling defaults that count before those, as {"temperature": 0.5}',
    )
    answers.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that makes a prompt of messages (default: the model's own)",
    )
    answers.add_argument(
        "--trust-request-chat-template",
        action=SWITCH,
        default=False,
        help="accept a chat_template that comes with a request",
    )
    answers.add_argument(
        "--default-chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template, for requests that set no other value",
    )
    answers.add_argument(
        "--enable-auto-tool-choice",
        action=SWITCH,
        default=False,
        help="the model may call tools; needs --tool-call-parser",
    )
    answers.add_argument("--tool-call-parser", choices=sorted(PARSERS), help="how the model writes a call of a tool")
    answers.add_argument(
        "--reasoning-parser", choices=REASONING, help="how the model marks its thoughts, which are told from its answer"
    )
    answers.add_argument("--response-role", default="assistant", metavar="ROLE", help="who speaks the answer of a chat")
    answers.add_argument(
        "--return-tokens-as-token-ids",
        action=SWITCH,
        default=False,
        help='log-probabilities name tokens as "token_id:5", unless a request asks otherwise',
    )
    answers.add_argument(
        "--enable-prompt-tokens-details",
        action=SWITCH,
        default=False,
        help="usage says how many prompt tokens were cached",
    )
    answers.add_argument(
        "--enable-force-include-usage", action=SWITCH, default=False, help="every chunk of a stream has its usage"
    )
    answers.add_argument(
        "--stream-interval", type=integer(1), default=1, metavar="TOKENS", help="tokens in a chunk after the first"
    )
    answers.add_argument(
        "--fingerprint-mode",
        choices=["full", "hash", "custom", "none"],
        default="full",
        help="system_fingerprint: version and a hash of the engine's settings; --fingerprint-value; or null",
    )
    answers.add_argument("--fingerprint-value", metavar="TEXT", help="what --fingerprint-mode custom shows")
