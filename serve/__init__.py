"""Serving: `python -m serve MODEL` over HTTP, `LLM(folder).generate(...)` in-process.

`engine/` schedules, caches, computes, samples and detokenises; it knows nothing of HTTP. `api/` speaks HTTP; it never
imports torch. Importing this package imports neither: its names are looked up when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.params import SamplingParams
    from serve.engine.llm import LLM
    from serve.engine.messages import BeamSearchParams

__all__ = ["LLM", "BeamSearchParams", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from serve.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from lm.params import SamplingParams

        return SamplingParams
    if name == "BeamSearchParams":
        from serve.engine.messages import BeamSearchParams

        return BeamSearchParams
    raise AttributeError(f"module 'serve' has no attribute {name!r}")
