"""A recipe: what one training run is made of. Read from YAML, overridden by `section.key=value`, refused by name.

configs/*.yaml explain every key where it stands; this file is the same list as types and defaults, and rules.py has the
rules between keys. All problems are found before anything is written, and reported together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml

from lm.architectures import ARCHITECTURES
from lm.config import DecoderConfig
from train import origin, rules
from train.schema import Range, RecipeError, example, flatten, key_of, read, show, unknown_key

Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
TOKENIZERS = ("vocab_size", "start_id", "target_vocab_size")  # of a model's shape: what the tokenizer decides
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
    """A text (`text`, or `dataset` with a text_key) for a language model; pairs of texts for a translator."""

    text: tuple[str, ...] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text_key: str = "text"
    streaming: bool = False
    validation: Fraction | str | None = 0.1
    separator: str | None = None
    document_mask: bool = False
    source: str | None = None
    target: str | None = None
    pairs: str | None = None
    source_key: str | None = None
    target_key: str | None = None
    synthetic: Literal["copy", "reverse", "sort"] | None = None
    rows: Count = 50_000
    symbols: Count = 50
    length: Count = 25
    validation_source: str | None = None
    validation_target: str | None = None
    longest: Count | None = None
    cache: str = ".cache/heed"

    @property
    def has_pairs(self) -> bool:
        """Whether it is pairs of a source and its translation that are learned from."""
        return any(getattr(self, key.removeprefix("data.")) is not None for key in rules.PAIRS)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    kind: Literal["bpe", "words", "characters", "folder"] = "bpe"
    vocab_size: Count | None = None
    folder: str | None = None


def shape_of(architecture: str) -> Any:
    """The config class of an architecture."""
    return ARCHITECTURES[architecture].config_class


def _model_section(architecture: str) -> type:
    """The fields of an architecture's config class, whose own checks its values pass, but for those that the tokenizer
    decides; `architecture`; and `from`, with which all but `context` and `dropout` are those of the folder it names."""
    shape = shape_of(architecture)
    hints = get_type_hints(shape)
    fields: list[Any] = [
        ("architecture", Literal[tuple(ARCHITECTURES)], architecture),
        ("from_", str | None, None),  # the key is `from`, which Python keeps for itself
    ]
    for field in dataclasses.fields(shape):
        if field.name in TOKENIZERS:
            continue
        hint = hints[field.name]
        if field.default is dataclasses.MISSING:
            fields.append((field.name, Count if hint is int else hint))
        else:
            fields.append((field.name, hint, field.default))
    return dataclasses.make_dataclass("Model", fields, frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "muon", "adadelta"] = "adamw"
    lr: Positive = 1e-3
    matrix_lr: Positive = 0.02
    embedding_lr: Positive | None = None
    betas: tuple[Annotated[float, Range(least=0, below=1)], Annotated[float, Range(least=0, below=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: Positive | None = 1.0
    momentum: Annotated[float, Range(least=0, below=1)] = 0.95
    rho: Annotated[float, Range(least=0, below=1)] = 0.95
    spike: Positive | None = None
    max_skips: Count = 10


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["cosine", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup: Natural = 0
    decay: Share = 0.2
    floor: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: Count | None = None
    tokens: Count | None = None
    batch_tokens: Count | None = None
    batch_sentences: Count | None = None
    micro_batch: Count | None = None
    label_smoothing: Annotated[float, Range(least=0, below=1)] = 0.0
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    threads: Count | None = None
    timeout: Count = 600


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: Count | None = None
    tokens: Count | None = None
    prompts: tuple[str, ...] = ()
    sample_tokens: Count = 128
    bleu: Count | None = None
    beam: Count = 1
    length_penalty: NotNegative = 0.6
    bleu_tokenize: Literal["13a", "none", "intl", "char", "zh"] = "13a"
    lowercase: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: Count = 1000
    keep: Count = 2
    ephemeral: Positive | None = 60.0
    average: Count | None = None


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
    model: Any  # of the class that _model_section makes for its architecture
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
        return -(-self.train.tokens // self.batch_tokens)

    @property
    def batch_tokens(self) -> int:
        """`train.batch_tokens`, of a recipe that counts a batch in tokens."""
        assert self.train.batch_tokens is not None
        return self.train.batch_tokens

    def model_config(self, vocab_size: int, start_id: int) -> Any:
        """The shape of the recipe's architecture, for a tokenizer of `vocab_size` entries whose `start_id` begins a
        target."""
        if self.model.architecture == DecoderConfig.architecture:
            return self.decoder_config(vocab_size)
        shape = {field.name: getattr(self.model, field.name) for field in dataclasses.fields(self.model)}
        del shape["architecture"], shape["from_"]
        return shape_of(self.model.architecture)(vocab_size=vocab_size, start_id=start_id, **shape)

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The model's shape for a tokenizer of `vocab_size` entries; with model.from the shape of that model.

        Of such a model `context` is the longest that it can see; what it trains on is `model.context`.
        """
        if self.origin is not None:
            return dataclasses.replace(self.origin, dropout=self.model.dropout)
        shape = dataclasses.asdict(self.model)
        del shape["architecture"], shape["from_"]
        return DecoderConfig(vocab_size=vocab_size, **shape)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Every key with its value, as YAML and JSON know them (lists, no tuples); with model.from without those that
        its folder decides."""
        plain: dict[str, dict[str, Any]] = {}
        for name in SECTIONS:
            section = getattr(self, name)
            values = dataclasses.asdict(section)
            plain[name] = {
                key_of(field): list(value) if isinstance(value := values[field.name], tuple) else value
                for field in dataclasses.fields(section)
            }
        if self.model.from_ is not None:
            plain["model"] = {key: plain["model"][key] for key in origin.OWN_KEYS}
        return plain

    def to_yaml(self) -> str:
        """A document that load() reads back as an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)  # ASCII: PyYAML lets some line ends through unescaped


@cache
def sections(architecture: str) -> dict[str, type]:
    """The sections of a recipe for a model of this architecture."""
    return {**SECTIONS, "model": _model_section(architecture)}


SECTIONS: dict[str, type] = {
    "run": Run,
    "data": Data,
    "tokenizer": Tokenizer,
    "model": _model_section(DecoderConfig.architecture),
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
    "train.batch_tokens": ("train.batch_sentences",),
    "train.batch_sentences": ("train.batch_tokens",),
    "data.text": ("data.dataset", "data.dataset_config", "data.split", "data.streaming"),
    "data.dataset": ("data.text", "data.separator"),
    "tokenizer.kind": ("tokenizer.vocab_size", "tokenizer.folder"),
    "model.from": (
        *(f"tokenizer.{field.name}" for field in dataclasses.fields(Tokenizer)),
        *(
            f"model.{key_of(field)}"
            for field in dataclasses.fields(SECTIONS["model"])
            if key_of(field) not in origin.OWN_KEYS
        ),
    ),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, whose values are YAML.

    Raises RecipeError with all problems at once: unreadable file, unknown keys, wrong types, impossible combinations.
    """
    problems: list[str] = []
    document = _read_yaml(Path(path))
    architecture = _architecture(document, overrides)
    table = sections(architecture)
    flat = flatten(table, document, problems)
    flat = _override(table, flat, overrides, problems)
    flat.setdefault("run.dir", f"runs/{Path(path).stem}")
    continues = flat.get("model.from") is not None
    start = origin.complete(flat, problems) if continues else None
    values, bad = read(table, flat, problems, excused="model" if continues and start is None else None)
    rules.check(values, bad, problems, shape_of(architecture))
    if start is not None:
        origin.check(start, values, bad, problems)
    if problems:
        raise RecipeError(problems)
    parts = {
        name: cls(**{field.name: values[f"{name}.{key_of(field)}"] for field in dataclasses.fields(cls)})
        for name, cls in table.items()
    }
    return Recipe(**parts, origin=start)


def check_launch(recipe: Recipe, fsdp2: bool) -> None:
    """Refuse what the launcher and the recipe cannot do together. Raises RecipeError.

    FSDP2 shards each parameter over the ranks: Accelerate's cannot keep one tensor in two places (tied embeddings), and
    Muon orthogonalises whole matrices, of which each rank holds a slice.
    """
    problems = []
    if fsdp2 and getattr(recipe.model, "tie_embeddings", None) not in (None, False, "none"):
        tied = recipe.model.tie_embeddings
        apart = "none" if isinstance(tied, str) else "false"
        problems.append(
            f"model.tie_embeddings is {show(tied)}; FSDP2 needs model.tie_embeddings={apart}, or launch with DDP."
        )
    if fsdp2 and recipe.optim.name == "muon":
        problems.append('optim.name is "muon"; FSDP2 needs optim.name=adamw, or launch with DDP.')
    if fsdp2 and recipe.eval.bleu is not None:
        problems.append(
            f"eval.bleu is {recipe.eval.bleu}; a model sharded by FSDP2 cannot decode here: eval.bleu=null."
        )
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


def _architecture(document: Mapping[Any, Any], overrides: Sequence[str]) -> str:
    """What model.architecture says, decoder by default. It decides the keys of its section, so that a recipe with
    another value is refused for that alone: RecipeError."""
    model = document.get("model")
    asked = model.get("architecture", DecoderConfig.architecture) if isinstance(model, Mapping) else None
    for override in overrides:
        key, _, text = override.partition("=")
        asked = text.strip("\"' ") if key == "model.architecture" else asked
    if asked is None:
        return DecoderConfig.architecture
    if not isinstance(asked, str) or asked not in ARCHITECTURES:
        raise RecipeError([f"model.architecture is {show(asked)}; it must be one of {', '.join(ARCHITECTURES)}."])
    return asked


def _override(
    table: Mapping[str, type], flat: Mapping[str, Any], overrides: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not equals:
            problems.append(f"{override} is not an override; write section.key=value, such as train.steps=100.")
        elif section in table and not dot:
            problems.append(
                f"{override}: {section} is a section; set its keys, such as {example(table, section)}=VALUE."
            )
        elif section not in table or name not in {key_of(field) for field in dataclasses.fields(table[section])}:
            problems.append(unknown_key(table, key))
        else:
            try:
                given[key] = _parse(text)
            except yaml.YAMLError as error:
                problems.append(f"{override}: the value is not YAML: {_yaml_problem(error)}.")
    changed = [key for key, value in given.items() if value is not None and flat.get(key) != value]
    replaced = {other for key in changed for other in REPLACES.get(key, ())}
    return {key: value for key, value in flat.items() if key not in replaced} | given
