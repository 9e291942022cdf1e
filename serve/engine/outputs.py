"""What LLM gives back, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Logprob:
    logprob: float
    rank: int | None  # from 1; None for a token that was asked for by its id
    decoded_token: str


@dataclass
class CompletionOutput:
    """One of the n continuations of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass
class BeamSearchSequence:
    """A sequence that a search ended with. `tokens` are the decoder's: a decoder's prompt is among them, a source is
    not; `text` is theirs.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cum_logprob: float
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class BeamSearchOutput:
    """The sequences of a prompt, as many as the beam is wide, best first."""

    sequences: list[BeamSearchSequence]
