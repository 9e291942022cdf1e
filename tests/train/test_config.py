"""Recipes: every problem by name and at once, before anything is written; values that mean one thing only."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lm.config import DecoderConfig
from train.config import SECTIONS, Recipe, RecipeError, check_launch, load

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {
    "data": {"text": "a.txt"},
    "tokenizer": {"kind": "characters"},
    "model": {"context": 64, "layers": 2, "width": 64, "heads": 4},
    "train": {"steps": 100, "batch_tokens": 640},
}


def write(folder: Path, recipe: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD)


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert str(caught.value).splitlines() == caught.value.problems, "one line a problem"
    return caught.value.problems


# ------------------------------------------------------------ what is refused

REFUSED = [
    # a key that is not one
    ("optim.beta=1", "optim.beta is not a key; did you mean optim.betas?"),
    ("optim.learning_rate=1", "optim.learning_rate is not a key; optim has name, lr,"),
    ("model.vocab_size=100", "model.vocab_size is not a key; did you mean tokenizer.vocab_size?"),
    ("steps=3", "steps is not a key; did you mean train.steps?"),
    ("trian.steps=3", "trian.steps is not a key; did you mean train.steps?"),
    ("stray=3", "stray is not a key; the sections are run, data,"),
    # an override that is none
    ("train.steps", "train.steps is not an override; write section.key=value"),
    ("train=3", "train=3: train is a section; set its keys, such as train.steps=VALUE"),
    ("train.steps=[1", "train.steps=[1: the value is not YAML"),
    # types and bounds
    ("train.steps=many", 'train.steps is "many"; it must be a whole number of at least 1 or null.'),
    ("train.steps=1.5", "train.steps is 1.5; it must be a whole number of at least 1 or null."),
    ("train.steps=0", "train.steps is 0; it must be a whole number of at least 1 or null."),
    ("train.steps=true", "train.steps is true; it must be a whole number"),
    ("optim.lr=-1", "optim.lr is -1; it must be a number above 0."),
    ("optim.lr=.inf", "optim.lr is Infinity; it must be a number above 0."),
    ("optim.lr=.nan", "optim.lr is NaN; it must be a number above 0."),
    ("optim.lr=null", "optim.lr is null; it must be a number above 0."),
    ("optim.betas=0.9", "optim.betas is 0.9; it must be a list of 2, each a number of at least 0 and below 1."),
    ("optim.betas=[0.9, 1]", "optim.betas is [0.9, 1]; it must be a list of 2,"),
    ("optim.name=adam", 'optim.name is "adam"; it must be one of adamw, muon, adadelta.'),
    ("optim.clip=off", "optim.clip is false; it must be a number above 0 or null."),
    ("data.streaming=maybe", 'data.streaming is "maybe"; it must be true or false.'),
    ("data.streaming=1", "data.streaming is 1; it must be true or false."),
    ("data.validation=1.5", "data.validation is 1.5; it must be a number above 0 and below 1 or text or null."),
    ("data.validation=0", "data.validation is 0; it must be"),
    ("run.dir=3", "run.dir is 3; it must be text."),
    ("run.seed=-1", "run.seed is -1; it must be a whole number of at least 0 and below 4294967296."),
    ("run.dir=''", 'run.dir is ""; it must name a folder.'),
    ("eval.prompts=3", "eval.prompts is 3; it must be a list of which each is text."),
    ("data.text={a: b}", 'data.text is {"a": "b"}; it must be a list of which each is text or null.'),
    ("schedule.floor=2", "schedule.floor is 2; it must be a number of at least 0 and at most 1."),
    ("tokenizer.vocab_size=0", "tokenizer.vocab_size is 0; it must be a whole number of at least 1 or null."),
    # what is missing
    ("model.context=null", "model.context is null; it must be a whole number of at least 1."),
    ("train.steps=null", "train.steps and train.tokens are both missing; exactly one"),
    ("data.text=null", "data.text and data.dataset are both missing; a run reads exactly one"),
    ("tokenizer.kind=bpe", "tokenizer.vocab_size is missing; tokenizer.kind=bpe needs it."),
    ("tokenizer.kind=folder", "tokenizer.folder is missing; tokenizer.kind=folder needs it."),
    # what does not go together
    (
        "train.batch_tokens=650",
        "train.batch_tokens is 650; it must be a multiple of model.context, which is 64, such as 640.",
    ),
    ("train.batch_tokens=10", "it must be a multiple of model.context, which is 64, such as 64."),
    ("schedule.warmup=100", "schedule.warmup is 100; it must be shorter than the run, which has 100 steps."),
    ("model.heads=5", "model.heads is 5; it must divide width 64"),
    ("model.kv_heads=3", "model.kv_heads is 3; it must divide heads 4"),
    ("model.head_dim=7", "model.positions"),
    ("model.window=16", "model.window is 16; window_pattern must name the layers that slide with an S."),
    ("model.window_pattern=SL", "model.window_pattern is 'SL'; its S layers need window, in tokens."),
    ("model.activation=silu", "model.activation is 'silu'; it must be one of swiglu"),
    ("model.dropout=1", "model.dropout is 1.0; it must be at least 0 and below 1."),
    ("data.streaming=true", "data.streaming is true; it belongs to data.dataset, and data.text is what is read."),
    ("data.split=test", 'data.split is "test"; it belongs to data.dataset'),
    ("data.separator=''", 'data.separator is ""; it must be the text between two documents, or null.'),
    (r"data.separator=\n\n", "data.separator holds a backslash and an n; for line ends write it in double quotes"),
    ("data.text=[]", "data.text is []; it must name at least one file."),
    (
        "tokenizer.vocab_size=300",
        "tokenizer.vocab_size is 300; it belongs to tokenizer.kind=bpe, and the kind is characters.",
    ),
    ("tokenizer.folder=x", 'tokenizer.folder is "x"; it belongs to tokenizer.kind=folder'),
]


@pytest.mark.parametrize(("override", "sentence"), REFUSED, ids=[override for override, _ in REFUSED])
def test_one_mistake_gets_one_sentence(good: Path, override: str, sentence: str) -> None:
    (problem,) = problems(good, override)
    assert sentence in problem
    assert problem.endswith((".", "?"))


def test_combinations_that_need_two_keys(good: Path) -> None:
    assert problems(good, "train.steps=5", "train.tokens=5") == [
        "train.steps and train.tokens are both given; exactly one of them is the length of the run."
    ]
    assert "both given" in problems(good, "data.text=a.txt", "data.dataset=b")[0]
    (separator,) = problems(good, "data.dataset=b", "data.separator=x")
    assert "data.separator" in separator
    assert "each row of data.dataset is one document" in separator
    assert "nothing to evaluate" in problems(good, "eval.every=5", "data.validation=null")[0]
    load(good, ["eval.every=5", "data.validation=null", "eval.prompts=[a]"])  # samples are something


def test_all_problems_come_at_once(good: Path) -> None:
    mistakes = ["optim.beta=1", "stray=3", "optim.lr=-1", "train.batch_tokens=650", "model.heads=5", "train.steps=0"]
    assert len(problems(good, *mistakes)) == len(mistakes)


def test_a_recipe_with_many_mistakes_in_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {**GOOD, "modle": {}, "log": 3, "optim": {"lrr": 1}, "model": {"context": 64, "layers": "two", "width": 64}},
    )
    assert problems(path) == [
        "log is 3; it is a section, with keys such as log.every.",
        "modle is not a key; did you mean model?",
        "optim.lrr is not a key; did you mean optim.lr?",
        'model.layers is "two"; it must be a whole number of at least 1.',
        "model.heads is missing; it must be a whole number of at least 1.",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; a recipe holds the sections run, data"),
        ("- 1\n- 2\n", "holds [1, 2]; a recipe holds the sections"),
        ("model: {context: [}\n", "is not YAML: line 1"),
        ("model:\n\tcontext: 3\n", "is not YAML: line 2, column 1: found character"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "is not YAML: line 2, column 1: run is written twice"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3, column 3: seed is written twice"),
        ("run: !!python/object/apply:os.system [ls]\n", "is not YAML: line 1"),
        ("a: 1\n---\nb: 2\n", "is not YAML: line 2"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith(str(tmp_path))
    assert sentence in problem


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: there is no such recipe."]
    assert "cannot be read: Is a directory" in problems(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    assert "cannot be read" in problems(tmp_path / "latin.yaml")[0]


@given(data=st.data())
def test_no_file_makes_a_traceback(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The demo's recipe with a few characters changed reads as a recipe or gets its sentences."""
    text = re.sub(r"(?m)^ *#.*\n", "", (ROOT / "configs/demo.yaml").read_text())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        new = data.draw(st.text(alphabet="[]{}:,-?!&*#|>'\"%@`~ \n\t01ex", max_size=3))
        text = text[:place] + new + text[place + data.draw(st.integers(0, 3)) :]
    path = write(tmp_path_factory.mktemp("mutated"), text)
    try:
        load(path)
    except RecipeError as error:
        broken = [problem for problem in error.problems if "\n" in problem]
    else:
        broken = []
    assert broken == []


@pytest.mark.parametrize(
    "text", ["? [a, b]\n: 1\n", "? {a: b}\n: 1\n", "run: &a [*a]\n", "1: {2: 3}\n", "run: {? [x] : 1}\n"]
)
def test_strange_yaml_gets_a_sentence(tmp_path: Path, text: str) -> None:
    assert problems(write(tmp_path, text))


def test_the_command_refuses_with_status_2_and_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "run": {"dir": str(tmp_path / "run")}, "optim": {"lrr": 1, "eps": -1}})
    command = [sys.executable, "-m", "train", str(path), "train.batch_tokens=650"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------ what is meant


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr='0.01'", 0.01),
        ("optim.lr=1", 1.0),
        ("optim.eps=1E-10", 1e-10),
        ("train.steps=1_000", 1000),
        ("train.steps=1e3", 1000),
        ("train.tokens=10_000_000_000", 10**10),
        ("train.tokens=9007199254740993", 2**53 + 1),
        ("optim.clip=null", None),
        ("optim.clip=", None),
        ("optim.betas=[0, 0.99]", (0.0, 0.99)),
        ("data.text=b.txt", ("b.txt",)),
        ("data.text=[b.txt, c/*.jsonl]", ("b.txt", "c/*.jsonl")),
        ("data.validation=0.01", 0.01),
        ("data.validation=held.txt", "held.txt"),
        ("data.validation=null", None),
        ("data.separator='\n\n\n'", "\n\n"),  # YAML folds a line end into a space, an empty line into a line end
        ('data.separator="\\n<|end|>"', "\n<|end|>"),
        ("eval.prompts=ROMEO", ("ROMEO",)),
        ("eval.prompts=['a=b', c]", ("a=b", "c")),
        ("run.dir=a=b", "a=b"),
        ("model.positions=none", "none"),
        ("train.compile=yes", True),
    ],
)
def test_values_mean_what_they_say(good: Path, override: str, value: Any) -> None:
    recipe = load(good, [override])
    section, key = override.split("=")[0].split(".")
    found = getattr(getattr(recipe, section), key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_takes_the_place_of_what_excludes_it(good: Path, tmp_path: Path) -> None:
    recipe = load(good, ["train.tokens=6500"])
    assert (recipe.train.steps, recipe.train.tokens, recipe.total_steps) == (None, 6500, 11)
    recipe = load(good, ["data.dataset=b", "tokenizer.kind=bpe", "tokenizer.vocab_size=300"])
    assert (recipe.data.text, recipe.data.dataset) == (None, "b")
    streamed = write(
        tmp_path, {**GOOD, "data": {"dataset": "b", "dataset_config": "c", "split": "d", "streaming": True}}
    )
    assert load(streamed, ["data.text=a.txt"]).data == load(good, ["data.text=a.txt"]).data
    assert load(good, ["tokenizer.kind=bpe", "tokenizer.vocab_size=300"]).tokenizer.vocab_size == 300


def test_defaults_and_order(good: Path) -> None:
    recipe = load(good)
    assert recipe.run.dir == "runs/recipe"
    assert recipe.total_steps == 100
    assert load(good, ["train.steps=5", "train.steps=7"]).total_steps == 7
    assert list(recipe.to_dict()) == list(SECTIONS)


def test_empty_sections_are_no_mistake(tmp_path: Path) -> None:
    assert load(write(tmp_path, {**GOOD, "eval": None, "log": {}})) == load(write(tmp_path, GOOD))


def test_the_model_section_is_the_decoders_configuration() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(DecoderConfig) if field.name != "vocab_size"}
    ours = {field.name: field.default for field in dataclasses.fields(SECTIONS["model"])}
    assert ours.pop("from_") is None
    assert ours.pop("architecture") == "decoder"
    assert ours == theirs


def test_decoder_config(good: Path) -> None:
    config = load(good, ["model.kv_heads=2"]).decoder_config(50)
    assert (config.vocab_size, config.context, config.heads, config.kv_heads, config.head_dim) == (50, 64, 4, 2, 16)


changes = st.fixed_dictionaries(
    {},
    optional={
        "run.dir": st.text(min_size=1, max_size=12),
        "run.seed": st.integers(0, 2**32 - 1),
        "run.resume": st.sampled_from(["auto", "never", "must"]),
        "data.separator": st.none() | st.text(min_size=1, max_size=5),
        "data.validation": st.none() | st.floats(1e-9, 0.999) | st.text(min_size=1, max_size=9),
        "optim.lr": st.floats(1e-12, 1e3),
        "optim.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "optim.clip": st.none() | st.floats(1e-6, 10),
        "eval.prompts": st.lists(st.text(max_size=12), max_size=3).map(tuple),
        "log.tags": st.lists(st.text(max_size=12), max_size=3).map(tuple),
        "log.wandb": st.none() | st.text(max_size=9),
        "train.compile": st.booleans(),
    },
)


@given(changes=changes)
def test_a_recipe_comes_back_from_its_own_yaml(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load(write(folder, GOOD))
    for key, value in changes.items():
        section, name = key.split(".")
        recipe = dataclasses.replace(
            recipe, **{section: dataclasses.replace(getattr(recipe, section), **{name: value})}
        )
    assert load(write(folder, recipe.to_yaml())) == recipe


# ------------------------------------------------------------ the launcher


def test_fsdp2_takes_untied_models_with_adamw(good: Path) -> None:
    tied, untied = load(good), load(good, ["model.tie_embeddings=false"])
    for recipe in (tied, untied, load(good, ["optim.name=muon"])):
        check_launch(recipe, fsdp2=False)
    check_launch(untied, fsdp2=True)
    with pytest.raises(RecipeError, match=r"model\.tie_embeddings is true; FSDP2 needs"):
        check_launch(tied, fsdp2=True)
    with pytest.raises(RecipeError) as caught:
        check_launch(load(good, ["optim.name=muon"]), fsdp2=True)
    assert len(caught.value.problems) == 2


def test_recipes_are_frozen(good: Path) -> None:
    recipe: Recipe = load(good)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.steps = 3  # type: ignore[misc]
