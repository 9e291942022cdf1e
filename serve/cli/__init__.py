"""The command line of `python -m serve`: vLLM's flags, by subject, and what becomes of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from serve.api.server import ServerConfig
from serve.cli import answers, config_file, elsewhere, engine, guards, http
from serve.cli.parser import Parser, UsageError, dashed
from serve.cli.types import Lookup
from serve.engine.messages import EngineConfig


def parse(argv: Sequence[str]) -> tuple[ServerConfig, EngineConfig]:
    """Exits with status 2 and one sentence for a flag that cannot be."""
    parser = _parser()
    try:
        given = _given(parser, dashed(argv))
        try:
            return _configs(given)
        except UsageError as error:  # flags that do not go together: any of them may stand in the file
            raise UsageError(f"{error}; flags of {given.config} count, too" if given.config else str(error)) from None
    except UsageError as error:
        print(f"{parser.prog}: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m serve",
        description="Serve a model folder or a GGUF file through vLLM's HTTP API.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "folder",
        metavar="MODEL",
        nargs="?",
        help="a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file",
    )
    parser.add_argument("--config", metavar="FILE", help="these flags as YAML; those of the command line count first")
    parser.add_argument(
        "--engine",
        choices=["native", "vllm"],
        default="native",
        help="vllm: check the folder and become `vllm serve` with these flags and all of vLLM's (docs/production.md)",
    )
    http.add(parser.add_argument_group("HTTP"))
    guards.add(parser.add_argument_group("who may connect"))
    answers.add(parser.add_argument_group("answers"))
    engine.add(parser.add_argument_group("engine"))
    elsewhere.add(parser.add_argument_group("of vLLM, taken for what is so here anyway"))
    return parser


def _given(parser: Parser, argv: list[str]) -> argparse.Namespace:
    given = parser.parse_args(argv)
    if given.config is not None:
        file = config_file.read(given.config, parser)
        model = file.folder
        given = parser.parse_args(argv, namespace=file)
        given.folder = given.folder or model
    if given.folder is None:
        raise UsageError("MODEL is missing: a folder with config.json, model.safetensors and tokenizer.json, or a GGUF")
    return given


def _configs(given: argparse.Namespace) -> tuple[ServerConfig, EngineConfig]:
    """Each setting is the flag of its name. Raises UsageError for flags that contradict each other."""
    flags: dict[str, Any] = vars(given)
    if given.ssl_keyfile is not None and given.ssl_certfile is None:
        raise UsageError("--ssl-keyfile needs --ssl-certfile, the certificate that it is the key of")
    for name in ("ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
        if flags[name] and given.ssl_certfile is None:
            raise UsageError(f"--{name.replace('_', '-')} needs --ssl-certfile, without which no TLS is spoken")
    if given.ssl_cert_reqs and given.ssl_ca_certs is None:
        raise UsageError("--ssl-cert-reqs needs --ssl-ca-certs, by which a client's certificate is checked")
    if (given.fingerprint_mode == "custom") != (given.fingerprint_value is not None):
        raise UsageError("--fingerprint-mode custom and --fingerprint-value TEXT need each other")
    if given.num_gpu_blocks_override is not None and given.kv_cache_memory_bytes is not None:
        raise UsageError("--num-gpu-blocks-override and --kv-cache-memory-bytes both say how large the cache is")
    if given.enable_auto_tool_choice and given.tool_call_parser is None:
        raise UsageError("--enable-auto-tool-choice requires --tool-call-parser")
    proposals = given.speculative_config or Lookup(0, 5, 5)
    speculation = {
        "speculative": proposals.tokens,
        "prompt_lookup_max": proposals.longest,
        "prompt_lookup_min": proposals.shortest,
    }
    if given.kv_cache_memory_bytes is None and given.num_gpu_blocks_override is None:
        flags["kv_cache_memory_bytes"] = _cache_of_vllm(os.environ.get("VLLM_CPU_KVCACHE_SPACE", ""))
    flags["api_key"] = given.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    return (
        ServerConfig(**_fields(ServerConfig, flags)),
        EngineConfig(**_fields(EngineConfig, flags | speculation)),
    )


def _cache_of_vllm(gibibytes: str) -> int | None:
    """Bytes of cache that vLLM's variable asks for; None where it is not set, or 0. Raises UsageError."""
    if not gibibytes:
        return None
    try:
        value = float(gibibytes)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 20:
        raise UsageError(f"VLLM_CPU_KVCACHE_SPACE is {gibibytes!r} and must be a number of GiB")
    return round(value * (1 << 30)) or None


def _fields(config: Any, flags: dict[str, Any]) -> dict[str, Any]:
    values = {name: flags[name] for name in config.__struct_fields__ if name in flags}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
