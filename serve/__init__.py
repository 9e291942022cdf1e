"""Serving: `python -m serve MODEL` over HTTP, `LLM(folder).generate(...)` in-process.

`engine/` schedules, caches, computes, samples and detokenises; it knows nothing of HTTP. `api/` speaks HTTP; it never
imports torch. Importing this package imports neither: `LLM` and `SamplingParams` are looked up when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.params import SamplingParams
    from serve.engine.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from serve.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from lm.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'serve' has no attribute {name!r}")
