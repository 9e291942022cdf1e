"""What a request may ask of sampling, checked. Without torch, so that a process that only speaks HTTP can check it
too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LOGPROB_TOKEN_IDS = 128


@dataclass(kw_only=True)
class RepetitionDetectionParams:
    """When an output counts as caught in a loop: it ends with `min_count` times the same min_pattern_size to
    max_pattern_size tokens. Raises ValueError with one sentence for what cannot be.
    """

    max_pattern_size: int = 0  # 0: never
    min_pattern_size: int = 0  # 0 means 1
    min_count: int = 0

    def __post_init__(self) -> None:
        low, high = self.min_pattern_size, self.max_pattern_size
        if not 0 <= low <= high:
            raise ValueError(
                f"repetition_detection needs 0 <= min_pattern_size <= max_pattern_size, got {low} and {high}."
            )
        if high > 0 and self.min_count < 2:
            raise ValueError(f"repetition_detection needs a min_count of at least 2, got {self.min_count}.")

    def found(self, output: Sequence[int]) -> bool:
        """Whether the output ends so."""
        for size in range(max(self.min_pattern_size, 1), self.max_pattern_size + 1):
            length = size * self.min_count
            if length > len(output):
                return False
            # A stretch repeats every `size` tokens if it is itself when it is shifted by so many.
            if output[-1] == output[-1 - size] and output[-length:-size] == output[size - length :]:
                return True
        return False


@dataclass(kw_only=True)
class SamplingParams:
    """What a request asks, under vLLM's names and defaults. Raises ValueError with one sentence for what cannot be.

    Tuples may be given as lists or, where vLLM has them so, as None or one string. A value that is set later is looked
    at when the parameters are used (dataclasses.replace).
    """

    n: int = 1
    temperature: float = 1.0  # 0: the most likely token, greedy
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
    logprob_token_ids: tuple[int, ...] | None = None  # show these, and not the most probable ones
    logit_bias: dict[int, float] | None = None  # added; clamped to [-100, 100]
    allowed_token_ids: tuple[int, ...] | None = None  # no others are drawn
    bad_words: tuple[str, ...] = ()  # the token that would complete one is not drawn
    repetition_detection: RepetitionDetectionParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # of no effect: a fast tokenizer's decoder decides

    def __post_init__(self) -> None:
        def check(good: bool, sentence: str) -> None:
            if not good:
                raise ValueError(sentence)

        self.stop, self.bad_words = _strings(self.stop), _strings(self.bad_words)
        self.stop_token_ids = tuple(dict.fromkeys(self.stop_token_ids or ()))
        for name in ("allowed_token_ids", "logprob_token_ids"):
            ids = getattr(self, name)
            setattr(self, name, None if ids is None else tuple(dict.fromkeys(ids)))
        if self.logprob_token_ids and self.logprobs is None:
            self.logprobs = len(self.logprob_token_ids)
        if self.logit_bias:  # as JSON spells it, keys are texts
            self.logit_bias = {int(token): bias for token, bias in self.logit_bias.items()}

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
        check(self.detokenize or not self.stop, "stop strings need detokenize, which is False.")
        check(all(self.bad_words), "bad_words cannot contain an empty string.")
        check(all(bias == bias for bias in (self.logit_bias or {}).values()), "logit_bias has what is not a number.")
        check(self.allowed_token_ids != (), "allowed_token_ids cannot be empty; None allows all.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or value >= -1, f"{name} must be non-negative or -1, got {value}.")
        if self.logprob_token_ids is not None:
            count = len(self.logprob_token_ids)
            right = f"logprob_token_ids must have 1 to {MAX_LOGPROB_TOKEN_IDS} ids, got {count}."
            check(1 <= count <= MAX_LOGPROB_TOKEN_IDS, right)
            wrong = f"logprobs must be {count}, the number of logprob_token_ids, got {self.logprobs}."
            check(self.logprobs == count, wrong)
        check(self.n == 1 or not self.greedy, f"n must be 1 when using greedy sampling, got {self.n}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether the draw is from less than the whole distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids that are named: a vocabulary has to have them."""
        named = (self.stop_token_ids, self.logit_bias, self.allowed_token_ids, self.logprob_token_ids)
        return tuple(id for ids in named for id in ids or ())


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value or ()))
