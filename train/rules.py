"""The rules between a recipe's keys: combinations that cannot run, or of which one key would silently do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.config import ConfigError
from train.schema import show

# Any of these says that the data are pairs; any of SOURCES where the data are.
PAIRS = ("data.source", "data.target", "data.pairs", "data.source_key", "data.target_key", "data.synthetic")
SOURCES = ("data.text", "data.dataset", "data.dataset_config", "data.split", "data.streaming", "data.separator")


def check(v: Mapping[str, Any], bad: set[str], problems: list[str], shape: Any) -> None:
    """Add a sentence to `problems` for each rule that the values `v` (`section.key: value`) break.

    shape: the config class of the model's architecture. A rule that reads one of the keys in `bad`, which have been
    refused already, is silent: one mistake, one sentence.
    """

    def known(*keys: str) -> bool:
        return not bad.intersection(keys)

    decided = ("vocab_size", "start_id", "target_vocab_size")
    model_keys = [f"model.{field.name}" for field in dataclasses.fields(shape) if field.name not in decided]
    if known(*model_keys):
        problems.extend(_model(shape, {key.removeprefix("model."): v[key] for key in model_keys}))
    pairs = any(key in bad or v[key] is not None for key in PAIRS)
    if known(*SOURCES, *PAIRS):
        problems.extend(_source(v))
    if pairs:
        problems.extend(_translation(v))
    elif known(*SOURCES, *PAIRS, "model.architecture") and shape.architecture != "decoder":
        problems.append(
            f"model.architecture is {shape.architecture}; it learns from pairs: give data.source and data.target, "
            "data.pairs, data.dataset with data.source_key, or data.synthetic."
        )
    if known("train.steps", "train.tokens", "train.batch_tokens", "schedule.warmup") and not (
        pairs and v["train.tokens"] is not None
    ):
        problems.extend(_length(v))
    if known("train.batch_tokens", "train.batch_sentences", "model.context"):
        problems.extend(_batch(v, pairs))
    for key in ("run.dir", "data.cache"):
        if known(key) and not v[key]:
            problems.append(f'{key} is ""; it must name a folder.')
    if known("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.folder"):
        problems.extend(_tokenizer(v, pairs or shape.architecture != "decoder"))
    recompute = "train.activation_checkpointing"
    if known(recompute) and v[recompute] and shape.architecture == "rnnsearch":
        problems.append(f"{recompute} is true; rnnsearch has no layers to compute a second time: it must be false.")
    if known("schedule.kind", "schedule.warmup") and v["schedule.kind"] == "inverse_sqrt" and not v["schedule.warmup"]:
        problems.append("schedule.warmup is 0; schedule.kind=inverse_sqrt needs a warm-up, such as 4000.")
    if known("checkpoint.keep", "checkpoint.average") and v["checkpoint.average"] is not None:
        keep, average = v["checkpoint.keep"], v["checkpoint.average"]
        if average > keep:
            problems.append(
                f"checkpoint.average is {average}, and checkpoint.keep is {keep}; what is averaged must be kept: "
                f"checkpoint.keep={average}."
            )
    if known("eval.every", "eval.prompts", "data.validation", "data.validation_source"):
        every = v["eval.every"]
        held = v["data.validation"] is not None or v["data.validation_source"] is not None
        if every is not None and not held and not v["eval.prompts"]:
            problems.append(
                f"eval.every is {every}; there is nothing to evaluate without data.validation or eval.prompts."
            )


def _model(shape: Any, values: dict[str, Any]) -> list[str]:
    decided = {field.name: 1 for field in dataclasses.fields(shape) if field.name == "vocab_size"}
    decided |= {field.name: 0 for field in dataclasses.fields(shape) if field.name == "start_id"}
    try:
        shape(**decided, **values)  # the tokenizer decides these two later; no rule depends on them
    except ConfigError as error:
        return [f"model.{problem}" for problem in error.problems]
    return []


def _length(v: Mapping[str, Any]) -> list[str]:
    steps, tokens, warmup = v["train.steps"], v["train.tokens"], v["schedule.warmup"]
    if (steps is None) == (tokens is None):
        given = "missing" if steps is None else "given"
        return [f"train.steps and train.tokens are both {given}; exactly one of them is the length of the run."]
    if steps is None and v["train.batch_tokens"] is None:
        return []  # which is said elsewhere
    steps = steps or -(-tokens // v["train.batch_tokens"])
    if warmup and warmup >= steps:
        return [f"schedule.warmup is {warmup}; it must be shorter than the run, which has {steps} steps."]
    return []


def _batch(v: Mapping[str, Any], pairs: bool) -> list[str]:
    tokens, sentences, context = v["train.batch_tokens"], v["train.batch_sentences"], v["model.context"]
    if not pairs and sentences is not None:
        return [f"train.batch_sentences is {sentences}; it belongs to pairs, and a text's batch is train.batch_tokens."]
    if tokens is None and not pairs:
        return ["train.batch_tokens is missing; it must be a whole number of at least 1."]
    if pairs and (tokens is None) == (sentences is None):
        given = "missing" if tokens is None else "given"
        return [f"train.batch_tokens and train.batch_sentences are both {given}; a batch is measured by one of them."]
    if pairs and tokens is not None and tokens < context:
        return [f"train.batch_tokens is {tokens}; it must hold a pair of model.context, which is {context}."]
    if not pairs and tokens % context:
        near = max(1, round(tokens / context)) * context
        return [
            f"train.batch_tokens is {tokens}; it must be a multiple of model.context, "
            f"which is {context}, such as {near}."
        ]
    return []


def _source(v: Mapping[str, Any]) -> list[str]:
    text, dataset, separator = v["data.text"], v["data.dataset"], v["data.separator"]
    given = [
        key
        for key in ("data.text", "data.dataset", "data.source", "data.pairs", "data.synthetic")
        if v[key] is not None
    ]
    if not given and v["data.target"] is not None:
        return []  # which is said elsewhere
    if not given:
        return ["data.text and data.dataset are both missing; a run reads exactly one of them (or pairs of texts)."]
    if len(given) > 1:
        return [f"{' and '.join(given)} are both given; a run reads exactly one of them."]
    problems = []
    if text is not None and (not text or not all(text)):
        problems.append(f"data.text is {show(text)}; it must name at least one file.")
    if dataset is None:
        for key, unset in (("data.dataset_config", None), ("data.split", "train"), ("data.streaming", False)):
            if v[key] != unset:
                problems.append(f"{key} is {show(v[key])}; it belongs to data.dataset, and {given[0]} is what is read.")
    if text is not None:
        if separator == "":
            problems.append('data.separator is ""; it must be the text between two documents, or null.')
        if separator and "\\n" in separator:  # what YAML makes of data.separator=\\n
            problems.append(
                "data.separator holds a backslash and an n; for line ends write it in double quotes, "
                "on the command line as 'data.separator=\"\\n\"'."
            )
    elif separator is not None:
        problems.append(
            f"data.separator is {show(separator)}; it belongs to data.text: each row of data.dataset is one document."
        )
    return problems


def _translation(v: Mapping[str, Any]) -> list[str]:
    """What belongs to pairs, and what does not."""
    problems = []

    def together(one: str, other: str) -> None:
        first, second = v.get(one), v.get(other)
        if (first is None) != (second is None):
            there, missing = (one, other) if second is None else (other, one)
            problems.append(f"{there} is {show(v[there])} and {missing} is missing; the two belong together.")

    together("data.source", "data.target")
    together("data.source_key", "data.target_key")
    together("data.validation_source", "data.validation_target")
    if v.get("data.source_key") is not None and v.get("data.dataset") is None and v.get("data.pairs") is None:
        problems.append(
            f"data.source_key is {show(v['data.source_key'])}; it belongs to data.dataset and to data.pairs."
        )
    if v.get("data.validation_source") is not None and v.get("data.validation") not in (None, 0.1):
        problems.append(
            f"data.validation is {show(v['data.validation'])} and data.validation_source is given; "
            "one of them says what is held out."
        )
    whole = v.get("data.source") is not None or v.get("data.synthetic") is not None
    if whole and isinstance(v.get("data.validation"), str):
        problems.append(
            f"data.validation is {show(v['data.validation'])}; of line-aligned files and synthetic pairs it must be a "
            "fraction: data.validation_source and data.validation_target name files."
        )
    if v.get("model.from") is not None:
        problems.append(
            f"model.from is {show(v['model.from'])}; it continues a language model on a text, and the data are pairs."
        )
    if v.get("train.tokens") is not None:
        problems.append(
            f"train.tokens is {v['train.tokens']}; batches of pairs differ in their tokens, so train.steps is the "
            "length of the run."
        )
    for key, unset, why in (
        ("data.document_mask", False, "a pair is read alone"),
        ("eval.prompts", (), "a translator is shown held-out sources"),
        ("eval.tokens", None, "all held-out pairs are scored"),
    ):
        if v.get(key, unset) != unset:
            problems.append(f"{key} is {show(v[key])}; it belongs to language modelling: {why}.")
    if v.get("eval.bleu") is not None and v.get("data.validation") is None and v.get("data.validation_source") is None:
        problems.append(f"eval.bleu is {v['eval.bleu']}; there is nothing to translate without held-out pairs.")
    return problems


def _tokenizer(v: Mapping[str, Any], pairs: bool) -> list[str]:
    kind, size = v["tokenizer.kind"], v["tokenizer.vocab_size"]
    if (pairs and kind == "characters") or (not pairs and kind == "words"):
        right = "bpe, words or folder for pairs" if pairs else "bpe, characters or folder for a text"
        return [f"tokenizer.kind is {kind}; it must be {right}."]
    problems = []
    for key, owners in (("tokenizer.vocab_size", ("bpe", "words")), ("tokenizer.folder", ("folder",))):
        if kind in owners and kind != "words" and v[key] is None:
            problems.append(f"{key} is missing; tokenizer.kind={kind} needs it.")
        if kind not in owners and v[key] is not None:
            problems.append(
                f"{key} is {show(v[key])}; it belongs to tokenizer.kind={owners[0]}, and the kind is {kind}."
            )
    least = {"bpe": 260, "words": 5}.get(kind, 0)
    if size is not None and size < least:
        what = "256 bytes and the special tokens" if kind == "bpe" else "the special tokens and a word"
        problems.append(f"tokenizer.vocab_size is {size}; it must be at least {least}, for {what}.")
    return problems
