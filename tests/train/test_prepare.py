"""Text to shards: exact, once, never half, and a sentence for every text that cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, reject
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from lm.tokenizer import Tokenizer, train_bpe
from train import shards, sources
from train.config import Recipe, RecipeError, load
from train.data import Tokens
from train.prepare import Prepared, find, prepare
from train.sources import cutting_place, divide

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "model: {context: 8, layers: 1, width: 16, heads: 2}\ntrain: {steps: 1, batch_tokens: 8}\n"
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


def recipe(folder: Path, *overrides: str, tokenizer: str = "characters") -> Recipe:
    """A small recipe whose cache lies in `folder`; overrides as on the command line."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    kinds = {"characters": ["tokenizer.kind=characters"], "bpe": ["tokenizer.vocab_size=280"]}
    return load(path, [f"data.cache={folder / 'cache'}", *kinds.get(tokenizer, []), *overrides])


def text_of(prepared: Prepared, split: Tokens | None) -> str:
    assert split is not None
    return prepared.tokenizer.decode(split[:].tolist(), skip_special_tokens=False)


def documents_of(prepared: Prepared, split: Tokens | None) -> list[str]:
    assert split is not None
    assert prepared.tokenizer.eos_id is not None
    end = prepared.tokenizer.decode([prepared.tokenizer.eos_id], skip_special_tokens=False)
    text = text_of(prepared, split)
    assert text.endswith(end)
    return text.removesuffix(end).split(end)


def problems(*arguments: Any, **keywords: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(*arguments, **keywords), progress=False)
    assert str(caught.value).splitlines() == caught.value.problems, "one line a problem"
    return caught.value.problems


# ------------------------------------------------------------ one plain text


def test_a_fraction_is_the_end_by_characters_as_nanogpt_cuts(tmp_path: Path) -> None:
    letters = "".join(map(chr, range(32, 97)))
    text = "".join(np.random.default_rng(0).choice(list(letters), 1_115_394))
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare(recipe(tmp_path, f"data.text={tmp_path}/a.txt", "data.validation=0.1"), progress=False)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation)) == (1_003_854, 111_540)
    assert text_of(prepared, prepared.train) == text[: int(0.9 * len(text))]
    assert text_of(prepared, prepared.validation) == text[int(0.9 * len(text)) :]
    assert (prepared.train.bytes_total, prepared.validation.bytes_total) == (1_003_854, 111_540)
    assert prepared.train[:1].dtype == np.uint16
    assert not prepared.train.documents


@given(
    text=st.text(alphabet="ab é\n\r\t🦄", min_size=30, max_size=300),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
    kind=st.sampled_from(["characters", "bpe"]),
)
def test_nothing_is_lost_and_bytes_are_counted(
    text: str, fraction: float, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(text, newline="")
    made = recipe(folder, f"data.text={folder}/a.txt", f"data.validation={fraction}", "model.context=1", tokenizer=kind)
    try:
        prepared = prepare(made, progress=False)
    except RecipeError:
        reject()  # a text of few different words can be one token
    assert prepared.validation is not None
    count = int(len(text) * (10 - round(fraction * 10)) / 10)
    held, kept = text_of(prepared, prepared.validation), text_of(prepared, prepared.train)
    assert kept == text[:count]
    known = set(text[:count]) if kind == "characters" else set(text)
    assert held == "".join(character if character in known else "<unk>" for character in text[count:])
    assert prepared.train.bytes_total == len(text[:count].encode())
    assert prepared.validation.bytes_total == len(text[count:].encode())


def test_the_tokenizer_learns_from_what_trains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 45 + "z" * 10)
    prepared = prepare(recipe(tmp_path, f"data.text={tmp_path}/a.txt", "data.validation=0.1"), progress=False)
    assert text_of(prepared, prepared.validation) == "<unk>" * 10
    assert set(prepared.tokenizer.inner.get_vocab()) == {"<unk>", "a", "b"}


def test_a_long_text_is_tokenised_in_pieces_as_if_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 64)
    monkeypatch.setattr(shards, "BATCH", 200)
    monkeypatch.setattr(shards, "SHARD", 1000)
    text = "".join(f"{line} Don't  speak,\tsir." + "\n" * (1 + line % 3) for line in range(400))
    (tmp_path / "a.txt").write_text(text)
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt", "data.validation=null", tokenizer="bpe")
    prepared = prepare(made, progress=False)
    assert prepared.validation is None
    assert prepared.train[:].tolist() == prepared.tokenizer.encode(text)
    files = sorted(prepared.tokenizer_folder.parent.glob("*.bin"))
    assert len(files) == -(-len(prepared.train) // 1000) > 1
    assert {file.stat().st_size for file in files[:-1]} == {2000}


@given(text=st.text(alphabet="ab.,1 \n\t", min_size=1, max_size=200))
def test_pieces_are_cut_where_a_pre_tokenizer_cuts(text: str) -> None:
    """GPT-2's and Llama 3's patterns give the same words for the pieces as for the whole."""
    letters, marks = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    llama3 = pre_tokenizers.Split(tokenizers.Regex(rf"{letters}|{marks}|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 8)
        place = cutting_place(text)
    if place == 0 or len(text) >= 16 * 8:
        return
    for words in (pre_tokenizers.ByteLevel(add_prefix_space=False), llama3):
        whole = [word for word, _ in words.pre_tokenize_str(text)]
        pieces = [word for part in (text[:place], text[place:]) for word, _ in words.pre_tokenize_str(part)]
        assert pieces == whole


def test_a_text_without_line_ends_comes_in_bounded_pieces() -> None:
    pieces = list(divide(iter(["x" * 50_000] * 100), None))
    assert sum(len(text) for text, _ in pieces) == 5_000_000
    assert max(len(text) for text, _ in pieces) <= 17 * sources.PIECE
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_corpus_is_never_held_whole(tmp_path: Path) -> None:
    line = "Speak, speak. " * 5 + "\n"
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(50):
            file.write(line * 5_000)
    size = (tmp_path / "a.txt").stat().st_size
    assert size > 15_000_000
    files = sources.Files("data.text", [str(tmp_path / "a.txt")], None, "text")
    tracemalloc.start()
    assert sum(len(piece.text) for piece in files.pieces()) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + SPEECH.replace("\n", "\r\n").encode())
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt", "data.validation=null", tokenizer=kind)
    prepared = prepare(made, progress=False)
    assert text_of(prepared, prepared.train) == SPEECH.replace("\n", "\r\n")


# ------------------------------------------------------------ several documents


def test_documents_of_files_globs_and_rows(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "d.jsonl").write_text('{"text": "fourth"}\n\n{"text": "fifth", "id": 1}\n')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "sixth"}\n{"text": ""}'))
    (tmp_path / "empty.txt").write_text("")
    for tokenizer in ("characters", "bpe"):
        names = ["[ab].txt", "c*", "*.jsonl*", "empty.txt", "a.txt"]
        given = "data.text=" + json.dumps([f"{tmp_path}/{name}" for name in names])
        prepared = prepare(recipe(tmp_path, given, "data.validation=null", tokenizer=tokenizer), progress=False)
        assert documents_of(prepared, prepared.train) == ["first", "second", "third", "fourth", "fifth", "sixth"]
        assert prepared.train.documents
        assert prepared.train.bytes_total == len("firstsecondthirdfourthfifthsixth")


def test_the_order_of_a_list_counts_and_a_globs_is_sorted(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name * 9)
    both = [f"data.text=[{tmp_path}/b.txt, {tmp_path}/a.txt]", f"data.text={tmp_path}/?.txt"]
    found = [prepare(recipe(tmp_path, given, "data.validation=null"), progress=False) for given in both]
    assert [documents_of(prepared, prepared.train) for prepared in found] == [["b" * 9, "a" * 9], ["a" * 9, "b" * 9]]


@given(
    documents=st.lists(st.text(alphabet="ab\n<", max_size=90), min_size=1, max_size=8),
    separator=st.sampled_from(["\n\n", "<|>", "--"]),
    piece=st.integers(1, 40),
)
def test_a_separator_divides_whatever_the_chunks(documents: list[str], separator: str, piece: int) -> None:
    text = separator.join(documents)
    chunks = [text[start : start + piece] for start in range(0, len(text), piece)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 16)
        pieces = list(divide(iter(chunks), separator))
    found, current = [], ""
    for part, ends in pieces:
        current += part
        if ends:
            found.append(current)
            current = ""
    assert current == ""
    assert found == text.split(separator)


def test_a_separator_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    made = recipe(
        tmp_path, f"data.text={tmp_path}/a.txt", r'data.separator="\n\n"', "data.validation=0.4", "model.context=4"
    )
    prepared = prepare(made, progress=False)
    first, second = SPEECH.split("\n\n")
    assert documents_of(prepared, prepared.train) == [first]
    assert documents_of(prepared, prepared.validation) == [
        "".join(character if character in first else "<unk>" for character in second)
    ]


@pytest.mark.parametrize(("fraction", "training"), [(0.1, 9), (0.25, 7), (0.5, 5), (0.01, 9), (0.99, 1)])
def test_documents_are_cut_nearest_to_the_fraction_with_one_on_each_side(
    tmp_path: Path, fraction: float, training: int
) -> None:
    rows = [f"document {number} of ten" for number in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepared = prepare(recipe(tmp_path, f"data.text={tmp_path}/a.jsonl", f"data.validation={fraction}"), progress=False)
    assert documents_of(prepared, prepared.train) == rows[:training]
    assert text_of(prepared, prepared.validation).count("\x03") == 10 - training
    assert prepared.validation is not None
    assert prepared.train.bytes_total + prepared.validation.bytes_total == sum(map(len, rows))


def test_validation_from_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    (tmp_path / "b.txt").write_text("Speak, Citizen.")
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt", f"data.validation={tmp_path}/b.txt")
    prepared = prepare(made, progress=False)
    assert text_of(prepared, prepared.train) == SPEECH
    assert text_of(prepared, prepared.validation) == "Speak, Citizen."


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "0123 \\ud83e! 456"}\n')
    prepared = prepare(recipe(tmp_path, f"data.text={tmp_path}/a.jsonl", "data.validation=null"), progress=False)
    assert documents_of(prepared, prepared.train) == ["0123 \ufffd! 456"]


# ------------------------------------------------------------ datasets


def rows_folder(folder: Path, kind: str) -> Path:
    rows = [{"body": f"row {number} speaks", "id": number} for number in range(20)]
    folder.mkdir()
    for split, part in (("train", rows[:15]), ("test", rows[15:])):
        if kind == "jsonl":
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{split}.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_folder_as_a_dataset(tmp_path: Path, kind: str, streaming: str) -> None:
    folder = rows_folder(tmp_path / "rows", kind)
    given = [f"data.dataset={folder}", "data.text_key=body", f"data.streaming={streaming}", "data.validation=test"]
    prepared = prepare(recipe(tmp_path, *given), progress=False)
    assert documents_of(prepared, prepared.train) == [f"row {number} speaks" for number in range(15)]
    assert documents_of(prepared, prepared.validation) == [f"row {number} speaks" for number in range(15, 20)]
    prepared = prepare(recipe(tmp_path, *given[:3], "data.validation=0.2"), progress=False)
    assert len(documents_of(prepared, prepared.validation)) == 3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.text_key=content"], 'data.text_key is "content", and'),
        (["data.text_key=id"], "row 1: id is 0; it must be text."),
        (["data.split=dev"], "`datasets` cannot load it"),
        (["data.text_key=body", "data.validation=dev"], 'data.validation is "dev", and `datasets` cannot load it'),
        (["data.dataset_config=german"], "`datasets` cannot load it"),
        (
            ["data.dataset=nobody/nothing-of-this-name"],
            'data.dataset is "nobody/nothing-of-this-name", and `datasets` cannot',
        ),
        (["data.dataset=/no/such/folder"], "`datasets` cannot load it"),
    ],
)
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_dataset_that_cannot_be_read_gets_a_sentence(
    tmp_path: Path, overrides: list[str], sentence: str, streaming: str
) -> None:
    folder = rows_folder(tmp_path / "rows", "jsonl")
    (problem,) = problems(tmp_path, f"data.dataset={folder}", f"data.streaming={streaming}", *overrides)
    assert sentence in problem
    assert left_over(tmp_path) == []


def test_a_prepared_dataset_is_found_again_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rows_folder(tmp_path / "rows", "jsonl")
    given = [f"data.dataset={folder}", "data.text_key=body"]
    first = prepare(recipe(tmp_path, *given), progress=False)
    monkeypatch.setattr(sources.Rows, "_dataset", lambda self: pytest.fail("asked for the dataset"))
    assert prepare(recipe(tmp_path, *given), progress=False).fingerprint == first.fingerprint


# ------------------------------------------------------------ the cache


def left_over(folder: Path) -> list[str]:
    """What a cache holds that is neither finished nor bookkeeping."""
    cache = folder / "cache"
    if not cache.exists():
        return []
    return [p.name for p in cache.iterdir() if p.suffix not in (".lock", ".json") and not (p / "meta.json").exists()]


def made_at(prepared: Prepared) -> int:
    return (prepared.tokenizer_folder.parent / "meta.json").stat().st_mtime_ns


def test_built_once_and_again_when_something_differs(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(SPEECH)
    given = [f"data.text={text}", "data.validation=0.2"]
    first = prepare(recipe(tmp_path, *given), progress=False)
    same = [
        prepare(recipe(tmp_path, *given), progress=False),
        prepare(recipe(tmp_path, *given, "model.context=4", "run.seed=5", "train.steps=9"), progress=False),
    ]
    moved = tmp_path / "elsewhere" / "b.txt"
    moved.parent.mkdir()
    moved.write_text(SPEECH)
    same.append(prepare(recipe(tmp_path, f"data.text={moved}", "data.validation=0.2"), progress=False))
    assert {(other.fingerprint, made_at(other)) for other in same} == {(first.fingerprint, made_at(first))}

    others = [
        prepare(recipe(tmp_path, *given, tokenizer="bpe"), progress=False),
        prepare(
            recipe(tmp_path, *given, "tokenizer.vocab_size=270", "tokenizer.kind=bpe", tokenizer=""), progress=False
        ),
        prepare(recipe(tmp_path, *given, "data.validation=0.3"), progress=False),
        prepare(recipe(tmp_path, *given, r'data.separator="\n\n"'), progress=False),
    ]
    text.write_text(SPEECH.replace("hear", "heir"))  # the same size
    others.append(prepare(recipe(tmp_path, *given), progress=False))
    assert "heir" in text_of(others[-1], others[-1].train)
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


def test_find_looks_without_writing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt")
    assert find(made) is None
    assert not (tmp_path / "cache").exists()
    prepared = prepare(made, progress=False)
    found = find(made)
    assert found is not None
    assert found.fingerprint == prepared.fingerprint
    assert len(found.train) == len(prepared.train)


@pytest.mark.parametrize("damage", ["cut", "gone", "meta", "tokenizer"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt")
    folder = prepare(made, progress=False).tokenizer_folder.parent
    shard = folder / "tokens-00000.bin"
    match damage:
        case "cut":
            os.truncate(shard, 10)
        case "gone":
            shard.unlink()
        case "meta":
            (folder / "meta.json").write_text('{"dtype": "<u')
        case "tokenizer":
            (folder / "tokenizer" / "tokenizer.json").write_text("")
    again = prepare(made, progress=False)
    assert text_of(again, again.train) + text_of(again, again.validation) == SPEECH


KILLED = """
import os, signal, sys
from train import prepare, shards
from train.config import load
moment = sys.argv[2]
def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "tokenizer": prepare._learn = die
if moment == "tokens": shards.Writer._append = die
if moment == "meta": shards.Writer.finish = die
if moment == "rename": os.replace = die
prepare.prepare(load(sys.argv[1], sys.argv[3:]))
"""


@pytest.mark.parametrize("moment", ["tokenizer", "tokens", "meta", "rename"])
def test_a_killed_build_leaves_nothing_that_is_taken_for_finished(tmp_path: Path, moment: str) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    overrides = [f"data.text={tmp_path}/a.txt"]
    made = recipe(tmp_path, *overrides)
    words = [
        str(tmp_path / "recipe.yaml"),
        moment,
        f"data.cache={tmp_path / 'cache'}",
        "tokenizer.kind=characters",
        *overrides,
    ]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert find(made) is None
    prepared = prepare(made, progress=False)
    assert text_of(prepared, prepared.train) + text_of(prepared, prepared.validation) == SPEECH
    assert left_over(tmp_path) == [], "what the killed build left is cleared away"


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH * 20_000)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = (
        "import sys; from train.config import load; from train.prepare import prepare;"
        "p = prepare(load(sys.argv[1], sys.argv[2:])); print(p.fingerprint, len(p.train))"
    )
    words = [str(tmp_path / "recipe.yaml"), f"data.cache={tmp_path / 'cache'}", f"data.text={tmp_path}/a.txt"]
    command = [sys.executable, "-c", code, *words, "tokenizer.vocab_size=300"]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(len(lines) == 2 and lines[0].startswith("prepared ") for lines in outputs) == 1
    assert left_over(tmp_path) == []


def test_one_line_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt")
    prepared = prepare(made)
    out, err = capfd.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    assert f"{len(prepared.train):,} training" in line
    assert f"vocabulary {prepared.tokenizer.vocab_size}" in line
    prepare(made)
    assert capfd.readouterr() == ("", "")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0} | {f"w{number}": number for number in range(1, 70_000)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    Tokenizer(inner).save(tmp_path / "words")
    (tmp_path / "a.txt").write_text("w69999 w1 w65536 " * 9)
    made = recipe(
        tmp_path,
        f"data.text={tmp_path}/a.txt",
        "tokenizer.kind=folder",
        f"tokenizer.folder={tmp_path}/words",
        tokenizer="",
    )
    prepared = prepare(made, progress=False)
    assert prepared.train[:3].tolist() == [69999, 1, 65536]
    assert prepared.train[:1].dtype == np.uint32


def test_another_models_tokenizer(tmp_path: Path) -> None:
    other = train_bpe(["Speak, speak, speak."] * 3, 265)
    other.save(tmp_path / "other")
    (tmp_path / "a.txt").write_text(SPEECH)
    given = [f"data.text={tmp_path}/a.txt", "data.validation=null", "tokenizer.kind=folder"]
    prepared = prepare(recipe(tmp_path, *given, f"tokenizer.folder={tmp_path}/other", tokenizer=""), progress=False)
    assert prepared.train[:].tolist() == other.encode(SPEECH)
    assert Tokenizer.load(prepared.tokenizer_folder).fingerprint() == other.fingerprint()


# ------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        (None, ["data.text={}/none.txt"], 'none.txt", and there is no such file.'),
        (None, ["data.text={}/*.txt"], '*.txt", and no file matches it.'),
        (None, ["data.text={}"], ", and that is a folder; write"),
        (None, ["data.text={}/a.parquet"], "and there is no such file"),
        (SPEECH, ["data.validation={}/none.txt"], 'data.validation is "'),
        (SPEECH, ["tokenizer.kind=folder", "tokenizer.folder={}/none"], "has no tokenizer.json"),
        ("", [], "and there is no text in it."),
        (
            "abc",
            ["data.validation=null"],
            "model.context is 8, and the training part of the text has 3 tokens; it must have at least 9",
        ),
        ("0123456789", ["data.validation=0.9"], "the training part of the text has 1 tokens"),
        (
            "0123456789",
            ["data.validation=0.01"],
            "data.validation is 0.01, and that is 1 tokens; it must be at least 2.",
        ),
        (SPEECH, ["data.document_mask=true"], "data.document_mask is true; it needs documents to tell apart"),
        ("caf\udce9 au lait", [], "a.txt is not UTF-8 text: it holds the byte 0xe9"),
    ],
)
def test_a_text_that_cannot_be_used_gets_a_sentence(
    tmp_path: Path, text: str | None, overrides: list[str], sentence: str
) -> None:
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text.encode(errors="surrogateescape"))
    overrides = [override.format(tmp_path) for override in overrides]
    if not any(override.startswith("data.text") for override in overrides):
        overrides.append(f"data.text={tmp_path}/a.txt")
    (problem,) = problems(tmp_path, *overrides)
    assert sentence in problem
    assert problem.endswith((".", ")."))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.jsonl",
            b'{"body": "x", "id": 3}\n',
            'data.text_key is "text", and {}/a.jsonl line 1 has the keys body, id.',
        ),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "{}/a.jsonl line 2: text is 3; it must be text."),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "{}/a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'"text"\n', '{}/a.jsonl line 1 is "text"; each line must be a JSON object.'),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "{}/a.jsonl is not UTF-8 text"),
        ("a.jsonl.gz", b'{"text": "not compressed"}\n', "{}/a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:-20], "{}/a.txt.gz cannot be read"),
        ("a.json", b"[]", "{}/a.json, and .json is not plain text"),
        ("a.parquet", b"PAR1", "or its folder as data.dataset."),
    ],
)
def test_rows_that_cannot_be_read_get_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    (problem,) = problems(tmp_path, f"data.text={tmp_path}/{name}")
    assert sentence.format(tmp_path) in problem
    assert left_over(tmp_path) == []


def test_one_document_has_no_end_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "all there is to read"}\n')
    (problem,) = problems(tmp_path, f"data.text={tmp_path}/a.jsonl", "data.validation=0.1")
    assert "it needs two documents or more" in problem


def test_missing_text_and_validation_are_said_together(tmp_path: Path) -> None:
    given = ["data.text=[none.txt, no*.txt]", "data.validation=nothing.txt"]
    given += ["tokenizer.kind=folder", "tokenizer.folder=none"]
    assert len(problems(tmp_path, *given, tokenizer="")) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "data.cache is" in problems(tmp_path, f"data.text={tmp_path}/a.txt")[0]


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SPEECH)
    (tmp_path / "cache").write_text("")
    (problem,) = problems(tmp_path, f"data.text={tmp_path}/a.txt")
    assert problem == f'data.cache is "{tmp_path}/cache", and it cannot be used: File exists.'


def test_an_interrupted_build_goes_on_at_once(tmp_path: Path) -> None:
    """A lock dies with its holder: the next process does not wait for a person to remove a file."""
    (tmp_path / "a.txt").write_text(SPEECH)
    made = recipe(tmp_path, f"data.text={tmp_path}/a.txt")
    prepare(made, progress=False)
    for lock in (tmp_path / "cache").glob("*.lock"):
        assert lock.stat().st_size == 0
    began = time.monotonic()
    prepare(made, progress=False)
    assert time.monotonic() - began < 2
