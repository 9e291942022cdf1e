"""Sampling defaults of the server, for requests that say nothing: what generation_config.json and a flag say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.params import SamplingParams
from serve.api.client import EngineFailed

TAKEN = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
LONGEST = "max_new_tokens"


def generation_defaults(folder: str, source: str, override: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values by SamplingParams' names, and max_new_tokens, which bounds every answer's length; `source` is
    "auto" (the model's folder), "vllm" (none) or another folder; `override` counts before it. Raises EngineFailed with
    a sentence.
    """
    values = _of_file(folder, source)
    strange = sorted((override or {}).keys() - {*TAKEN, LONGEST})
    if strange:
        raise EngineFailed(
            f"--override-generation-config has {strange[0]!r}, which is no sampling default; "
            f"there are {', '.join(TAKEN)} and {LONGEST}."
        )
    return values | _checked(override or {}, "--override-generation-config")


def _of_file(folder: str, source: str) -> dict[str, Any]:
    if source == "vllm":
        return {}
    file = Path(folder if source == "auto" else source) / "generation_config.json"
    if not file.is_file():
        if source == "auto":
            return {}
        raise EngineFailed(f"--generation-config names {source}, where there is no generation_config.json.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineFailed(f"{file} cannot be used: {error}") from None
    if not isinstance(raw, dict):
        raise EngineFailed(f"{file} cannot be used: it is no JSON object.")
    if not isinstance(raw.get(LONGEST), int) or raw[LONGEST] < 1:
        raw.pop(LONGEST, None)  # as other programs write it where it means nothing
    return _checked(raw, str(file))


def _checked(raw: Mapping[str, Any], whose: str) -> dict[str, Any]:
    values = {name: raw[name] for name in TAKEN if raw.get(name) is not None}
    try:
        SamplingParams(**values)
    except (ValueError, TypeError) as error:
        raise EngineFailed(f"{whose} cannot be used: {error}") from None
    longest = raw.get(LONGEST)
    if longest is None:
        return values
    if type(longest) is not int or longest < 1:
        raise EngineFailed(
            f"{whose} cannot be used: {LONGEST} is {longest!r} and must be a whole number of at least 1."
        )
    return values | {LONGEST: longest}
