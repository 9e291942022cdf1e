"""One sequence that the engine is working on, and all that is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from lm.params import SamplingParams
from serve.engine.messages import TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Request:
    """A sequence of known tokens (prompt, then output), the first `computed` of which have their keys in the cache.

    The scheduler's whole state of a request is the count of what is known, `computed` and `table`; the rest belongs
    to the engine.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    generate: bool = True
    arrival: float = 0.0
    output: list[int] = field(default_factory=list)

    status: Status = Status.WAITING
    computed: int = 0
    table: list[int] = field(default_factory=list)
    preemptions: int = 0

    # The engine's: state of sampler, detokenizer and stop strings, what the prompt's own tokens were worth, times.
    draw: Any = None
    detokenizer: Any = None
    stops: Any = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    scheduled: float = 0.0
    first_token: float = 0.0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """Known tokens [start : start + count]."""
        length = len(self.prompt)
        if start >= length:
            return self.output[start - length : start - length + count]
        part = self.prompt[start : start + count]
        return part + self.output[: count - len(part)]


def children(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The n sequences of a request with `n`, each with a seed of its own, so that each can be had again by itself."""
    alone = replace(params, n=1)
    if params.seed is None:
        return [alone] * n
    return [replace(alone, seed=params.seed + i) for i in range(n)]
