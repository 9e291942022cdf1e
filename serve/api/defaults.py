"""Sampling defaults of the server: what generation_config.json says, for requests that say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm.params import SamplingParams
from serve.api.client import EngineFailed

TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(folder: str, source: str) -> dict[str, Any]:
    """The values by SamplingParams' names, and max_new_tokens, which bounds every answer's length; `source` is
    "auto" (the model's folder), "vllm" (none) or another folder. Raises EngineFailed with a sentence.
    """
    if source == "vllm":
        return {}
    file = Path(folder if source == "auto" else source) / "generation_config.json"
    if not file.is_file():
        if source == "auto":
            return {}
        raise EngineFailed(f"--generation-config names {source}, where there is no generation_config.json.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        values = {name: raw[name] for name in TAKEN if raw.get(name) is not None}
        SamplingParams(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EngineFailed(f"{file} cannot be used: {error}") from None
    longest = raw.get("max_new_tokens")
    if isinstance(longest, int) and longest >= 1:
        values["max_new_tokens"] = longest
    return values
