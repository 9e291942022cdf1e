"""How much memory the log-probabilities of an answer may come to take, counted before the request is admitted.

n sequences of so many tokens, with so many alternatives beside each, multiply: a body of a hundred bytes can ask for
gigabytes. So all requests together have a budget, and one that could not fit alone is refused for good.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm.params import SamplingParams
from serve.engine.messages import BeamSearchParams, Output

ENTRY = 600  # bytes of a token and its log-probability: from the engine's lists to the text of the answer
BUDGET = 512 << 20  # bytes, of all requests that are here
UNREAD = 16_384  # entries of a stream that may wait for their client: it is not kept as a whole


def most(work: Sequence[tuple[list[int], SamplingParams | BeamSearchParams]], *, stream: bool) -> int:
    """Bytes that the log-probabilities of these sequences may take."""
    generated = prompts = 0
    for prompt, params in work:
        copies = params.beam_width if isinstance(params, BeamSearchParams) else 1
        generated += copies * (params.max_tokens or 0) * _beside(params)
        if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
            prompts += len(prompt) * (params.prompt_logprobs + 1)
    return ENTRY * (prompts + (min(generated, UNREAD) if stream else generated))


def _beside(params: SamplingParams | BeamSearchParams) -> int:
    """Entries at each token."""
    if isinstance(params, SamplingParams) and params.logprob_token_ids:
        return len(params.logprob_token_ids) + 1
    return 0 if params.logprobs is None else params.logprobs + 1


def entries(output: Output) -> int:
    """How many log-probabilities an output has."""
    return sum(len(entry.top) + 1 for entry in output.logprobs or ())
