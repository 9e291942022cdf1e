"""What is refused of a body before the types of its fields are looked at: checks that vLLM makes first, in its order,
so that a body with two faults is told the same one here.

They see the body as it came: nothing in it is sure to have the type that it should.
"""

from __future__ import annotations

from typing import Any

from serve.errors import InvalidRequest

MAX_SALT = 128  # characters of a cache_salt
NOT_IN_SALT = frozenset("@/\\\0")


def completion(data: Any) -> Any:
    """The body of a completion, unchanged. Raises InvalidRequest."""
    if isinstance(data, dict):
        _check(data, "logprobs")
        prompt = data.get("prompt")
        if (prompt is None or prompt == "") and not data.get("prompt_embeds"):
            raise InvalidRequest("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return data


def chat(data: Any) -> Any:
    """The body of a chat, unchanged. Raises InvalidRequest."""
    if isinstance(data, dict):
        _check(data, "top_logprobs")
        top = data.get("top_logprobs")
        if top and not data.get("logprobs"):
            raise InvalidRequest("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    return data


def _check(data: dict[str, Any], logprobs: str) -> None:
    """What both have in common; `logprobs` is the field that says how many alternatives are shown."""
    salt = data.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT and NOT_IN_SALT.isdisjoint(salt)):
        raise InvalidRequest(
            f"cache_salt must have 1 to {MAX_SALT} characters, none of them @, /, a backslash or NUL; "
            f"got {str(salt)[:50]!r}.",
            "cache_salt",
        )
    budget = data.get("thinking_token_budget")
    if budget is not None and (not isinstance(budget, int) or budget < -1):
        raise InvalidRequest(
            "`thinking_token_budget` must be a non-negative integer or -1 for unlimited.", "thinking_token_budget"
        )
    if data.get("stream_options") and not data.get("stream"):
        raise InvalidRequest("Stream options can only be defined when `stream=True`.", "stream_options")
    for name in ("prompt_logprobs", logprobs):
        value = data.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise InvalidRequest(f"`{name}` must be an integer.", name)
        if name == "prompt_logprobs" and data.get("stream") and (value > 0 or value == -1):
            raise InvalidRequest("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        if value < 0 and value != -1:
            raise InvalidRequest(f"`{name}` must be a positive value or -1.", name)
