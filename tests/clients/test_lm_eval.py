"""EleutherAI's evaluation harness: a task through the server and through transformers, on the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import KEY, ROOT, read, run

TASKS = ROOT / "tests" / "clients" / "tasks"
CLOSE = 1e-3  # nats


def evaluate(model: str, arguments: str, output: Path, **environment: str) -> tuple[dict[str, Any], list[Any]]:
    """The scores, and for each question the log-likelihoods of its answers."""
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "common_sense"]
    command += ["--include_path", str(TASKS), "--output_path", str(output), "--log_samples", "--batch_size", "8"]
    command += ["--device", "cpu"]
    run(command, cwd=TASKS, OPENAI_API_KEY=KEY, HF_HOME=str(output / "hub"), **environment)
    (result,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    return read(result)["results"]["common_sense"], [line["filtered_resps"] for line in lines]


@pytest.mark.timeout(600)
def test_the_score_is_that_of_transformers(server, folder: Path, tmp_path: Path) -> None:
    remote = f"model=smollm2,base_url={server.api}/completions,tokenizer={folder},tokenizer_backend=huggingface"
    ours, our_answers = evaluate("local-completions", f"{remote},max_length=2048,num_concurrent=4", tmp_path / "ours")
    local = f"pretrained={folder},dtype=float32,max_length=2048"
    theirs, their_answers = evaluate("hf", local, tmp_path / "theirs")
    assert len(our_answers) == 50
    for name in ("acc,none", "acc_norm,none"):
        assert ours[name] == theirs[name]
    assert ours["acc,none"] > 0.5  # guessing gives 0.25
    for ours_here, theirs_here in zip(our_answers, their_answers, strict=True):
        for (our_sum, our_greedy), (their_sum, their_greedy) in zip(ours_here, theirs_here, strict=True):
            assert float(our_sum) == pytest.approx(float(their_sum), abs=CLOSE)
            assert str(our_greedy) == str(their_greedy)
