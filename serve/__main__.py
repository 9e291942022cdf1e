"""`python -m serve MODEL [flags]`: serve a model folder or a GGUF file through vLLM's HTTP API.

By the native engine, or with --engine vllm by real vLLM, which this process then becomes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from serve.api.server import run
from serve.cli import parse
from serve.errors import StartError
from serve.on_vllm.flags import wants_vllm

A_MODEL = "a model is a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file."


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 after a signal, 1 if the port is taken or the engine died, 2 for what cannot be as asked."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_vllm(argv):
        from serve.on_vllm import launch  # loads torch, which this process has no use for otherwise

        return launch.main(argv)
    server, engine = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = Path(engine.folder)
    try:
        if not folder.exists():
            raise StartError(f"{folder} does not exist; {A_MODEL}", 2)
        for name in ("config.json", "tokenizer.json"):
            elsewhere = name == "tokenizer.json" and engine.tokenizer is not None
            if folder.is_dir() and not (folder / name).is_file() and not elsewhere:
                raise StartError(f"{folder} has no {name}; {A_MODEL}", 2)
        return run(server, engine)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
