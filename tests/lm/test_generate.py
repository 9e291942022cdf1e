"""`python -m lm generate`: text as it comes, whole characters only, one sentence where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm import DecoderLM, SamplingParams, generate, pretrained
from lm.__main__ import main
from lm.generate import TextStream, continuation
from lm.pretrained import stop_ids
from lm.search import generate as search
from lm.tokenizer import Tokenizer, train_bpe, train_characters

ROOT = Path(__file__).resolve().parents[2]
TEXT = ["to be or not to be, that is the question — naïve 🦄 café"] * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXT, 280)


@pytest.fixture(scope="module")
def folder(bpe: Tokenizer, make: Callable[..., DecoderLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    pretrained.save(make(vocab_size=bpe.vocab_size), folder, tokenizer=bpe)
    return folder


# ------------------------------------------------------------ ids to text


@settings(max_examples=150, deadline=None)
@given(data=st.data(), prompt=st.text(max_size=8))
@example(data=None, prompt="🦄")
def test_pieces_joined_are_the_whole_and_none_is_half_a_character(
    data: st.DataObject | None, prompt: str, bpe: Tokenizer
) -> None:
    """Random ids are mostly broken UTF-8; the ids of a text are split inside its characters, whose bytes are tokens."""
    before = bpe.encode(prompt)
    anything = st.lists(st.integers(0, bpe.vocab_size - 1), max_size=30)
    ids = bpe.encode("🦄é字") if data is None else data.draw(anything | st.text(max_size=10).map(bpe.encode))
    text = TextStream(bpe, before)
    pieces = [text.feed(id) for id in ids]
    rest = text.finish()
    whole = bpe.decode([*before, *ids])
    assert bpe.decode(before) + "".join(pieces) + rest == whole
    if "\ufffd" not in whole:
        assert rest == ""
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(bpe: Tokenizer) -> None:
    ids = bpe.encode("字a")
    assert len(ids) == 4
    text = TextStream(bpe, bpe.encode("to be"))
    assert [text.feed(id) for id in ids] == ["", "", "字", "a"]
    unfinished = TextStream(bpe, bpe.encode("to be"))
    assert [unfinished.feed(id) for id in ids[:2]] == ["", ""]
    assert unfinished.finish() == "\ufffd"


def test_spaces_that_a_decoder_drops_in_front_are_kept_between_tokens() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {token: id for id, token in enumerate(["▁to", "▁be", "<unk>"])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    text = TextStream(Tokenizer(inner), [0])
    assert [text.feed(1), text.feed(0)] == [" be", " to"]


def test_every_end_of_text_id_stops(bpe: Tokenizer, tmp_path: Path) -> None:
    assert set(stop_ids(tmp_path, bpe)) == {bpe.eos_id}
    for named, expected in (([5, 6], {bpe.eos_id, 5, 6}), (7, {bpe.eos_id, 7}), (None, {bpe.eos_id})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert set(stop_ids(tmp_path, bpe)) == expected
    (tmp_path / "generation_config.json").write_text("[]")
    assert stop_ids(tmp_path, train_characters(TEXT)) == []


# ------------------------------------------------------------ the command


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lm", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, env=os.environ | environment)


def test_the_command_writes_prompt_and_continuation(folder: Path, bpe: Tokenizer) -> None:
    done = run(
        "generate", folder, "to be 🦄", "--max-tokens", "20", "--seed", "3", "--temperature", "1.5", "--top-k", "50"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    params = SamplingParams(max_tokens=20, seed=3, temperature=1.5, top_k=50)
    ids = bpe.encode("to be 🦄")
    added = search(pretrained.load(folder), [ids], params, [bpe.eos_id] if bpe.eos_id is not None else [])[0]
    assert done.stdout.decode() == bpe.decode(ids + added) + "\n"


def test_a_console_without_the_character_shows_another(folder: Path) -> None:
    done = run("generate", folder, "to be 🦄", "--max-tokens", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"to be ?")


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "lm", "generate", str(folder), "to be", "--max-tokens", "40"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"t"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), said) == (0, b"")


def test_pieces_come_before_the_end(folder: Path) -> None:
    pieces = continuation(str(folder), "to be", SamplingParams(max_tokens=None, seed=1))
    assert sum(1 for _ in pieces) > 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["FOLDER", ""], "the prompt is empty; it must hold at least one token."),
        (["FOLDER", "字" * 16], "the prompt has 48 tokens; it must have fewer than the model's context, 48."),
        (["FOLDER", "a\udcff"], "the prompt is not UTF-8; it must be text."),
        (
            ["FOLDER/gone", "a"],
            "FOLDER/gone is not a folder; a model is a folder with config.json and model.safetensors, or a GGUF file.",
        ),
        (["FOLDER", "a", "--temperature", "3"], "temperature must be in [0, 2], got 3.0."),
        (["FOLDER", "a", "--top-p", "0"], "top_p must be in (0, 1], got 0.0."),
        (["FOLDER", "a", "--top-k", "-5"], "top_k must be 0 (disable), or at least 1, got -5."),
        (["FOLDER", "a", "--min-p", "2"], "min_p must be in [0, 1], got 2.0."),
        (["FOLDER", "a", "--max-tokens", "0"], "max_tokens must be at least 1, got 0."),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["generate", *(word.replace("FOLDER", str(folder)) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", sentence.replace("FOLDER", str(folder)) + "\n")


def test_a_folder_without_tokenizer_and_one_with_too_many_tokens(
    make: Callable[..., DecoderLM], bpe: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrained.save(make(), tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "to be"]) == 2
    bpe.save(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "to be"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{tmp_path / 'model'} has no tokenizer.json, and that is the file a tokenizer is read from."
    assert said[1].endswith("; it must be below the model's vocabulary size, 50.")


def test_characters_without_end_of_text_fill_the_context(
    make: Callable[..., DecoderLM], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = train_characters(["abc"])
    pretrained.save(make(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer=tokenizer)
    assert main(["generate", str(tmp_path / "model"), "ab", "--top-k", "3"]) == 0
    assert len(capsys.readouterr().out.replace("<unk>", "?")) == 48 + 1


def test_verbs_and_help(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert main(["fly"]) == 2
    said = capsys.readouterr().err
    assert "a verb must come first." in said
    assert "fly is not a verb; the verbs are attend, convert, generate, score, translate." in said
    assert main(["--help"]) == 0
    assert "usage: python -m lm generate MODEL PROMPT" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        generate.main(["--help"])
    assert left.value.code == 0
    assert "--max-tokens" in capsys.readouterr().out
