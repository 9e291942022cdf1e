"""`python -m train evaluate`: transformers' own figures in both ways of cutting; a sentence for what cannot be."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import train_bpe, train_characters
from train.__main__ import main
from train.data import IGNORED
from train.perplexity import windows

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"Line {n}: the {n * n} birds — or were they {n + 7}? — fled north, naïvely.\r\n" for n in range(40))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([TEXT], 320)
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size + 12, "context": 64, "layers": 2, "width": 48}
    shape |= {"heads": 4, "kv_heads": 2} if request.param == "llama" else {"heads": 4, "positions": "learned"}
    if request.param == "gpt2":
        shape |= {"norm": "layer", "activation": "gelu_tanh", "bias": True}
    torch.manual_seed(1)
    model = DecoderLM(DecoderConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that a token more or less shows in the fifth digit
    path = tmp_path_factory.mktemp(request.param) / "model"
    pretrained.save(model, path, tokenizer=tokenizer)
    return path


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    assert main(["evaluate", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    found = {name: re.search(pattern, out) for name, pattern in PATTERNS.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match}


PATTERNS = {
    "scored": r"([\d,]+) scored",
    "bytes": r"([\d,]+) bytes",
    "loss": r"loss +([\d.]+) nats",
    "perplexity": r"perplexity +([\d.]+)",
    "bits": r"bits a byte +([\d.]+)",
}


def by_transformers(folder: Path, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """Nats and scored tokens: the model's own `labels` loss, window by window."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats, scored, before = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        window = torch.tensor([ids[start:end]])
        labels = window.clone()
        labels[:, : max(0, before - start)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                nats += float(model(input_ids=window, labels=labels).loss) * count
        scored, before = scored + count, end
        if end == len(ids):
            break
    return nats, scored


@pytest.mark.parametrize(("context", "stride"), [(64, None), (32, None), (64, 16), (50, 7), (64, 64), (20, 1)])
def test_the_figures_are_those_of_transformers(
    folder: Path, text: Path, context: int, stride: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:400]
    nats, scored = by_transformers(folder, ids, context, stride or context)
    options = ["--context", context, "--tokens", 400] + ([] if stride is None else ["--stride", stride])
    found = figures(capsys, folder, "--text", text, *options)
    assert found["scored"] == scored
    assert found["loss"] == pytest.approx(nats / scored, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-4)
    assert found["bits"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-4)
    if stride is not None and stride < context:
        assert scored == 399


def test_smollm2_has_their_perplexity(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that somebody else trained, read from GGUF, over 4 windows of 1,024 tokens of this project's own pages."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    text, folder = tmp_path / "pages.txt", tmp_path / "model"
    text.write_text(pages, encoding="utf-8")
    tokenizer = pretrained.load_tokenizer(smollm2)
    pretrained.save(pretrained.load(smollm2, torch.float32), folder, tokenizer=tokenizer)
    nats, scored = by_transformers(folder, tokenizer.encode(pages)[:4096], 1024, 1024)
    found = figures(capsys, smollm2, "--text", text, "--context", 1024, "--tokens", 4096, "--dtype", "float32")
    assert found["scored"] == scored == 4 * 1023
    assert found["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-4)


def test_bits_a_byte_counts_the_bytes_of_the_text(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With windows that overlap all but the first token is scored, and their bytes are the text's."""
    tokenizer = train_bpe([TEXT], 320)
    ids = tokenizer.encode(TEXT)
    found = figures(capsys, folder, "--text", text, "--stride", 32)
    assert found["scored"] == len(ids) - 1
    assert found["bytes"] == len(TEXT.encode()) - tokenizer.token_bytes()[ids[0]]


def test_more_to_go_by_is_no_other_text(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--tokens reads only the text's beginning, and finds the tokens of the whole text there."""
    from train.perplexity import first_ids

    tokenizer = train_bpe([TEXT], 320)
    long = TEXT * 20
    whole = tokenizer.encode(long)
    for limit in (2, 10, 500, 2000):
        assert first_ids(tokenizer, long, limit).tolist() == whole[:limit]
    assert first_ids(tokenizer, long, None).tolist() == whole
    assert figures(capsys, folder, "--text", text, "--tokens", 2)["scored"] == 1


@given(length=st.integers(2, 300), context=st.integers(2, 40), data=st.data())
def test_windows_score_each_token_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    ids = np.arange(length, dtype=np.int64)
    seen = []
    for batch, read in windows(ids, context, stride):
        inputs, targets = batch["tokens"], batch["targets"]
        assert inputs.shape == targets.shape
        assert read <= length
        asked = targets != IGNORED
        assert (targets[asked] == inputs[asked] + 1).all()
        before = (targets - inputs[:, :1])[asked]  # the tokens that a target has before it in its window
        in_first = targets[asked] < context
        assert (before[~in_first] >= max(1, context - stride)).all()
        assert (before[in_first] >= 1).all()
        seen += targets[asked].tolist()
    assert read == length
    if stride < context:
        assert seen == list(range(1, length))
    else:
        assert seen == [n for n in range(length) if n % context]


def test_a_text_of_characters_and_another_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_characters(["abc é"])
    model = DecoderLM(DecoderConfig(vocab_size=tokenizer.vocab_size, context=16, layers=1, width=32, heads=2))
    pretrained.save(model, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "a.txt").write_text("cab é bac " * 9)
    found = figures(capsys, tmp_path / "model", "--text", tmp_path / "a.txt")
    half = figures(capsys, tmp_path / "model", "--text", tmp_path / "a.txt", "--dtype", "bfloat16")
    assert half["loss"] == pytest.approx(found["loss"], rel=0.02)
    assert half["loss"] != found["loss"]


# ------------------------------------------------------------ what is refused


REFUSED = [
    (["--context", "65"], "--context is 65; it must be at least 2 and at most the model's, 64."),
    (["--context", "1"], "--context is 1; it must be at least 2"),
    (["--stride", "0"], "--stride is 0; it must be at least 1 and at most the context, 64."),
    (["--context", "32", "--stride", "33"], "--stride is 33; it must be at least 1 and at most the context, 32."),
    (["--tokens", "1"], "--tokens is 1; it must be at least 2"),
    (["--text", "none.txt"], "--text is none.txt, which cannot be read: No such file or directory."),
    (["--text", "."], "--text is ., which cannot be read: Is a directory."),
    (["--text", "LATIN"], "which is not UTF-8: it holds the byte 0xe9."),
    (["--text", "EMPTY"], "which has 0 token(s); it must have at least 2."),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_a_mistake_gets_a_sentence(
    tiny_folder: Path, text: Path, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 64'))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    options = [{"LATIN": str(tmp_path / "latin"), "EMPTY": str(tmp_path / "empty")}.get(o, o) for o in options]
    assert main(["evaluate", str(folder), "--text", str(text), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert sentence in line


def test_a_folder_that_is_none_gets_a_sentence(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", "evaluate", str(tmp_path / "none"), "--text", str(text)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "none") in line


def test_a_tokenizer_of_another_model_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    train_bpe([TEXT], 400).save(folder)
    (tmp_path / "a.txt").write_text(TEXT)
    assert main(["evaluate", str(folder), "--text", str(tmp_path / "a.txt")]) == 2
    assert "the two must belong together" in capsys.readouterr().err
