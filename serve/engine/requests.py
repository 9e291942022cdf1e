"""One sequence that the engine is working on, and all that is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from lm.params import SamplingParams
from serve.engine.messages import BeamSearchParams, TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Request:
    """A sequence of known tokens (prompt, then output), the first `computed` of which have been computed.

    The scheduler looks at the count of what is known, never at a token, and at what is grouped as its own below; the
    tokens are read by the prefix cache, which keeps here what it has made of them; the rest belongs to the engine.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    generate: bool = True
    arrival: float = 0.0
    output: list[int] = field(default_factory=list)
    limit: int = 1  # tokens of output, at most
    draft: list[int] = field(default_factory=list)  # proposed to follow the known tokens: set before a step, cut by it

    whole: int = 0  # so many tokens from the first are computed in one step or not at all: a source is no sequence
    width: int = 1  # seats it takes, and sequences that each step after its prompt computes: a beam has several
    reserve: int = 0  # tokens that the cache is asked to hold from the start; less than it needs: it grows

    priority: int = 0
    rank: tuple[int, int] = (0, 0)  # who goes first: the lower

    status: Status = Status.WAITING
    computed: int = 0
    table: list[int] = field(default_factory=list)
    preemptions: int = 0

    # The prefix cache's.
    cache_salt: str | None = None
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, from the first, as far as they were needed
    cached: int = 0  # tokens that were found when it was first admitted
    follows: tuple[Request, int] | None = None  # it waits until that request has computed so many tokens,
    followed: bool = False  # which it does once

    # The engine's: state of sampler, detokenizer and stop strings, what the prompt's own tokens were worth, times.
    draw: Any = None
    rule: Any = None  # what its tokens must obey
    failure: str | None = None  # why it cannot be obeyed
    detokenizer: Any = None
    stops: Any = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    scheduled: float = 0.0
    first_token: float = 0.0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens [start : start + count], of the known ones and the draft."""
        length = len(self.prompt)
        following = self.output + self.draft if self.draft else self.output
        if start >= length:
            return following[start - length : start - length + count]
        part = self.prompt[start : start + count]
        return part + following[: count - len(part)]


@dataclass(eq=False, kw_only=True)
class BeamRequest(Request):
    """A beam search over one prompt, which ends as the sequences `ids`, best first.

    It always knows one token more than it has computed: the next one of each of its sequences, whichever those are.
    Preempted, it begins anew.
    """

    ids: list[str]
    beam: BeamSearchParams

    @property
    def known(self) -> int:
        return self.computed + 1 if self.computed else len(self.prompt)


def children(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The n sequences of a request with `n`, each with a seed of its own, so that each can be had again by itself."""
    alone = replace(params, n=1)
    if params.seed is None:
        return [alone] * n
    return [replace(alone, seed=params.seed + i) for i in range(n)]


def beam_tokens(prompt: int, limit: int, params: BeamSearchParams) -> int:
    """Tokens of the cache that a beam search asks for: all that its sequences may come to hold (and, where their
    probabilities are gone through in the end, not less than its steps).
    """
    steps = limit if params.logprobs is None else 2 * limit
    return max(params.beam_width * (prompt + limit), prompt + steps)
