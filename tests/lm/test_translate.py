"""Translation: lines in and lines out, whatever stands in them, through any model that translates."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import pretrained
from lm.__main__ import main
from lm.beam import GNMT, BeamParams
from lm.tokenizer import Tokenizer
from lm.translate import Translator, batches, longest_source, parser, translate
from lm.translate import run as command

ROOT = Path(__file__).resolve().parents[2]
Folder = Callable[[str], Path]
KINDS = ("rnnsearch", "transformer", "decoder", "decoder-prefix")
NASTY = [
    "to be or not to be",
    "",
    "   \t ",
    "naïve café — 字 और русский עברית",
    "🦄👩‍👩‍👧‍👦 \u200d\u200b\u2028 x",
    "word " * 200,
    "</s> <s> <pad> <unk>",
    "\x00\x01 control",
    "e" * 300,
    "last one, without a line end",
]


def loaded(folder: Path) -> Translator:
    return Translator.load(folder)


def test_auto_is_the_folders_dtype_where_the_machine_is_fast_in_it(
    translator_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = translator_folder("transformer")
    half = shutil.copytree(whole, tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lm.linear.bf16_is_fast", lambda device, fast=fast: fast)
        assert next(Translator.load(half).model.parameters()).dtype == expected
        assert next(Translator.load(whole).model.parameters()).dtype == torch.float32
        assert next(Translator.load(whole, "bfloat16").model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_in_their_order_whatever_the_batches(kind: str, translator_folder: Folder) -> None:
    translator = loaded(translator_folder(kind))
    model, tokenizer = translator.model, translator.tokenizer
    options: dict[str, Any] = {"beam": 2, "n_best": 2, "max_tokens": 12, "stop_ids": translator.stop_ids}
    counted: list[int] = []
    together = translate(model, tokenizer, NASTY, progress=counted.append, **options)
    assert len(together) == len(NASTY)
    assert counted[-1] == len(NASTY)
    assert counted == sorted(counted)
    for text, translation in zip(NASTY, together, strict=True):
        (alone,) = translate(model, tokenizer, [text], batch_tokens=1, **options)
        assert alone.texts == translation.texts
        assert (alone.tokens, alone.dropped) == (translation.tokens, translation.dropped)
        if not text.strip():
            assert (translation.text, translation.hypotheses, translation.dropped) == ("", [], 0)
        else:
            assert len(translation.texts) == len(translation.hypotheses) == 2
            assert translation.text == tokenizer.decode(translation.hypotheses[0].ids)
            read = min(translation.tokens, longest_source(model))
            assert translation.dropped == translation.tokens - read
    assert translate(model, tokenizer, [], **options) == []
    split = translate(model, tokenizer, NASTY, batch_tokens=60, **options)
    assert [one.texts for one in split] == [one.texts for one in together]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_too_long_loses_its_end_and_keeps_its_special_tokens(
    kind: str, translator_folder: Folder
) -> None:
    translator = loaded(translator_folder(kind))
    model, tokenizer = translator.model, translator.tokenizer
    most = longest_source(model)
    assert model.room(most) * 2 >= most
    assert most == (60 if kind in ("rnnsearch", "transformer") else 40)
    whole = tokenizer.encode("word " * 200)
    ids, dropped = translator.source("word " * 200)
    assert len(ids) == most
    assert dropped == len(whole) - most
    assert ids == whole[: most - 1] + whole[-1:]
    assert whole[-1] == (tokenizer.eos_id if kind in ("rnnsearch", "transformer") else tokenizer.bos_id)
    assert translator.source("to be") == (tokenizer.encode("to be"), 0)


def test_training_mode_is_left_as_it_was(translator_folder: Folder) -> None:
    translator = loaded(translator_folder("transformer"))
    model = translator.model
    model.train()
    before = torch.random.get_rng_state()
    first = translate(model, translator.tokenizer, ["to be"], max_tokens=9, beam=1)
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    model.eval()
    again = translate(model, translator.tokenizer, ["to be"], max_tokens=9, beam=1)
    assert [one.texts for one in again] == [one.texts for one in first]
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), budget=st.integers(1, 200))
def test_batches_hold_each_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    groups = list(batches(dict(enumerate(lengths)), budget))
    assert sorted(key for group in groups for key in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[k] for k in group) <= budget for group in groups)
    flat = [lengths[key] for group in groups for key in group]
    assert flat == sorted(flat, reverse=True)


# ---------------------------------------------------------------- the command


def run(*arguments: str | Path, text: bytes) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "lm", "translate", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, input=text, capture_output=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_for_each_line(kind: str, translator_folder: Folder) -> None:
    folder = translator_folder(kind)
    lines = [text.encode() for text in NASTY]
    lines.insert(3, b"not \xff UTF-8")
    done = run(folder, "--beam", "2", "--max-tokens", "9", "--threads", "1", text=b"\n".join(lines))
    assert done.returncode == 0, done.stderr.decode()
    texts = [line.decode("utf-8", errors="replace") for line in lines]
    translator = loaded(folder)
    params = BeamParams(beam=2, scorer=GNMT(0.6), max_tokens=9)
    expected = translator.translate(texts, params)
    out = done.stdout.decode().removesuffix("\n").split("\n")
    assert out == [one.text.replace("\r", "\n").replace("\n", " ") for one in expected]
    said = done.stderr.decode().splitlines()
    assert said[0] == "line 4 is not UTF-8; what is not was read as U+FFFD."
    cut = [number for number, one in enumerate(expected, start=1) if one.dropped]
    assert [sentence.split(":")[0] for sentence in said[1:]] == [f"line {number}" for number in cut]
    assert {7, 10} <= set(cut)
    tokens, dropped = expected[6].tokens, expected[6].dropped
    assert (
        f"line 7: the source has {tokens} tokens; the last {dropped} of them, for which the model has no place, were "
        "not translated."
    ) in said


def test_the_n_best_with_their_scores(translator_folder: Folder) -> None:
    folder = translator_folder("transformer")
    text = "to be\n\nor not 🦄\r\n".encode()
    done = run(folder, "--beam", "4", "--n-best", "3", "--length-penalty", "1", "--max-tokens", "9", text=text)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [line.split("\t") for line in done.stdout.decode().removesuffix("\n").split("\n")]
    assert [row[0] for row in rows] == ["1"] * 3 + ["2"] + ["3"] * 3
    assert rows[3] == ["2", "0.000000", ""]
    params = BeamParams(beam=4, n_best=3, scorer=GNMT(1.0), max_tokens=9)
    for number, translation in zip("13", loaded(folder).translate(["to be", "or not 🦄"], params), strict=True):
        mine = [row for row in rows if row[0] == number]
        assert [float(row[1]) for row in mine] == pytest.approx([h.score for h in translation.hypotheses], abs=1e-4)


def test_no_lines_and_empty_lines(translator_folder: Folder, capsys: pytest.CaptureFixture) -> None:
    folder = str(translator_folder("rnnsearch"))
    options, translator = parser().parse_args([folder]), Translator.load(folder)
    for text, expected in ((b"", ""), (b"\n", "\n"), (b"\n\n \n", "\n\n\n"), (b"\xef\xbb\xbf\r\n\r", "\n\n")):
        command(translator, BeamParams(), options, io.BytesIO(text))
        assert tuple(capsys.readouterr()) == (expected, "")


def test_a_reader_that_leaves_is_no_error(translator_folder: Folder) -> None:
    words = [sys.executable, "-m", "lm", "translate", str(translator_folder("rnnsearch")), "--max-tokens", "3"]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"to be\n" * 50)
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), said) == (0, b"")


def test_the_bar_is_on_the_terminal_and_the_translations_in_the_file(translator_folder: Folder, tmp_path: Path) -> None:
    """Standard error is a terminal here, standard output a file: nothing of the one may get into the other."""
    if sys.platform == "win32":
        pytest.skip("no pseudo-terminals")
    leader, follower = os.openpty()
    words = [sys.executable, "-m", "lm", "translate", str(translator_folder("transformer")), "--max-tokens", "5"]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=out, stderr=follower, env=os.environ | {"TERM": "xterm"}
        )
        os.close(follower)
        assert process.stdin is not None
        process.stdin.write(b"to be\n" * 30 + b"word " * 200)
        process.stdin.close()
        said = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # how a pseudo-terminal says that nobody writes to it any more
                break
            if not piece:
                break
            said += piece
    os.close(leader)
    assert process.wait(60) == 0
    assert b"translating" in said
    assert b"line 31: the source has" in said
    assert len((tmp_path / "out").read_bytes().split(b"\n")) == 32


def test_lines_that_are_typed_are_answered_one_by_one(translator_folder: Folder) -> None:
    if sys.platform == "win32":
        pytest.skip("no pseudo-terminals")
    leader, follower = os.openpty()
    words = [sys.executable, "-m", "lm", "translate", str(translator_folder("transformer")), "--max-tokens", "5"]
    process = subprocess.Popen(words, cwd=ROOT, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(follower)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in (b"to be\n", b"\n", b"or not\n"):
        os.write(leader, line)
        assert process.stdout.readline().endswith(b"\n")  # before anything more is typed
    os.write(leader, b"\x04")  # Ctrl-D, the end
    assert (process.stdout.read(), process.stderr.read(), process.wait(60)) == (b"", b"", 0)
    process.stdout.close()
    process.stderr.close()
    os.close(leader)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--beam", "0"], "beam must be at least 1, got 0."),
        (["--n-best", "6"], "n_best must be between 1 and beam=5, got 6."),
        (["--length-penalty", "nan"], "length_penalty must be a finite number, got nan."),
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0."),
        (["--batch-tokens", "0"], "batch_tokens must be at least 1, got 0."),
        (["--threads", "-1"], "threads must be at least 1, got -1."),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, translator_folder: Folder, capsys: pytest.CaptureFixture
) -> None:
    assert main(["translate", str(translator_folder("transformer")), *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", sentence + "\n")


def test_folders_that_do_not_translate(
    make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture, translator_folder: Folder
) -> None:
    assert main(["translate", str(tmp_path / "gone")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    from lm.tokenizer import train_characters

    endless = train_characters(["abc"])
    pretrained.save(make(vocab_size=endless.vocab_size), tmp_path / "endless", tokenizer=endless)
    assert main(["translate", str(tmp_path / "endless")]) == 2
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'endless'} names no eos_token; a translator needs one, or no translation would end.\n"
    translator = loaded(translator_folder("transformer"))
    wide = Tokenizer(translator.tokenizer.inner, eos_id=2)
    wide.inner.add_tokens(["zyx"])
    with pytest.raises(ValueError, match="it must be below the model's vocabulary size"):
        translate(translator.model, wide, ["a zyx b"])
