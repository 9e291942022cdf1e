"""What mixed sampling costs beside all-greedy: one step's worth of it, for a batch over a real vocabulary.

    make bench-sampling

64 sequences of 500 tokens over 49,152 token ids; logits that are as peaked as a small language model's. Mixed are, one
after the other: greedy, temperature with top-p, top-k, min-p, penalties, a bias, log-probabilities. Both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bench.record import save
from lm.params import SamplingParams
from serve.engine import sampler
from serve.engine.requests import Request

BATCH = 64
VOCABULARY = 49_152
LENGTH = 500
# Log-probabilities fall with the rank of a token as a power of it (Zipf), which puts an entropy of 3 nats on a step.
EXPONENT = 1.6
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


def requests(settings: tuple[dict, ...]) -> list[Request]:
    """A batch with these settings in turn, in the middle of their answers."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(BATCH):
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator).tolist()
        params = SamplingParams(**settings[i % len(settings)], max_tokens=None)
        request = Request(id=str(i), prompt=tokens[: LENGTH // 2], params=params)
        request.draw = sampler.prepare(request, request.prompt, i, ())
        request.output += tokens[LENGTH // 2 :]
        made.append(request)
    return made


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ranked = -EXPONENT * torch.arange(1, VOCABULARY + 1).log()
    return torch.stack([ranked[torch.randperm(VOCABULARY, generator=generator)] for _ in range(BATCH)])


@torch.inference_mode()
def step(batch: list[Request], given: Tensor) -> float:
    """Milliseconds from logits to tokens, which are added to the outputs."""
    copied = given.clone()
    began = time.perf_counter()
    drawn = sampler.draw(batch, [1] * len(batch), copied)
    took = (time.perf_counter() - began) * 1e3
    for request, (one,) in zip(batch, drawn, strict=True):
        request.output.append(one.token)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="measurements of each (default 41)")
    options = parser.parse_args()
    given = logits()
    sides = {"mixed": requests(MIXED), "greedy": requests(MIXED[:1])}
    for batch in sides.values():
        step(batch, given)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, batch in sides.items():
            samples[name].append(step(batch, given))
    more = [mixed - greedy for mixed, greedy in zip(samples["mixed"], samples["greedy"], strict=True)]
    save(
        "sampling",
        f"Sampling: a batch of {BATCH} over {VOCABULARY:,} tokens",
        "make bench-sampling",
        {name: {"samples": values, "unit": "ms a step"} for name, values in samples.items()},
        statistics.median(samples["mixed"]) / statistics.median(samples["greedy"]),
        statistic="median",
        extra_ms=statistics.median(more),
        threads=torch.get_num_threads(),
    )
    print(f"mixed costs {statistics.median(more):.2f} ms more (least {min(more):.2f})")


if __name__ == "__main__":
    main()
