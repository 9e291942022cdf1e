"""The flags of `python -m serve`: vLLM's names and meanings."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from serve.api.server import ServerConfig
from serve.engine.messages import EngineConfig

SCALE = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Parser(argparse.ArgumentParser):
    """One sentence for what is wrong, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


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


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return value


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


def parse(argv: Sequence[str]) -> tuple[ServerConfig, EngineConfig]:
    """Exits with status 2 and one sentence for a flag that cannot be."""
    parser = Parser(
        prog="python -m serve",
        description="Serve a model folder or a GGUF file through vLLM's HTTP API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "folder",
        metavar="MODEL",
        help="a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file",
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 is every interface")
    http.add_argument("--port", type=integer(0, 65535), default=8000, help="0 takes a free one and prints it")
    http.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests use; the first is shown (default: MODEL as it is given)",
    )
    http.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="keys that open everything but /health, /ping and /live (default: $VLLM_API_KEY)",
    )
    http.add_argument("--max-logprobs", type=integer(0), default=20, help="most logprobs that a request may ask for")
    http.add_argument(
        "--max-num-queued-reqs", type=integer(0), default=1024, help="sequences that may wait; more are answered 503"
    )
    http.add_argument("--max-body-bytes", type=integer(1), default=8 << 20, help="larger bodies are answered 413")
    http.add_argument(
        "--shutdown-timeout", type=seconds, default=25.0, help="seconds that running requests get on SIGTERM or Ctrl-C"
    )
    http.add_argument(
        "--generation-config",
        default="auto",
        help="auto: the folder's generation_config.json gives sampling defaults; vllm: none; or a folder",
    )
    http.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that makes a prompt of messages (default: the model's own)",
    )
    http.add_argument(
        "--trust-request-chat-template", action="store_true", help="accept a chat_template that comes with a request"
    )
    http.add_argument(
        "--enable-prompt-tokens-details", action="store_true", help="usage says how many prompt tokens were cached"
    )
    http.add_argument("--enable-log-requests", action="store_true", help="one line a request: tokens, time, reason")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype",
        choices=["auto", "float32", "float", "bfloat16", "float16", "half"],
        default="auto",
        help="auto: the folder's; on a CPU halves and GGUF files as bfloat16 where it is fast in that, else as float32",
    )
    engine.add_argument(
        "--max-model-len",
        type=integer(2),
        metavar="TOKENS",
        help="longest prompt and answer together, of an encoder-decoder each (default: the model's context)",
    )
    engine.add_argument("--max-num-seqs", type=integer(1), default=128, help="sequences that run at once")
    engine.add_argument(
        "--max-num-batched-tokens", type=integer(1), default=2048, help="tokens computed in one step, at most"
    )
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=integer(1),
        metavar="BYTES",
        help="size of the KV cache, as 512M or 4G (default: from the free memory)",
    )
    engine.add_argument("--block-size", type=integer(1, 4096), default=16, help="tokens in a block of the cache")
    engine.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="of the requests that bring none")
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute the beginning that requests have in common once",
    )
    engine.add_argument(
        "--scheduling-policy",
        choices=["fcfs", "priority"],
        default="fcfs",
        help="first come first served; or by the requests' priority, the lowest first",
    )
    engine.add_argument(
        "--quantization", choices=["int8"], help="weights a channel, activations a row (default: the model's dtype)"
    )
    engine.add_argument(
        "--batch-invariant",
        action="store_true",
        help="refuse to start where an answer might depend on the requests beside it",
    )
    engine.add_argument(
        "--speculative-config",
        type=lookup,
        metavar="JSON",
        help='propose tokens by prompt lookup: {"method": "ngram", "num_speculative_tokens": 4, '
        '"prompt_lookup_max": 4, "prompt_lookup_min": 2}',
    )
    given = parser.parse_args(argv)
    proposals = given.speculative_config or Lookup(0, 5, 5)
    keys = given.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    server = ServerConfig(
        host=given.host,
        port=given.port,
        served_model_name=tuple(given.served_model_name or ()),
        api_key=tuple(keys),
        max_logprobs=given.max_logprobs,
        max_num_queued_reqs=given.max_num_queued_reqs,
        max_body_bytes=given.max_body_bytes,
        shutdown_timeout=given.shutdown_timeout,
        generation_config=given.generation_config,
        chat_template=given.chat_template,
        trust_request_chat_template=given.trust_request_chat_template,
        enable_prompt_tokens_details=given.enable_prompt_tokens_details,
        enable_log_requests=given.enable_log_requests,
    )
    return server, EngineConfig(
        folder=given.folder,
        dtype=given.dtype,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        kv_cache_memory_bytes=given.kv_cache_memory_bytes,
        block_size=given.block_size,
        seed=given.seed,
        enable_prefix_caching=given.enable_prefix_caching,
        scheduling_policy=given.scheduling_policy,
        quantization=given.quantization,
        batch_invariant=given.batch_invariant,
        speculative=proposals.tokens,
        prompt_lookup_max=proposals.longest,
        prompt_lookup_min=proposals.shortest,
    )
