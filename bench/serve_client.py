"""`vllm bench serve` as a process that stays: runs in vLLM's own environment, one line of JSON for each load.

The command itself imports vLLM anew for every load, which takes longer than most loads. So bench/serve_load.py starts
this once; it hands each list of arguments to the command's own parser and its own `main`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def serve_loads() -> None:
    """Reads lists of arguments from stdin, one a line; writes what the command returns, or {"error": sentence}."""
    with contextlib.redirect_stdout(sys.stderr):
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        answer: dict[str, Any]
        with contextlib.redirect_stdout(sys.stderr):
            try:
                answer = main(parser.parse_args(json.loads(line)))
            except (Exception, SystemExit) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve_loads()
