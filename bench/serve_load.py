"""A load on a server, by vLLM's own generator; and a few streams of our own where that one cannot do it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import peers
from bench.record import ROOT, WORK
from bench.serve_sides import NAME, Server, alone

# What a load is summed up by -> the generator's name for it, and the unit.
FIGURES = {
    "output": ("output_throughput", "tokens/s"),
    "ttft": ("median_ttft_ms", "ms"),
    "tpot": ("median_tpot_ms", "ms"),
    "itl_p99": ("p99_itl_ms", "ms"),
}


@dataclass(frozen=True)
class Cell:
    """Random prompts of exactly these lengths, in a closed loop of `clients`."""

    prompt: int  # tokens, the shared ones included
    answer: int  # tokens
    clients: int
    requests: int
    shared: int = 0  # tokens at the start of every prompt that are the same

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.answer} c={self.clients}"


class Generator:
    """`vllm bench serve`, imported once."""

    def __init__(self) -> None:
        self._log = (WORK / "serve" / "generator.log").open("wb")
        self._process = subprocess.Popen(
            # -P: what lies beside the script is not to be found under the names of packages.
            [str(peers.vllm() / "python"), "-P", str(ROOT / "bench" / "serve_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=alone() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
        self._read()

    def run(self, server: Server, tokenizer: Path, cell: Cell, seed: int) -> dict[str, float]:
        """The figures of one load, by FIGURES' names. Raises RuntimeError with a sentence where it did not go through.

        The same seed makes the same prompts.
        """
        data = ["--dataset-name", "random", "--random-input-len", str(cell.prompt - cell.shared)]
        data += ["--random-prefix-len", str(cell.shared), "--random-output-len", str(cell.answer)]
        return self._load(server, tokenizer, data, cell, seed)

    def run_text(self, server: Server, tokenizer: Path, text: Path, cell: Cell, seed: int) -> dict[str, float]:
        """The same for prompts of a file, a JSON object with a "prompt" a line."""
        data = ["--dataset-name", "custom", "--dataset-path", str(text), "--custom-output-len", str(cell.answer)]
        data += ["--skip-chat-template", "--disable-shuffle"]
        return self._load(server, tokenizer, data, cell, seed)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _load(self, server: Server, tokenizer: Path, data: list[str], cell: Cell, seed: int) -> dict[str, float]:
        arguments = ["--backend", "openai", "--base-url", server.url, "--model", NAME, "--tokenizer", str(tokenizer)]
        arguments += [*data, "--num-prompts", str(cell.requests), "--max-concurrency", str(cell.clients)]
        arguments += ["--ignore-eos", "--temperature", "0", "--seed", str(seed), "--disable-tqdm"]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"{server.side.name}, {cell.name}: {answer['error']}")
        made, wanted = answer["total_output_tokens"], cell.requests * cell.answer
        if not server.side.says_usage:
            made = self._counted(server, cell, answer)
        if answer["completed"] != cell.requests or made != wanted:
            errors = [error.strip().splitlines()[-1][:200] for error in answer.get("errors", []) if error.strip()]
            raise RuntimeError(
                f"{server.side.name}, {cell.name}: {answer['completed']} of {cell.requests} requests and {made} of "
                f"{wanted} tokens came back{': ' + errors[0] if errors else '.'}"
            )
        return {name: answer[key] for name, (key, _) in FIGURES.items()}

    def _counted(self, server: Server, cell: Cell, answer: dict[str, Any]) -> int:
        """The generator has counted the tokens of the texts, as it found no usage: a whole answer's usage says how many
        tokens each of these requests really had. Puts the rates in `answer` right and returns the number of tokens.
        """
        each = server.complete("Once upon a time", cell.answer)["usage"]["completion_tokens"]
        right = answer["completed"] * each
        answer["output_throughput"] *= right / max(answer["total_output_tokens"], 1)
        answer["median_tpot_ms"] *= max(answer["total_output_tokens"] / cell.requests - 1, 1) / max(each - 1, 1)
        return right

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The load generator ended; {self._log.name} has what it said.")
        return json.loads(line)
