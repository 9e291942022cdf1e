"""Decoding speed beside transformers and CTranslate2: target tokens a second, the same weights and machine.

    make bench-translate
    QUICK=1 make bench-translate        whether it runs, on a small model; its figures mean nothing

A Transformer of the paper's base shape with a joint vocabulary of 32,000 and random weights; 32 sources of 20 to 30
tokens in one batch, beam 4, exactly 25 tokens decoded for each, two threads. Each side is a process of its own with its
model loaded; they take turns. transformers generates with the same weights as a MarianMT, CTranslate2 translates with
them converted (its TransformerSpec is post-norm where it is told so). Before anything is timed, all three must give the
same greedy output in float32. Another process does nothing but the matrix products that all of them share: the limit of
any.

Each is measured in float32, and where this machine multiplies in bfloat16, ours and transformers in that too;
CTranslate2 has no bfloat16 on a CPU: its fastest there is int8. Every ratio names the dtype of both its sides.

CTranslate2 is no dependency of the project: it is installed into .cache/bench/ctranslate2, an environment of its own,
from bench/translate_requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.record import ROOT, WORK, save, timed
from lm.linear import bf16_is_fast

SIDES = ("heed", "transformers", "CTranslate2")
LIMIT = "products alone"
LOW = {"heed": "bfloat16", "transformers": "bfloat16", "CTranslate2": "int8_float32", LIMIT: "bfloat16"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8_float32": "int8"}
PAD, BEGIN, END = 0, 1, 2
BASE = {"vocab_size": 32000, "context": 128, "start_id": BEGIN}
TINY = {"vocab_size": 500, "width": 64, "heads": 4, "mlp_width": 128, "encoder_layers": 2, "decoder_layers": 2}


class Side:
    """A process that translates when it is told to."""

    def __init__(self, engine: str, dtype: str, python: str | Path, folder: Path, threads: int):
        self.engine, self.dtype, self.name = engine, dtype, f"{engine} {SHORT[dtype]}"
        self.process = subprocess.Popen(
            [str(python), "-P", str(ROOT / "bench" / "translate_side.py"), engine, str(folder), str(threads), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The spin count is what `python -m lm` sets; transformers gains by it as much as we do.
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000", "PYTHONPATH": str(ROOT)},
        )
        self.version: str = self._answer()["version"]

    def translate(self, sources: list[list[int]], beam: int, tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the best output for each source."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"sources": sources, "beam": beam, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if any(len(output) != tokens for output in answer["outputs"]):
            sys.exit(f"{self.name} did not decode {tokens} tokens for each source.")
        return answer["seconds"], answer["outputs"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended: see above.")
        return json.loads(line)


def main() -> None:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2 if quick else 5, help="measurements of each side (default 5)")
    parser.add_argument(
        "--batches", type=int, default=1 if quick else 3, help="batches of each measurement (default 3)"
    )
    parser.add_argument("--sentences", type=int, default=32, help="sources in a batch (default 32)")
    parser.add_argument("--beam", type=int, default=4, help="default 4")
    parser.add_argument("--tokens", type=int, default=25, help="to decode for each source (default 25)")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    options = parser.parse_args()
    folder = _model(BASE | TINY if quick else BASE)
    pythons = dict.fromkeys((*SIDES, LIMIT), sys.executable) | {"CTranslate2": str(_environment())}
    dtypes = {name: ["float32", LOW[name]] if bf16_is_fast("cpu") else ["float32"] for name in pythons}
    everyone = [
        Side(name, dtype, python, folder, options.threads) for name, python in pythons.items() for dtype in dtypes[name]
    ]
    sides = [side for side in everyone if side.engine != LIMIT]
    whole = [side for side in sides if side.dtype == "float32"]
    draw = random.Random(0)
    words = range(3, (BASE | TINY if quick else BASE)["vocab_size"])
    batches = [
        [[*draw.choices(words, k=draw.randint(19, 29)), END] for _ in range(options.sentences)]
        for _ in range(options.batches)
    ]
    greedy = [side.translate(batches[0], 1, options.tokens)[1] for side in whole]
    if greedy.count(greedy[0]) != len(whole):
        sys.exit("The three do not give the same greedy output in float32: this would compare different models.")
    same = {side.name: 0 for side in sides}
    samples: dict[str, list[float]] = {side.name: [] for side in everyone}
    for batch in batches:  # warm
        outputs = {side.name: side.translate(batch, options.beam, options.tokens)[1] for side in everyone}
        for name in same:
            same[name] += sum(a == b for a, b in zip(outputs[name], outputs["heed fp32"], strict=True))
    decoded = options.sentences * options.tokens * len(batches)
    for _ in range(options.rounds):
        for side in everyone:
            seconds = sum(side.translate(batch, options.beam, options.tokens)[0] for batch in batches)
            samples[side.name].append(decoded / seconds)
        print("; ".join(f"{name} {values[-1]:.0f} tokens/s" for name, values in samples.items()), flush=True)
    for side in everyone:
        side.process.stdin.close()  # type: ignore[union-attr]
        side.process.wait()
    middle = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {
        f"{ours.name} / {side.name}": middle[ours.name] / middle[side.name]
        for ours in sides
        if ours.engine == "heed"
        for side in everyone
        if side.engine != "heed" and (side.engine != LIMIT or side.dtype == ours.dtype)
    }
    equal = ", ".join(f"{name} {count}" for name, count in same.items() if name != "heed fp32")
    save(
        "translate-speed-quick" if quick else "translate-speed",
        f"decoding, beam {options.beam}, {options.sentences} sources in a batch, {options.threads} threads",
        "make bench-translate",
        {name: {"samples": values, "unit": "target tokens/s"} for name, values in samples.items()},
        ratios["heed fp32 / transformers fp32"],
        statistic="median",
        ratios=ratios,
        note=f"Ratios: {'; '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}. "
        "The one below is the first of these. "
        f"The same best output as heed fp32, of {options.sentences * len(batches)}: {equal}. "
        f"Versions: {', '.join(side.version for side in whole)}.",
    )


def _model(shape: dict[str, Any]) -> Path:
    """A folder with random weights of this shape; no tokenizer is needed."""
    import torch

    from lm import pretrained
    from lm.transformer import Transformer
    from lm.transformer_config import TransformerConfig

    torch.manual_seed(0)
    folder = WORK / "translate-model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pretrained.save(Transformer(TransformerConfig(**shape)), folder)
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END, "decoder_start_token_id": BEGIN}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def _environment() -> Path:
    """The Python of CTranslate2's own environment, which is made where it is missing."""
    home, wanted = WORK / "ctranslate2", ROOT / "bench" / "translate_requirements.txt"
    python, stamp = home / "bin" / "python", home / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        shutil.rmtree(home, ignore_errors=True)
        timed([sys.executable, "-m", "venv", str(home)])
        timed([str(python), "-m", "pip", "install", "-q", "-r", str(wanted)])
        shutil.copy(wanted, stamp)
    return python


if __name__ == "__main__":
    main()
