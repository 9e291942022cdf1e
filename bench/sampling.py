"""What mixed sampling costs beside all-greedy: decoding steps of a batch of 64, SmolLM2-135M, the engine alone.

    make bench-sampling

64 sequences of 480 tokens of English, each from another place of the text, and 32 more each. Mixed are, in turn:
greedy, temperature with top-p, top-k, min-p, penalties, a bias, log-probabilities. Both kinds of batch take turns in
one engine; a sample is the median of a batch's steps: all that the engine does in one, sampling and text included.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from bench.record import ROOT, save
from bench.serve_models import smollm2
from lm.params import SamplingParams
from serve.engine.build import build
from serve.engine.engine import Engine
from serve.engine.messages import Add, EngineConfig

BATCH = 64
PROMPT, ANSWER = 480, 32  # tokens
MIXED: tuple[dict, ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"top_k": 50},
    {"temperature": 0.7, "min_p": 0.05},
    {"repetition_penalty": 1.1, "temperature": 0.8},
    {"frequency_penalty": 0.5, "presence_penalty": 0.2, "top_p": 0.9},
    {"temperature": 0.0, "logit_bias": dict.fromkeys(range(0, 300, 3), 1.0)},
    {"temperature": 1.0, "logprobs": 5},
)
SIDES = {"mixed": MIXED, "greedy": MIXED[:1]}


def prompts(engine: Engine) -> list[list[int]]:
    """PROMPT tokens from as many places of the documentation as there are sequences."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    ids = engine.tokenizer.encode("\n".join(page.read_text(encoding="utf-8") for page in pages))
    apart = (len(ids) - PROMPT) // BATCH
    return [ids[i * apart : i * apart + PROMPT] for i in range(BATCH)]


def step(engine: Engine, texts: list[list[int]], settings: tuple[dict, ...], name: str) -> float:
    """Milliseconds of a decoding step: the median over a batch's. Prompts are in the cache from the second batch on."""
    for i, text in enumerate(texts):
        params = SamplingParams(**settings[i % len(settings)], seed=i, max_tokens=ANSWER, ignore_eos=True)
        engine.add(Add(f"{name}-{i}", text, params, time.monotonic()))
    taken = []
    while engine.has_work:
        began = time.perf_counter()
        outputs = engine.step().outputs
        taken.append(((time.perf_counter() - began) * 1e3, len(outputs)))
    return statistics.median(took for took, count in taken[-ANSWER + 2 :] if count == BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="batches of each kind (default 7)")
    options = parser.parse_args()
    engine, _ = build(EngineConfig(folder=str(smollm2().bfloat16), dtype="bfloat16", max_model_len=1024))
    texts, number = prompts(engine), itertools.count()
    for settings in SIDES.values():
        step(engine, texts, settings, f"first-{next(number)}")
    samples: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name, settings in SIDES.items():
            samples[name].append(step(engine, texts, settings, f"{name}-{next(number)}"))
    save(
        "sampling",
        f"A decoding step of {BATCH} sequences with mixed sampling and all greedy, SmolLM2-135M bf16",
        "make bench-sampling",
        {name: {"samples": values, "unit": "ms a step"} for name, values in samples.items()},
        statistics.median(samples["mixed"]) / statistics.median(samples["greedy"]),
        statistic="median",
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
