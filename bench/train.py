"""Training speed beside transformers.Trainer: tokens a second, same Llama shape, batch, optimizer, dtype, machine and
threads.

    make bench-train            (or python -m bench.train --dtype bf16 --shape 110m)

Each side is a process of its own; they alternate. A sample is the median over the timed updates of one process; the
first updates are warm-up. Both clip gradients at 1 and use AdamW (torch's fused kernels), SDPA attention and the same
windows of text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import yaml

from bench.record import WORK, save, timed, train_command

SHAPES = {  # sequences: what an update holds
    "24m": {"context": 256, "layers": 6, "width": 512, "heads": 8, "mlp_width": 1408, "sequences": 8},
    "110m": {"context": 512, "layers": 12, "width": 768, "heads": 12, "mlp_width": 2048, "sequences": 4},
    "350m": {"context": 1024, "layers": 24, "width": 1024, "heads": 16, "mlp_width": 2816, "sequences": 16},
}
VOCABULARY = 8192
MODEL_KEYS = ("context", "layers", "width", "heads", "mlp_width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="350m" if gpu else "24m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10, help="timed updates of a process")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument(
        "--peer", metavar="FILE", help=argparse.SUPPRESS
    )  # this process is the peer; write samples to FILE
    options = parser.parse_args()
    recipe = _recipe(options)
    if options.peer:
        Path(options.peer).write_text(json.dumps(_peer(recipe, options)), encoding="utf-8")
        return
    timed([sys.executable, "scripts/fetch.py", "shakespeare"])
    samples: dict[str, list[float]] = {"heed": [], "transformers.Trainer": []}
    words = ["--shape", options.shape, "--dtype", options.dtype] + (["--compile"] if options.compile else [])
    extra = ["--updates", str(options.updates), "--warmup", str(options.warmup)]
    for pair in range(options.pairs):
        samples["heed"].append(_ours(recipe, options))
        out = WORK / "peer.json"
        timed([sys.executable, "-m", "bench.train", *words, *extra, "--peer", str(out)])
        samples["transformers.Trainer"].append(json.loads(out.read_text(encoding="utf-8")))
        speeds = "; ".join(f"{side} {values[-1]:,.0f} tokens/s" for side, values in samples.items())
        print(f"pair {pair + 1}: {speeds}", flush=True)
    shape = SHAPES[options.shape]
    sides = {side: {"samples": values, "unit": "tokens/s"} for side, values in samples.items()}
    ratio = statistics.median(samples["heed"]) / statistics.median(samples["transformers.Trainer"])
    device = "gpu" if gpu else "cpu"
    compiled = "-compile" if options.compile else ""
    save(
        f"train-{device}-{options.shape}-{options.dtype}{compiled}",
        f"Training speed, Llama shape {options.shape}, {options.dtype}{', compiled' if options.compile else ''}",
        f"python -m bench.train {' '.join(words)}",
        sides,
        ratio,
        statistic="median",
        note=f"{shape['sequences']} sequences of {shape['context']} tokens an update; {shape['layers']} layers, "
        f"{shape['width']} wide, vocabulary {VOCABULARY}; AdamW, clipping at 1.",
    )


def _recipe(options: argparse.Namespace) -> Path:
    shape = SHAPES[options.shape]
    steps = options.warmup + options.updates
    recipe = {
        "run": {"dir": str(WORK / "train")},
        "data": {"text": ".cache/text/shakespeare.txt", "validation": None},
        "tokenizer": {"kind": "bpe", "vocab_size": VOCABULARY},
        "model": {**{key: shape[key] for key in MODEL_KEYS}, "tie_embeddings": True},
        "optim": {"name": "adamw", "lr": 1e-4, "clip": 1.0},
        "train": {
            "steps": steps,
            "batch_tokens": shape["sequences"] * shape["context"],
            "dtype": options.dtype,
            "compile": options.compile,
        },
        "checkpoint": {"every": steps},
        "log": {"every": 1, "wandb": None},
    }
    path = WORK / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _ours(recipe: Path, options: argparse.Namespace) -> float:
    shutil.rmtree(WORK / "train", ignore_errors=True)
    timed(train_command(str(recipe)))
    rows = [json.loads(line) for line in (WORK / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["tokens_per_second"] for row in rows[options.warmup :])


def _peer(path: Path, options: argparse.Namespace) -> float:
    """transformers.Trainer on the same shape and text."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from train.config import load
    from train.data import Batches
    from train.launch import cores
    from train.prepare import prepare

    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(cores())
    recipe, shape = load(path), SHAPES[options.shape]
    prepared = prepare(recipe, progress=False)
    batches = Batches(prepared.train, context=shape["context"], batch_tokens=recipe.batch_tokens, seed=1)

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return recipe.total_steps * shape["sequences"]

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            step, row = divmod(index, shape["sequences"])
            ids = batches.batch(step, slice(row, row + 1))["tokens"][0]
            return {"input_ids": ids, "labels": ids}

    config = LlamaConfig(
        vocab_size=prepared.tokenizer.vocab_size,
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if gpu:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(WORK / "trainer"),
        max_steps=recipe.total_steps,
        per_device_train_batch_size=shape["sequences"],
        learning_rate=1e-4,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=options.dtype == "bf16",
        torch_compile=options.compile,
        use_cpu=not gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Windows(), callbacks=[Stamp()])
    trainer.train()
    steps = [
        after - before for before, after in zip(stamps[options.warmup - 1 :], stamps[options.warmup :], strict=False)
    ]
    return recipe.batch_tokens / statistics.median(steps)


if __name__ == "__main__":
    main()
