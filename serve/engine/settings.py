"""The keyword arguments of LLM, which are vLLM's, as the engine's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.engine.messages import EngineConfig

# How vLLM places a model on its devices and compiles it; here there is nothing that they could change.
ELSEWHERE = frozenset(
    (
        "compilation_config",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "enable_chunked_prefill",
        "enforce_eager",
        "gpu_memory_utilization",
        "hf_token",
        "max_logprobs",
        "runner",
        "swap_space",
        "tokenizer_mode",
        "trust_remote_code",
    )
)
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def engine_config(folder: str, settings: Mapping[str, Any]) -> EngineConfig:
    """Raises ValueError with one sentence for a setting that cannot be."""
    values = {name: value for name, value in settings.items() if name not in ELSEWHERE}
    for name in PARALLEL:
        count = values.pop(name, 1)
        if count != 1:
            raise ValueError(f"{name} is {count}; one process computes here, so it must be 1.")
    values |= _speculation(values.pop("speculative_config", None))
    unknown = [name for name in values if name not in EngineConfig.__struct_fields__]
    if unknown:
        known = ", ".join(EngineConfig.__struct_fields__[1:])
        raise ValueError(f"{unknown[0]} is no setting; the settings are {known}.")
    return EngineConfig(folder=folder, **values)


def _speculation(config: Mapping[str, Any] | None) -> dict[str, int]:
    if config is None:
        return {}
    method, tokens = config.get("method", "ngram"), config.get("num_speculative_tokens")
    if method != "ngram" or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(
            'speculative_config must be like {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}.'
        )
    longest = config.get("prompt_lookup_max") or config.get("prompt_lookup_min") or 5
    shortest = config.get("prompt_lookup_min") or longest
    if not 1 <= shortest <= longest:
        raise ValueError(f"prompt_lookup_min is {shortest}; it must be from 1 to prompt_lookup_max, {longest}.")
    return {"speculative": tokens, "prompt_lookup_max": longest, "prompt_lookup_min": shortest}
