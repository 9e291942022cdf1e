"""What a request may ask of sampling, checked. Without torch, so that a process that only speaks HTTP can check it
too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GREEDY_BELOW = 1e-5  # a temperature this small means: the most likely token


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request asks, under vLLM's names and defaults. Raises ValueError with one sentence for what cannot be."""

    n: int = 1
    temperature: float = 1.0  # below 1e-5: greedy
    top_p: float = 1.0  # the smallest set of tokens whose mass reaches it
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # a token needs this share of the likeliest one's probability
    presence_penalty: float = 0.0  # subtracted once from what was generated already
    frequency_penalty: float = 0.0  # subtracted for each time it was generated
    repetition_penalty: float = 1.0  # divides (multiplies, if negative) the logits of what stands in prompt or output
    seed: int | None = None
    max_tokens: int | None = 16  # None: until the context is full
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside each sampled token
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def check(good: bool, sentence: str) -> None:
            if not good:
                raise ValueError(sentence)

        check(self.n >= 1, f"n must be at least 1, got {self.n}.")
        check(math.isfinite(self.temperature), f"temperature must be a finite number, got {self.temperature}.")
        check(0 <= self.temperature <= 2, f"temperature must be in [0, 2], got {self.temperature}.")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}.")
        check(self.top_k >= -1, f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        check(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}.")
        check(-2 <= self.presence_penalty <= 2, f"presence_penalty must be in [-2, 2], got {self.presence_penalty}.")
        check(-2 <= self.frequency_penalty <= 2, f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}.")
        good = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        check(good, f"repetition_penalty must be a finite number greater than zero, got {self.repetition_penalty}.")
        check(self.max_tokens is None or self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}.")
        check(self.min_tokens >= 0, f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if self.max_tokens is not None:
            right = f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            check(self.min_tokens <= self.max_tokens, right)
        check(all(self.stop), "stop cannot contain an empty string.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or value >= -1, f"{name} must be non-negative or -1, got {value}.")
        check(self.n == 1 or not self.greedy, f"n must be 1 when using greedy sampling, got {self.n}.")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether the draw is from less than the whole distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
