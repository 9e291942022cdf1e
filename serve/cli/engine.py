"""Flags of the engine: the model, its cache, and how requests share a step."""

from __future__ import annotations

import argparse
from argparse import _ArgumentGroup as Group

from serve.cli.types import SWITCH, integer, length, lookup


def add(engine: Group) -> None:
    """Adds the flags; each is a field of EngineConfig under its name, --speculative-config three of them."""
    engine.add_argument(
        "--tokenizer", metavar="FOLDER", help="a folder with another tokenizer.json (default: the model's own)"
    )
    engine.add_argument(
        "--dtype",
        choices=["auto", "float32", "float", "bfloat16", "float16", "half"],
        default="auto",
        help="auto: the folder's; on a CPU halves and GGUF files as bfloat16 where kernels have AVX2, else as float32",
    )
    engine.add_argument(
        "--max-model-len",
        type=length,
        metavar="TOKENS",
        help="longest prompt and answer together, of an encoder-decoder each (default, or auto: the model's context)",
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
    engine.add_argument(
        "--num-gpu-blocks-override", type=integer(2), metavar="BLOCKS", help="size of the KV cache in blocks, instead"
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
        action=SWITCH,
        default=False,
        help="refuse to start where an answer might depend on the requests beside it",
    )
    engine.add_argument(
        "--speculative-config",
        type=lookup,
        metavar="JSON",
        help='propose tokens by prompt lookup: {"method": "ngram", "num_speculative_tokens": 4, '
        '"prompt_lookup_max": 4, "prompt_lookup_min": 2}',
    )
