"""The native engine on a GPU, beside transformers' continuous batching. `unverified`: it has run on a CPU only.

    make bench-gpu-serve                             writes bench/results/gpu-serve.json
    python -m bench.gpu_serve --device cpu --tiny    whether it runs; writes nothing

Needs torch, transformers, tokenizers, safetensors, numpy and psutil, no network and nothing else: the model is made
here, 1B parameters of Llama 3.2's shape with random weights, in bfloat16. Both sides are in this process and are given
the same prompts as ids. First the kernels are compared with what they compute, written out. Then:

- throughput: 256 requests at once, 32 to 256 tokens in and 128 out; both sides take turns. Goal: twice transformers'.
- decoding at batch 1: the bytes that a step must read (all weights, and the keys and values so far) over the bytes that
  this GPU copies in that time. Goal: 60%.
- the host's share of a step at batch 64: (step - model) / step, where `model` is the same forward passes, heads and
  choices of tokens started without waiting for any. Goal: at most 15%.

A profile of the kernels of a step at batch 1 and at batch 64 is printed on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from bench.bare import without_msgspec
from bench.record import WORK, save_table

Prompts = list[list[int]]
Answers = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: the model and the load."""

    model: dict[str, Any]
    requests: int
    prompt: tuple[int, int]  # tokens, from and to
    output: int
    alone: int  # tokens decoded at batch 1
    batch: int  # of the host's share
    cache: int  # bytes of keys and values
    copied: int  # bytes that are copied to measure the memory


FULL = Size(
    model={
        "vocab_size": 128_256,
        "context": 4096,
        "layers": 16,
        "width": 2048,
        "heads": 32,
        "kv_heads": 8,
        "mlp_width": 8192,
        "rope_theta": 500_000.0,
    },
    requests=256,
    prompt=(32, 256),
    output=128,
    alone=256,
    batch=64,
    cache=8 << 30,
    copied=2 << 30,
)
TINY = Size(
    model={
        "vocab_size": 400,
        "context": 128,
        "layers": 2,
        "width": 64,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 128,
    },
    requests=5,
    prompt=(3, 20),
    output=6,
    alone=8,
    batch=4,
    cache=4 << 20,
    copied=1 << 20,
)


def make_folder(size: Size, device: str) -> Path:
    """A Hugging Face folder of random weights in bfloat16, with a tokenizer of as many byte-level tokens."""
    from lm import DecoderConfig, DecoderLM, pretrained
    from lm.tokenizer import Tokenizer

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*signs, *(a + b for a in signs for b in signs), *("e" + a + b for a in signs for b in signs)]
    inner = Inner(models.BPE({name: id for id, name in enumerate(names[: size.model["vocab_size"]])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    with torch.device(device):
        model = DecoderLM(DecoderConfig(**size.model))
    folder = WORK / f"gpu-serve-{size.model['width']}"
    pretrained.save(model, folder, dtype=torch.bfloat16, tokenizer=Tokenizer(inner))
    return folder


class Heed:
    """The engine, as `python -m serve` builds it."""

    def __init__(self, folder: Path, size: Size) -> None:
        from serve.engine.build import build
        from serve.engine.messages import EngineConfig

        config = EngineConfig(
            folder=str(folder),
            dtype="bfloat16",
            max_num_seqs=min(256, size.requests),
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=size.cache,
            enable_prefix_caching=False,  # nor has transformers: the same prompts come again and again
        )
        self.engine, self.ready = build(config)

    def add(self, prompts: Prompts, output: int) -> None:
        from lm.params import SamplingParams
        from serve.engine.messages import Add

        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for n, prompt in enumerate(prompts):
            self.engine.add(Add(str(n), prompt, params, time.monotonic()))

    def generate(self, prompts: Prompts, output: int) -> Answers:
        self.add(prompts, output)
        answers: Answers = [[] for _ in prompts]
        while self.engine.has_work:
            for part in self.engine.step().outputs:
                if part.error:
                    sys.exit(f"Request {part.id} failed: {part.error}")
                answers[int(part.id)] += part.tokens
        return answers


class Transformers:
    """generate_batch of a manager that is kept, warmed up before anything is timed."""

    def __init__(self, folder: Path, size: Size, device: str) -> None:
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.settings = ContinuousBatchingConfig(max_memory_percent=0.5, allow_block_sharing=False)
        if device == "cpu":  # which cannot be asked how much is free
            self.settings = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64)
        self.generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate(self, prompts: Prompts, output: int) -> Answers:
        results = self.model.generate_batch(
            inputs=prompts,
            generation_config=self.generation,
            continuous_batching_config=self.settings,
            max_new_tokens=output,
            persistent_manager=True,
        )
        answers = [list(result.generated_tokens) for result in results.values()]
        if [len(answer) for answer in answers] != [output] * len(prompts):
            sys.exit("transformers did not answer every request in full.")
        return answers


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def random_prompts(size: Size, count: int, seed: int, length: int | None = None) -> Prompts:
    dice = random.Random(seed)
    lengths = [length or dice.randint(*size.prompt) for _ in range(count)]
    return [[dice.randrange(size.model["vocab_size"]) for _ in range(n)] for n in lengths]


def copied_bytes_per_second(size: Size, device: str) -> float:
    """Read and written, of a copy from memory to memory: what can be had of the memory, the best of 20."""
    source = torch.empty(size.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(2 * size.copied / seconds(lambda: target.copy_(source), device) for _ in range(20))


def step_bytes(heed: Heed, tokens: int) -> int:
    """What decoding one token after `tokens` others has to read. A tied embedding is read once, as the head."""
    model = heed.engine.runner.model  # type: ignore[attr-defined]
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + 2 * config.layers * config.kv * config.dim * 2 * tokens


def alone(heed: Heed, size: Size, device: str, rounds: int) -> tuple[list[float], float]:
    """Seconds of a step at batch 1 (a sample is the mean of a whole answer), and the tokens before it, on average."""
    prompt = 128 if device == "cuda" else 8
    samples = []
    for n in range(rounds):
        heed.add(random_prompts(size, 1, n, prompt), size.alone)
        heed.engine.step()  # the prompt

        def rest() -> None:
            while heed.engine.has_work:
                heed.engine.step()

        samples.append(seconds(rest, device) / (size.alone - 1))
    return samples, prompt + size.alone / 2


def model_pass(heed: Heed) -> Callable[[], None]:
    """What a step of those who run computes, nothing of it waited for: hidden states, head, the likeliest tokens."""
    from serve.engine.runner import PagedRunner
    from serve.engine.scheduler import Share

    runner = heed.engine.runner
    assert isinstance(runner, PagedRunner)
    shares = [Share(request, request.computed - 1, 1) for request in heed.engine.scheduler.running]

    @torch.inference_mode()
    def forward() -> None:
        runner.model.logits(runner.hidden(shares)).float().argmax(dim=-1)

    return forward


def host_share(heed: Heed, size: Size, device: str) -> tuple[list[float], list[float]]:
    """Seconds of the steps in which `batch` requests decode, and of `model` for the same."""
    heed.add(random_prompts(size, size.batch, 0, 128 if device == "cuda" else 8), size.output)
    while any(r.computed < len(r.prompt) for r in heed.engine.scheduler) or not heed.engine.scheduler.running:
        heed.engine.step()
    steps = [seconds(heed.engine.step, device) for _ in range(size.output // 2)]
    if len(heed.engine.scheduler.running) != size.batch:
        sys.exit(f"{len(heed.engine.scheduler.running)} requests decode and not {size.batch}.")
    forward = model_pass(heed)
    profile(forward, device, f"batch {size.batch}")
    times = 10

    def many() -> None:
        for _ in range(times):
            forward()

    model = [seconds(many, device) / times for _ in range(9)]
    while heed.engine.has_work:
        heed.engine.step()
    return steps, model


def profile(forward: Callable[[], None], device: str, name: str) -> None:
    """Prints which kernels a step spends its time in."""
    forward()
    if device != "cuda":
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(5):
            forward()
        torch.cuda.synchronize()
    print(f"\n{name}, five steps:")
    print(found.key_averages().table(sort_by="self_device_time_total", row_limit=16, max_name_column_width=60))


@torch.inference_mode()
def check_kernels(size: Size) -> None:
    """Ends the benchmark where a kernel does not compute what it should, in bfloat16 and at the model's shape."""
    from serve.engine import gpu_explicit, gpu_kernels

    heads, kv = size.model["heads"], size.model["kv_heads"]
    dim, block, width = size.model["width"] // heads, 16, size.model["width"]
    torch.manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    keys, values = (normal(kv, 201, block, dim) for _ in range(2))
    tables = (1 + torch.randperm(200, device="cuda").int()).view(4, 50)
    single = torch.tensor([(0, 0, 1, 700), (1, 1, 1, 0), (2, 2, 1, 63), (3, 3, 1, 511)], dtype=torch.int32).cuda()
    chunk = torch.tensor([(0, 0, 16, 0), (0, 16, 16, 16), (1, 32, 16, 640), (2, 48, 3, 70)], dtype=torch.int32).cuda()
    qkv, angles = normal(51, (heads + 2 * kv) * dim), torch.randn(800, 2, dim, device="cuda")
    q, x = normal(51, heads, dim), normal(51, width)
    at = torch.arange(51, device="cuda", dtype=torch.int32)

    def attended(module: Any, tiles: torch.Tensor, tokens: int, **more: Any) -> torch.Tensor:
        out = torch.zeros_like(q)
        module.attend_pages(q, keys, values, tables, tiles, out, tokens=tokens, **{"window": None, **more})
        return out

    def placed(module: Any) -> torch.Tensor:
        return module.place(qkv, keys, values, at, 200 * block + at % block, heads=heads, angles=angles, norms=None)

    works: dict[str, Callable[[Any], torch.Tensor]] = {
        "attention of single tokens": lambda m: attended(m, single, 1),
        "the same in 16 parts": lambda m: attended(m, single, 1, splits=16),
        "the same in a window": lambda m: attended(m, single, 1, window=100),
        "attention of chunks": lambda m: attended(m, chunk, 16),
        "rotation": placed,
        "norm": lambda m: m.rms_norm(x, x[0], 1e-5),
        "gate": lambda m: m.swiglu(x),
    }
    for name, work in works.items():
        ours, theirs = work(gpu_kernels).float(), work(gpu_explicit).float()
        error = float((ours - theirs).norm() / theirs.norm())
        print(f"{name}: relative error {error:.1e}")
        if not error < 1e-2:
            sys.exit(f"The kernel for {name} computes something else. Nothing was measured.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda; cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few requests: whether it runs")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here; --device cpu --tiny shows whether this runs.")
    if options.device == "cpu" and not options.tiny:
        sys.exit("On a CPU only --tiny makes sense: what is measured here is a GPU.")
    without_msgspec()
    size, device = (TINY if options.tiny else FULL), options.device
    if device == "cuda":
        check_kernels(size)
    folder = make_folder(size, device)
    rows = measure(folder, size, device, options.rounds)
    shutil.rmtree(folder)
    for row in rows:
        print("; ".join(f"{key} {value}" for key, value in row.items() if key != "samples"))
    if not options.tiny:
        save_table(
            "gpu-serve",
            "The native engine on a GPU",
            "make bench-gpu-serve",
            ["figure", "Heed", "beside it", "ratio", "goal"],
            rows,
            note="Llama 3.2's 1B shape, random weights, bfloat16; medians.",
        )


def measure(folder: Path, size: Size, device: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    began = time.perf_counter()
    heed = Heed(folder, size)
    print(f"Heed: ready in {time.perf_counter() - began:.1f} s; {heed.ready.seconds}; {heed.ready.note}")
    peer = Transformers(folder, size, device)

    prompts = random_prompts(size, size.requests, 1)
    sides: dict[str, Any] = {"Heed": heed.generate, "transformers": peer.generate}
    answers = {name: generate(prompts, size.output) for name, generate in sides.items()}  # and everything is warm
    equal = sum(a[0] == b[0] for a, b in zip(*answers.values(), strict=True))
    print(f"{equal} of {len(prompts)} answers begin with the same token on both sides.")
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, generate in sides.items():
            spent = seconds(lambda generate=generate: generate(prompts, size.output), device)  # type: ignore[misc]
            samples[name].append(size.output * len(prompts) / spent)
    ours, theirs = (statistics.median(values) for values in samples.values())
    print(f"output tokens/s: {samples}")

    single, before = alone(heed, size, device, rounds)
    needed, reached = step_bytes(heed, int(before)), copied_bytes_per_second(size, device)
    limit, step = needed / reached, statistics.median(single)

    steps, model = host_share(heed, size, device)
    whole, part = statistics.median(steps), statistics.median(model)
    return [
        {
            "figure": f"output tokens/s of {size.requests} requests, beside transformers' generate_batch",
            "Heed": ours,
            "beside it": theirs,
            "ratio": ours / theirs,
            "goal": "2 at least",
            "samples": samples,
            "first tokens equal": equal / len(prompts),
        },
        {
            "figure": "ms a token at batch 1, beside reading everything once at the speed of a copy",
            "Heed": 1e3 * step,
            "beside it": 1e3 * limit,
            "ratio": limit / step,
            "goal": "0.6 at least",
            "samples": {"seconds": single, "bytes": needed, "bytes per second": reached},
        },
        {
            "figure": f"ms a step at batch {size.batch}, beside its forward pass; ratio: the host's share",
            "Heed": 1e3 * whole,
            "beside it": 1e3 * part,
            "ratio": (whole - part) / whole,
            "goal": "0.15 at most",
            "samples": {"steps": steps, "model": model},
        },
    ]


if __name__ == "__main__":
    main()
