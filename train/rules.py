"""The rules between a recipe's keys: combinations that cannot run, or of which one key would silently do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.config import ConfigError, DecoderConfig
from train.schema import show


def check(v: Mapping[str, Any], bad: set[str], problems: list[str]) -> None:
    """Add a sentence to `problems` for each rule that the values `v` (`section.key: value`) break.

    A rule that reads one of the keys in `bad`, which have been refused already, is silent: one mistake, one sentence.
    """

    def known(*keys: str) -> bool:
        return not bad.intersection(keys)

    model_keys = [f"model.{field.name}" for field in dataclasses.fields(DecoderConfig) if field.name != "vocab_size"]
    if known(*model_keys):
        problems.extend(_model({key.removeprefix("model."): v[key] for key in model_keys}))
    if known("train.steps", "train.tokens", "train.batch_tokens", "schedule.warmup"):
        problems.extend(_length(v))
    if known("train.batch_tokens", "model.context"):
        batch, context = v["train.batch_tokens"], v["model.context"]
        if batch % context:
            near = max(1, round(batch / context)) * context
            problems.append(
                f"train.batch_tokens is {batch}; it must be a multiple of model.context, "
                f"which is {context}, such as {near}."
            )
    if known("data.text", "data.dataset", "data.dataset_config", "data.split", "data.streaming", "data.separator"):
        problems.extend(_source(v))
    for key in ("run.dir", "data.cache"):
        if known(key) and not v[key]:
            problems.append(f'{key} is ""; it must name a folder.')
    if known("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.folder"):
        problems.extend(_tokenizer(v))
    if known("eval.every", "eval.prompts", "data.validation"):
        every = v["eval.every"]
        if every is not None and v["data.validation"] is None and not v["eval.prompts"]:
            problems.append(
                f"eval.every is {every}; there is nothing to evaluate without data.validation or eval.prompts."
            )


def _model(shape: dict[str, Any]) -> list[str]:
    try:
        DecoderConfig(vocab_size=1, **shape)  # the tokenizer decides the vocabulary later; no rule depends on it
    except ConfigError as error:
        return [f"model.{problem}" for problem in error.problems]
    return []


def _length(v: Mapping[str, Any]) -> list[str]:
    steps, tokens, warmup = v["train.steps"], v["train.tokens"], v["schedule.warmup"]
    if (steps is None) == (tokens is None):
        given = "missing" if steps is None else "given"
        return [f"train.steps and train.tokens are both {given}; exactly one of them is the length of the run."]
    steps = steps or -(-tokens // v["train.batch_tokens"])
    if warmup and warmup >= steps:
        return [f"schedule.warmup is {warmup}; it must be shorter than the run, which has {steps} steps."]
    return []


def _source(v: Mapping[str, Any]) -> list[str]:
    text, dataset, separator = v["data.text"], v["data.dataset"], v["data.separator"]
    if (text is None) == (dataset is None):
        given = "missing" if text is None else "given"
        return [f"data.text and data.dataset are both {given}; a run reads exactly one of them."]
    problems = []
    if text is not None:
        if not text or not all(text):
            problems.append(f"data.text is {show(text)}; it must name at least one file.")
        for key, unset in (("data.dataset_config", None), ("data.split", "train"), ("data.streaming", False)):
            if v[key] != unset:
                problems.append(f"{key} is {show(v[key])}; it belongs to data.dataset, and data.text is what is read.")
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


def _tokenizer(v: Mapping[str, Any]) -> list[str]:
    kind = v["tokenizer.kind"]
    problems = []
    for key, owner in (("tokenizer.vocab_size", "bpe"), ("tokenizer.folder", "folder")):
        if kind == owner and v[key] is None:
            problems.append(f"{key} is missing; tokenizer.kind={kind} needs it.")
        if kind != owner and v[key] is not None:
            problems.append(f"{key} is {show(v[key])}; it belongs to tokenizer.kind={owner}, and the kind is {kind}.")
    return problems
