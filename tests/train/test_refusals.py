"""What cannot run is refused through the command itself: exit status 2, one sentence a mistake, no traceback, nothing
written and nothing lost. tests/train/test_config.py has the keys one by one; here is the way from the command to the
first update."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.__main__ import main

ROOT = Path(__file__).resolve().parents[2]

# (what is made in the folder DIR, overrides, the sentences in order as regular expressions)
Case = tuple[dict[str, str | bytes], list[str], list[str]]
TEXT = "a few words that are shorter than they seem. " * 40
LINES = "\n".join(["ein haus", "zwei hunde"] * 20)
TABLE: dict[str, Case] = {
    # keys and values
    "no such key": ({}, ["train.stepz=3"], [r"train\.stepz is not a key; did you mean train\.steps\?"]),
    "no such section": ({}, ["trian.steps=3"], [r"trian\.steps is not a key; did you mean train\.steps\?"]),
    "not an override": ({}, ["quickly"], [r"quickly is not an override; write section\.key=value"]),
    "a wrong type": ({}, ["optim.lr=fast"], [r'optim\.lr is "fast"; it must be a number above 0']),
    "out of bounds": ({}, ["checkpoint.keep=0"], [r"checkpoint\.keep is 0; it must be a whole number of at least 1"]),
    "none of the choices": ({}, ["schedule.kind=step"], [r'schedule\.kind is "step"; it must be one of cosine, wsd,']),
    "no patience": ({}, ["train.timeout=0"], [r"train\.timeout is 0; it must be a whole number of at least 1"]),
    "no number is spelled nan": ({}, ["optim.lr=.nan"], [r"optim\.lr is NaN; it must be a number above 0"]),
    "not YAML": ({}, ["eval.prompts=[a"], [r"eval\.prompts=\[a: the value is not YAML"]),
    "mistakes come together": (
        {},
        ["train.stepz=3", "optim.lr=0", "data.text=nowhere.txt"],
        [r"train\.stepz is not a key", r"optim\.lr is 0; it must be"],
    ),
    # combinations
    "two lengths": (
        {},
        ["train.steps=3", "train.tokens=960"],
        [r"train\.steps and train\.tokens are both given; exactly"],
    ),
    "a batch that no context divides": (
        {},
        ["train.batch_tokens=100"],
        [r"train\.batch_tokens is 100; it must be a mult"],
    ),
    "heads that do not divide": ({}, ["model.heads=3"], [r"model\.(heads|width|head_dim) is \d+; "]),
    "a warm-up as long as the run": (
        {},
        ["schedule.warmup=12"],
        [r"schedule\.warmup is 12; it must be shorter than the"],
    ),
    "nothing to evaluate": (
        {},
        ["eval.every=2", "data.validation=null"],
        [r"eval\.every is 2; there is nothing to evaluate without"],
    ),
    "a separator for rows": (
        {},
        ["data.dataset=DIR", "data.separator=x"],
        [r'data\.separator is "x"; it belongs to data\.text'],
    ),
    "a translator of a text": (
        {},
        ["model.architecture=transformer", "tokenizer.kind=bpe", "tokenizer.vocab_size=300"],
        [
            r"model\.layers is not a key; did you mean",
            r"model\.architecture is transformer; it learns from pairs: give",
        ],
    ),
    # files
    "no such text": ({}, ["data.text=DIR/none.txt"], [r'data\.text is "DIR/none\.txt", and there is no such file']),
    "no text matches": ({}, ["data.text=DIR/*.none"], [r'data\.text is "DIR/\*\.none", and no file matches it']),
    "a folder as text": ({"sub/a.txt": TEXT}, ["data.text=DIR/sub"], [r"data\.text is .*, and that is a folder"]),
    "not text": (
        {"a.parquet": b"PAR1"},
        ["data.text=DIR/a.parquet"],
        [r"data\.text names .*, and \.parquet is not plain"],
    ),
    "bytes that are no text": (
        {"a.txt": b"abc\xff" * 99},
        ["data.text=DIR/a.txt"],
        [r".*a\.txt is not UTF-8 text: it holds"],
    ),
    "a cut-off archive": ({"a.gz": b"\x1f\x8b\x08\0\0"}, ["data.text=DIR/a.gz"], [r".*a\.gz cannot be read: "]),
    "no validation file": ({}, ["data.validation=DIR/none"], [r"data\.validation is .*, and there is no such file"]),
    "an empty text": ({"a.txt": ""}, ["data.text=DIR/a.txt"], [r"data\.text is .*, and there is no text in it"]),
    "an empty text among rows": (
        {"a.jsonl": "\n"},
        ["data.text=DIR/a.jsonl"],
        [r"data\.text is .*, and there is no text in"],
    ),
    "a text shorter than the context": (
        {"a.txt": TEXT},
        ["data.text=DIR/a.txt", "model.context=4096", "train.batch_tokens=4096"],
        [r"model\.context is 4096, and the training part of the text has \d+ tokens; it must have at least 4097"],
    ),
    "a held-out part of nothing": (
        {"a.txt": TEXT},
        ["data.text=DIR/a.txt", "data.validation=0.0001"],
        [r"data\.validation is 0\.0001, and that is \d tokens; it must be at least 2"],
    ),
    "a mask without documents": (
        {"a.txt": TEXT},
        ["data.text=DIR/a.txt", "data.document_mask=true"],
        [r"data\.document_mask is true; it needs documents to tell apart, and the (text|tokenizer)"],
    ),
    "rows that are not JSON": ({"a.jsonl": "{]"}, ["data.text=DIR/a.jsonl"], [r".*a\.jsonl line 1 is not JSON: "]),
    "rows without the text": (
        {"a.jsonl": '{"body": "x"}'},
        ["data.text=DIR/a.jsonl"],
        [r'data\.text_key is "text", and .*a\.jsonl line 1 has the keys body'],
    ),
    "no such dataset": (
        {},
        ["data.dataset=DIR/none"],
        [r'data\.dataset is "DIR/none", and '],
    ),
    "no such split": (
        {"set/train.jsonl": '{"text": "a b c"}\n'},
        ["data.dataset=DIR/set", "data.split=tiny"],
        [r'data\.dataset is "DIR/set", and '],
    ),
    "no such column": (
        {"set/train.jsonl": '{"text": "a b c"}\n'},
        ["data.dataset=DIR/set", "data.text_key=body", "data.validation=null"],
        [r'data\.text_key is "body", and DIR/set has the columns text'],
    ),
    "a prompt of nothing": ({}, ['eval.prompts=[""]', "eval.every=2"], [r"eval\.prompts holds ''; a prompt must have"]),
    # pairs
    "a source without a target": (
        {"a.de": LINES},
        ["data.source=DIR/a.de", "data.text=null", "tokenizer.kind=words"],
        [r"data\.source is .*target is missing; the two belong together"],
    ),
    "sides that are not of equal length": (
        {"a.de": LINES, "a.en": LINES + "\none more"},
        ["data.source=DIR/a.de", "data.target=DIR/a.en", "data.text=null", "tokenizer.kind=words"],
        [r"data\.source \(.*a\.de\) has 40 lines and data\.target \(.*a\.en\) has 41 lines"],
    ),
    # tokenizers and models
    "a tokenizer of no size": (
        {},
        ["tokenizer.kind=bpe"],
        [r"tokenizer\.vocab_size is missing; tokenizer\.kind=bpe needs"],
    ),
    "no tokenizer": (
        {},
        ["tokenizer.kind=folder", "tokenizer.folder=DIR/none"],
        [r'tokenizer\.folder is "DIR/none": '],
    ),
    "a broken tokenizer": (
        {"tok/tokenizer.json": '{"model": 3}'},
        ["tokenizer.kind=folder", "tokenizer.folder=DIR/tok"],
        [r'tokenizer\.folder is "DIR/tok": '],
    ),
    "no model to begin with": (
        {},
        ["model.from=DIR/none"],
        [r"model\.from is .*none.* is not a folder|model\.from is"],
    ),
    "a folder without a model": ({"m/readme": ""}, ["model.from=DIR/m"], [r"model\.from is "]),
    "a broken model": ({"m/config.json": "{"}, ["model.from=DIR/m"], [r"model\.from is "]),
    # the run's folder
    "no folder": ({}, ['run.dir=""'], [r'run\.dir is ""; it must name a folder']),
    "a file in the way": ({"run": "precious"}, [], [r"run\.dir is DIR/run, and it cannot be written \(File exists\)"]),
    "a file on the way": (
        {"on": "precious"},
        ["run.dir=DIR/on/run"],
        [r"run\.dir is DIR/on/run, and it cannot be written"],
    ),
    "a place where nobody may write": ({}, ["run.dir=/proc/run"], [r"run\.dir is /proc/run, and it cannot be written"]),
    "nothing to continue": ({}, ["run.resume=must"], [r"run\.resume is must and DIR/run has no checkpoint"]),
    "a run that may not be continued": (
        {"run/config.yaml": "{}"},
        ["run.resume=never"],
        [r"run\.resume is never and DIR/run holds a run"],
    ),
    "no place for prepared text": (
        {"c": "precious"},
        ["data.cache=DIR/c"],
        [r'data\.cache is "DIR/c", and it cannot be used'],
    ),
}


def make(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def refused(tiny_yaml: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """refused(overrides): what the command says of them, line by line."""

    def run(*overrides: str) -> list[str]:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        words = [override.replace("DIR", str(tmp_path)) for override in overrides]
        assert main([str(tiny_yaml), f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", *words]) == 2
        said = capfd.readouterr()
        return [line for line in re.split("[\r\n]+", said.err) if line and "examples/s]" not in line]  # datasets' bar

    return run


@pytest.mark.parametrize("name", TABLE)
def test_refused(refused, tmp_path: Path, name: str) -> None:
    files, overrides, sentences = TABLE[name]
    make(tmp_path, files)
    before = contents(tmp_path)
    said = refused(*overrides)
    assert len(said) == len(sentences), said
    for line, sentence in zip(said, sentences, strict=True):
        assert re.match(sentence.replace("DIR", re.escape(str(tmp_path))), line), line
        assert line[-1] in ".?"
    after = {path: content for path, content in contents(tmp_path).items() if "/cache/" not in path}
    assert after == before


def test_a_run_that_was_begun_with_another_recipe_names_the_keys(refused, tiny, tmp_path: Path) -> None:
    tiny("train.steps=4")
    before = contents(tmp_path / "run")
    tiny_cache = tiny.recipe().data.cache
    said = refused("train.steps=4", "optim.lr=0.5", "model.layers=1", f"data.cache={tiny_cache}")
    assert [line.partition(" is ")[0] for line in said] == ["model.layers", "optim.lr"]
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "a recipe file must come first."),
        (["train.steps=3"], "a recipe file must come first."),
        (["configs/demo.yaml", "--fast"], "--fast is not an option."),
        (["configs/none.yaml"], "configs/none.yaml: there is no such recipe."),
        (["configs"], "configs cannot be read: Is a directory."),
        (["LICENSE"], "LICENSE "),
    ],
)
def test_a_command_that_is_none(words: list[str], sentence: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_two_processes_say_it_once(tiny_yaml: Path, tmp_path: Path) -> None:
    """Each rank finds the same; one of them speaks, and the launcher's table repeats it."""
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command = [*accelerate, "--config_file", "configs/accelerate/cpus.yaml", "-m", "train", str(tiny_yaml)]
    command += [f"run.dir={tmp_path / 'run'}", "data.text=nowhere.txt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    sentence = 'data.text is "nowhere.txt", and there is no such file.'
    ours, _, theirs = done.stderr.partition("Traceback")  # the launcher's own
    assert done.returncode == 1
    assert ours.splitlines().count(sentence) == 1
    assert f"traceback : {sentence}" in theirs
    assert not (tmp_path / "run").exists()


def test_whoever_reads_along_may_stop(tiny_yaml: Path) -> None:
    """`--dry-run | head -1`"""
    for words in (["--dry-run"], ["--help"]):
        with subprocess.Popen(
            [sys.executable, "-m", "train", str(tiny_yaml), *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as asked:
            assert asked.stdout is not None
            assert asked.stderr is not None
            asked.stdout.close()
            assert asked.stderr.read() == b""
        assert asked.returncode == 141
