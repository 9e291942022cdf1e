"""Pairs from files, tables and datasets: what is read, what is left out, and what is refused, by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from train.config import Recipe, load
from train.pair_prepare import find_pairs, prepare_pairs
from train.schema import RecipeError

PAIRS = [(f"das {n} haus", f"the {n} house") for n in range(20)]
RECIPE = """
data: {{cache: {folder}/cache}}
tokenizer: {{kind: words}}
model: {{architecture: {architecture}, context: 16{shape}}}
train: {{steps: 1, batch_tokens: 64}}
"""


def recipe(folder: Path, *overrides: str, architecture: str = "transformer") -> Recipe:
    shape = {"decoder": ", layers: 1, width: 16, heads: 2"}.get(architecture, "")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, architecture=architecture, shape=shape), encoding="utf-8")
    return load(path, list(overrides))


def lines(folder: Path, pairs: list[tuple[str, str]] = PAIRS, end: str = "\n") -> list[str]:
    """Overrides that name two line-aligned files with these pairs."""
    for name, side in (("source", 0), ("target", 1)):
        (folder / f"{name}.txt").write_bytes("".join(pair[side] + end for pair in pairs).encode())
    return [f"data.source={folder}/source.txt", f"data.target={folder}/target.txt"]


def texts(folder: Path, *overrides: str) -> list[tuple[str, str]]:
    """The training pairs, as the tokenizer gives them back."""
    prepared = prepare_pairs(recipe(folder, *overrides), progress=False)
    decode = prepared.tokenizer.decode
    return [
        (decode(source.tolist()), decode(target.tolist()))
        for source, target in map(prepared.train.__getitem__, range(len(prepared.train)))
    ]


def problem(folder: Path, *overrides: str, architecture: str = "transformer") -> str:
    """The one sentence that a recipe, or its data, is refused with."""
    with pytest.raises(RecipeError) as caught:
        prepare_pairs(recipe(folder, *overrides, architecture=architecture), progress=False)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


def test_every_form_gives_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = "data.validation=null"
    assert texts(tmp_path, *lines(tmp_path), none) == PAIRS
    assert texts(tmp_path, *lines(tmp_path, end="\r\n"), none) == PAIRS
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    for name, side in (("source", 0), ("target", 1)):
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write("\n".join(pair[side] for pair in PAIRS))  # without a last line end
    assert texts(tmp_path, "data.source=${SOME_DATA}/source.gz", "data.target=$SOME_DATA/target.gz", none) == PAIRS
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    assert texts(tmp_path, f"data.pairs={tmp_path}/pairs.tsv", none) == PAIRS
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS))
    assert texts(tmp_path, f"data.pairs={tmp_path}/pairs.jsonl", none) == PAIRS
    nested = "".join(json.dumps({"translation": {"de": a, "en": b}}) + "\n" for a, b in PAIRS)
    (tmp_path / "nested.jsonl").write_text(nested)
    keys = ["data.source_key=de", "data.target_key=en"]
    assert texts(tmp_path, f"data.pairs={tmp_path}/nested.jsonl", *keys, none) == PAIRS
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(nested)
    assert texts(tmp_path, f"data.dataset={folder}", *keys, none) == PAIRS


def test_what_is_held_out(tmp_path: Path) -> None:
    files = lines(tmp_path)
    prepared = prepare_pairs(recipe(tmp_path, *files, "data.validation=0.25"), progress=False)
    assert (len(prepared.train), prepared.held) == (15, PAIRS[15:])
    assert prepared.validation is not None
    assert len(prepared.validation) == 5
    named = [f"data.validation_{side}={tmp_path}/{side}.txt" for side in ("source", "target")]
    whole = prepare_pairs(recipe(tmp_path, *files, *named), progress=False)
    assert (len(whole.train), whole.held) == (20, PAIRS)


def test_a_source_ends_as_its_architecture_reads_it(tmp_path: Path) -> None:
    files = lines(tmp_path)
    for architecture, end in (("transformer", "</s>"), ("rnnsearch", "</s>"), ("decoder", "<s>")):
        prepared = prepare_pairs(recipe(tmp_path, *files, architecture=architecture), progress=False)
        ids = prepared.tokenizer.encode("das haus")
        assert prepared.tokenizer.inner.id_to_token(ids[-1]) == end
        assert prepared.frame().source_end == ids[-1]
        assert prepared.tokenizer.encode("das haus", add_special_tokens=False) == ids[:-1]
        batch = prepared.frame().batch(prepared.train, [0])
        assert batch["src"][0].tolist() == prepared.tokenizer.encode(PAIRS[0][0])


def test_a_joint_bpe_gives_pre_tokenised_text_back_exactly(tmp_path: Path) -> None:
    pairs = [("ein mann , der &quot; ja &quot; sagt .", "a man   who says 'yes' . – 😀")] * 5
    options = (*lines(tmp_path, pairs), "tokenizer.kind=bpe", "tokenizer.vocab_size=300", "data.validation=null")
    assert texts(tmp_path, *options) == pairs


def test_empty_pairs_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = lines(tmp_path, [*PAIRS, ("", "nothing"), ("  ", ""), ("nichts", " ")])
    prepared = prepare_pairs(recipe(tmp_path, *files, "data.validation=null"))
    assert (len(prepared.train), prepared.empty) == (20, 3)
    assert "prepared 20 training pairs, 3 with an empty side left out" in capsys.readouterr().out


def test_prepared_once_and_named_by_content(tmp_path: Path) -> None:
    files = lines(tmp_path)
    asked = recipe(tmp_path, *files)
    assert find_pairs(asked) is None
    first = prepare_pairs(asked, progress=False)
    found = find_pairs(asked)
    assert found is not None
    assert found.fingerprint == first.fingerprint
    (tmp_path / "target.txt").write_text("".join(f"{b} !\n" for _, b in PAIRS))
    assert find_pairs(asked) is None
    assert prepare_pairs(asked, progress=False).fingerprint != first.fingerprint


REFUSED = [
    (["data.source=a", "data.pairs=b", "data.target=c"], "data.source and data.pairs are both given"),
    (["data.source=a"], "data.source is \"a\" and data.target is missing; the two belong together."),
    (["data.target=a"], "data.target is \"a\" and data.source is missing; the two"),
    (["data.synthetic=turn"], "data.synthetic is \"turn\"; it must be one of copy, reverse, sort or null."),
    (["data.text=a.txt"], "model.architecture is transformer; it learns from pairs"),
    (["data.synthetic=copy", "data.source_key=a", "data.target_key=b"], "it belongs to data.dataset and to data.pairs"),
    (["data.synthetic=copy", "data.validation=held.txt"], "it must be a fraction"),
    (["data.synthetic=copy", "train.steps=null", "train.tokens=5"], "train.tokens is 5; batches of pairs differ"),
    (["data.synthetic=copy", "train.batch_tokens=null"], "train.batch_sentences are both missing"),
    (["data.synthetic=copy", "train.batch_tokens=8"], "it must hold a pair of model.context, which is 16."),
    (["data.synthetic=copy", "eval.prompts=[a]"], "a translator is shown held-out sources"),
    (["data.synthetic=copy", "tokenizer.kind=characters"], "it must be bpe, words or folder"),
    (["data.synthetic=copy", "eval.bleu=5", "data.validation=null"], "there is nothing to translate"),
    (["data.synthetic=copy", "schedule.kind=inverse_sqrt"], "schedule.kind=inverse_sqrt needs a warm-up"),
    (["data.synthetic=copy", "checkpoint.average=3"], "what is averaged must be kept: checkpoint.keep=3."),
    (["data.synthetic=copy", "model.layers=3"], "model.layers is not a key; did you mean model.encoder_layers?"),
    (["data.synthetic=copy", "model.heads=7"], "model.heads is 7; it must divide width 512"),
    (["data.synthetic=copy", "model.norm=rms"], "model.norm is 'rms'; it must be one of post, pre."),
    (["data.synthetic=copy", "model.architecture=lstm"], "it must be one of decoder, transformer, rnnsearch."),
    (
        ["data.synthetic=copy", "model.architecture=rnnsearch", "train.activation_checkpointing=true"],
        "train.activation_checkpointing is true; rnnsearch has no layers",
    ),
    (["data.source=${HEED_NOT_SET}/a", "data.target=/dev/null"], "the environment variable HEED_NOT_SET is not set"),
    (["data.pairs=nowhere.tsv"], "data.pairs is \"nowhere.tsv\", and there is no such file."),
    (["data.synthetic=copy", "data.rows=1", "data.validation=0.5"], "nothing is left to train on"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_refusals(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    assert sentence in problem(tmp_path, *overrides)


def test_bad_files(tmp_path: Path) -> None:
    files = lines(tmp_path)
    (tmp_path / "target.txt").write_text("one\ntwo\n")
    assert "source.txt) has 20 lines and data.target" in problem(tmp_path, *files)
    assert "has 2 lines; line n of the one" in problem(tmp_path, *files)
    (tmp_path / "source.txt").write_text("")
    (tmp_path / "target.txt").write_text("")
    assert "there is no pair in it" in problem(tmp_path, *files)
    (tmp_path / "pairs.tsv").write_text("a\tb\nno tab\n")
    assert "line 2 has 0 tabs" in problem(tmp_path, f"data.pairs={tmp_path}/pairs.tsv")
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": 3, "target": "b"}\n')
    assert "line 2: source is 3; it must be text." in problem(tmp_path, f"data.pairs={tmp_path}/pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"de": "a", "target": "b"}\n')
    assert "has the keys de, target" in problem(tmp_path, f"data.pairs={tmp_path}/pairs.jsonl")
    (tmp_path / "source.txt").write_bytes(b"gut\n\xff\n")
    (tmp_path / "target.txt").write_text("good\nbad\n")
    assert "is not UTF-8 text: it holds the byte 0xff" in problem(tmp_path, *files)
    (tmp_path / "source.gz").write_bytes(b"no gzip")
    assert "cannot be read" in problem(tmp_path, f"data.source={tmp_path}/source.gz", files[1])


def test_a_killed_build_leaves_nothing_that_is_taken_for_finished(tmp_path: Path) -> None:
    asked = recipe(tmp_path, *lines(tmp_path))
    folder = tmp_path / "cache" / prepare_pairs(asked, progress=False).fingerprint[:16]
    (folder / "train-target.npy").unlink()
    assert find_pairs(asked) is None
    assert len(prepare_pairs(asked, progress=False).train) == 18
