"""A recipe: what one training run is made of. Read from YAML, overridden by `section.key=value`, refused by name.

configs/*.yaml explain every key where it stands; this file is the same list as types and defaults, and rules.py has the
rules between keys. All problems are found before anything is written, and reported together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from lm.config import DecoderConfig
from train import origin, rules
from train.schema import Range, RecipeError, example, flatten, key_of, read, show, unknown_key

Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Fraction = Annotated[float, Range(above=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str  # load() fills in runs/NAME-OF-THE-RECIPE
    seed: Annotated[int, Range(least=0, below=2**32)] = 1337
    resume: Literal["auto", "never", "must"] = "auto"
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    text: tuple[str, ...] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text_key: str = "text"
    streaming: bool = False
    validation: Fraction | str | None = 0.1
    separator: str | None = None
    document_mask: bool = False
    cache: str = ".cache/heed"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    kind: Literal["bpe", "characters", "folder"] = "bpe"
    vocab_size: Annotated[int, Range(least=260)] | None = None
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """lm.DecoderConfig's fields but vocab_size, which the tokenizer decides. lm.DecoderConfig checks the values.

    With `from` all but `context` and `dropout` are those of the folder that it names.
    """

    from_: str | None = None  # the key is `from`, which Python keeps for itself
    context: Count
    layers: Count
    width: Count
    heads: Count
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    activation: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-5
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_pattern: str = "R"
    qk_norm: bool = False
    window: int | None = None
    window_pattern: str = "L"
    tie_embeddings: bool = True
    bias: bool | str = False
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    matrix_lr: Positive = 0.02
    embedding_lr: Positive | None = None
    betas: tuple[Annotated[float, Range(least=0, below=1)], Annotated[float, Range(least=0, below=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: Positive | None = 1.0
    momentum: Annotated[float, Range(least=0, below=1)] = 0.95


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Natural = 0
    decay: Share = 0.2
    floor: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: Count | None = None
    tokens: Count | None = None
    batch_tokens: Count
    micro_batch: Count | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    threads: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: Count | None = None
    tokens: Count | None = None
    prompts: tuple[str, ...] = ()
    sample_tokens: Count = 128


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: Count = 1000
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class Log:
    every: Count = 10
    wandb: str | None = "heed"
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: Run
    data: Data
    tokenizer: Tokenizer
    model: Model
    optim: Optim
    schedule: Schedule
    train: Train
    eval: Eval
    checkpoint: Checkpoint
    log: Log
    origin: DecoderConfig | None = None  # the decoder in model.from, with its own vocabulary and longest context

    @property
    def total_steps(self) -> int:
        """Updates of the whole run: `train.steps`, or as many batches as reach `train.tokens`."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // self.train.batch_tokens)

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The model's shape for a tokenizer of `vocab_size` entries; with model.from the shape of that model.

        Of such a model `context` is the longest that it can see; what it trains on is `model.context`.
        """
        if self.origin is not None:
            return dataclasses.replace(self.origin, dropout=self.model.dropout)
        shape = dataclasses.asdict(self.model)
        del shape["from_"]
        return DecoderConfig(vocab_size=vocab_size, **shape)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Every key with its value, as YAML and JSON know them (lists, no tuples); with model.from without those that
        its folder decides."""
        plain: dict[str, dict[str, Any]] = {}
        for name, cls in SECTIONS.items():
            values = dataclasses.asdict(getattr(self, name))
            plain[name] = {
                key_of(field): list(value) if isinstance(value := values[field.name], tuple) else value
                for field in dataclasses.fields(cls)
            }
        if self.model.from_ is not None:
            plain["model"] = {key: plain["model"][key] for key in origin.OWN_KEYS}
        return plain

    def to_yaml(self) -> str:
        """A document that load() reads back as an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)  # ASCII: PyYAML lets some line ends through unescaped


SECTIONS: dict[str, type] = {
    "run": Run,
    "data": Data,
    "tokenizer": Tokenizer,
    "model": Model,
    "optim": Optim,
    "schedule": Schedule,
    "train": Train,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "log": Log,
}

# An override of the key on the left replaces those on the right, if the file set them: so `train.steps=100` works on a
# recipe whose length is in tokens.
REPLACES = {
    "train.steps": ("train.tokens",),
    "train.tokens": ("train.steps",),
    "data.text": ("data.dataset", "data.dataset_config", "data.split", "data.streaming"),
    "data.dataset": ("data.text", "data.separator"),
    "tokenizer.kind": ("tokenizer.vocab_size", "tokenizer.folder"),
    "model.from": (
        *(f"tokenizer.{field.name}" for field in dataclasses.fields(Tokenizer)),
        *(f"model.{key_of(field)}" for field in dataclasses.fields(Model) if key_of(field) not in origin.OWN_KEYS),
    ),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, whose values are YAML.

    Raises RecipeError with all problems at once: unreadable file, unknown keys, wrong types, impossible combinations.
    """
    problems: list[str] = []
    flat = flatten(SECTIONS, _read_yaml(Path(path)), problems)
    flat = _override(flat, overrides, problems)
    flat.setdefault("run.dir", f"runs/{Path(path).stem}")
    continues = flat.get("model.from") is not None
    start = origin.complete(flat, problems) if continues else None
    values, bad = read(SECTIONS, flat, problems, excused="model" if continues and start is None else None)
    rules.check(values, bad, problems)
    if start is not None:
        origin.check(start, values, bad, problems)
    if problems:
        raise RecipeError(problems)
    parts = {
        name: cls(**{field.name: values[f"{name}.{key_of(field)}"] for field in dataclasses.fields(cls)})
        for name, cls in SECTIONS.items()
    }
    return Recipe(**parts, origin=start)


def check_launch(recipe: Recipe, fsdp2: bool) -> None:
    """Refuse what the launcher and the recipe cannot do together. Raises RecipeError.

    FSDP2 shards each parameter over the ranks: Accelerate's cannot keep one tensor in two places (tied embeddings), and
    Muon orthogonalises whole matrices, of which each rank holds a slice.
    """
    problems = []
    if fsdp2 and recipe.model.tie_embeddings:
        problems.append("model.tie_embeddings is true; FSDP2 needs model.tie_embeddings=false, or launch with DDP.")
    if fsdp2 and recipe.optim.name == "muon":
        problems.append('optim.name is "muon"; FSDP2 needs optim.name=adamw, or launch with DDP.')
    if problems:
        raise RecipeError(problems)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which YAML forbids and PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is written twice", key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge":
                seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error).splitlines()[0]


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError([f"{path}: there is no such recipe."]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path} cannot be read: {getattr(error, 'strerror', None) or error}."]) from None
    except yaml.YAMLError as error:
        raise RecipeError([f"{path} is not YAML: {_yaml_problem(error)}."]) from None
    if not isinstance(document, Mapping):
        found = "is empty" if document is None else f"holds {show(document)[:60]}"
        raise RecipeError([f"{path} {found}; a recipe holds the sections {', '.join(SECTIONS)}."])
    return document


def _override(flat: Mapping[str, Any], overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not equals:
            problems.append(f"{override} is not an override; write section.key=value, such as train.steps=100.")
        elif section in SECTIONS and not dot:
            problems.append(
                f"{override}: {section} is a section; set its keys, such as {example(SECTIONS, section)}=VALUE."
            )
        elif section not in SECTIONS or name not in {key_of(field) for field in dataclasses.fields(SECTIONS[section])}:
            problems.append(unknown_key(SECTIONS, key))
        else:
            try:
                given[key] = _parse(text)
            except yaml.YAMLError as error:
                problems.append(f"{override}: the value is not YAML: {_yaml_problem(error)}.")
    changed = [key for key, value in given.items() if value is not None and flat.get(key) != value]
    replaced = {other for key in changed for other in REPLACES.get(key, ())}
    return {key: value for key, value in flat.items() if key not in replaced} | given
