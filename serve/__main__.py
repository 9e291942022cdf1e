"""`python -m serve MODEL [flags]`: serve a model folder or a GGUF file through vLLM's HTTP API."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from serve.api.server import StartError, run
from serve.cli import parse

A_MODEL = "a model is a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file."


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 after a signal, 1 if the port is taken or the engine died, 2 for what cannot be as asked."""
    server, engine = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = Path(engine.folder)
    try:
        if not folder.exists():
            raise StartError(f"{folder} does not exist; {A_MODEL}", 2)
        for name in ("config.json", "tokenizer.json"):
            if folder.is_dir() and not (folder / name).is_file():
                raise StartError(f"{folder} has no {name}; {A_MODEL}", 2)
        return run(server, engine)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
