"""Error messages that vLLM's contract documents: an answer of ours has to begin like them."""

from __future__ import annotations

import re

# The part that vLLM's own sentence ends in; ours has the field in `param` alone.
PLACE = re.compile(r"\s*\(parameter=.*\)$", re.DOTALL)
PREFIXES = (
    "The model `",
    "Either prompt or prompt_embeds must be provided and non-empty.",
    "prompt list length ",
    "The decoder prompt cannot be empty",
    "This model's maximum context length is ",
    "max_tokens must be at least 1, got ",
    "n must be ",
    "temperature must be ",
    "top_p must be in (0, 1], got ",
    "top_k must be 0 (disable), or at least 1, got ",
    "min_p must be in [0, 1], got ",
    "presence_penalty must be in [-2, 2], got ",
    "frequency_penalty must be in [-2, 2], got ",
    "repetition_penalty must be ",
    "stop cannot contain an empty string.",
    "min_tokens must be ",
    "Requested sample logprobs of ",
    "Requested prompt logprobs of ",
    "`prompt_logprobs` ",
    "`logprobs` ",
    "`top_logprobs` ",
    "when using ",
    "suffix is only supported for models with FIM completion rendering",
    "Streaming is not currently supported with beam search",
    "Stream options can only be defined when `stream=True`.",
    "truncate_prompt_tokens value ",
    "Unsupported Media Type: Only 'application/json' is allowed",
    "Chat template is passed with request, but ",
    "Cannot set both ",
    "Token id ",
    "`tools` must not be an empty array",
    "When using `tool_choice`",
    "When response_format type is ",
    '"auto" tool choice requires ',
    "Not Found",
    "Method Not Allowed",
)
VALIDATION = re.compile(r"\d+ validation errors?:")


def same_text(ours: str, theirs: str) -> bool:
    """Whether our message begins as it has to, beside theirs."""
    plain = PLACE.sub("", theirs)
    if VALIDATION.match(plain):
        return VALIDATION.match(ours) is not None
    begin = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), None)
    return begin is None or ours.startswith(begin)
