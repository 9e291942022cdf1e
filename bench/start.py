"""From `python -m serve MODEL` to the first token: seconds, as whole processes, of a chat model that others trained.

    make bench-start

Each sample is one fresh server on SmolLM2-135M-Instruct (GGUF, Q4_1, widened to the dtype that is fastest here): until
its first token (it says so itself, after it has really made one), and until the first answer over HTTP has arrived.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench.record import ROOT, save, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or GGUF file (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--samples", type=int, default=5)
    options = parser.parse_args()
    model = options.model
    if model is None:
        timed([sys.executable, "scripts/fetch.py", "smollm2"])
        model = str(ROOT / ".cache" / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    starts = [_start(model) for _ in range(options.samples + 1)][1:]  # the first one fills the disk cache
    sides = {
        "first token": {"samples": [first for first, _ in starts], "unit": "s after the start"},
        "first answer": {"samples": [answer for _, answer in starts], "unit": "s after the start"},
    }
    name = Path(model).stem
    save("start", f"python -m serve, {name}: start to first token", "make bench-start", sides, None, statistic="median")


def _start(model: str) -> tuple[float, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "serve", model, "--port", str(port), "--served-model-name", "model"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        first = _first_token(server.stdout)
        body = {"model": "model", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
        return first, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def _first_token(lines: Iterator[str]) -> float:
    said = []
    for line in lines:
        said.append(line)
        if match := re.search(r"first token ([\d.]+) s after the start", line):
            return float(match[1])
    sys.exit("".join(said) + "The server ended before its first token.")


if __name__ == "__main__":
    main()
