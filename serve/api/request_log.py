"""The line of the log that each request ends in: numbers and the reason, and of a prompt only what is asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.api.client import Group, Member


def line(id: str, group: Group, prompts: Sequence[tuple[str | None, list[int]]], shown: int = 0) -> str:
    """`prompts` are texts (where they are known) and ids, of which the first `shown` characters or ids are told.

    Times are those of the slowest sequence, in milliseconds. One that was aborted has told none: to its first token all
    counts as prefill; if none had come, as queue.
    """
    first_of_each = group.members[:: group.n]  # a prompt counts once, whatever n
    tokens = sum(member.prompt_tokens for member in first_of_each)
    cached = sum(member.cached for member in first_of_each)
    generated = sum(member.generated for member in group.members)
    queue, prefill, decode = (max(times) for times in zip(*map(_times, group.members), strict=True))
    reasons = ",".join(sorted({member.finish_reason or "abort" for member in group.members}))
    said = (
        f"{id}: {tokens} prompt tokens, {generated} generated, {cached} cached; "
        f"queue {queue:.1f} ms, prefill {prefill:.1f} ms, decode {decode:.1f} ms; {reasons}"
    )
    if shown and prompts:
        text, ids = prompts[0]
        said += f"; prompt {text[:shown]!r}" if text is not None else f"; prompt {ids[:shown]}"
    return said


def _times(member: Member) -> tuple[float, float, float]:
    """Milliseconds in the queue, until the first token, and until the last."""
    times = member.timings
    if times is None and member.first_token:
        return 0.0, 1000 * (member.first_token - member.arrival), 1000 * (member.last_token - member.first_token)
    if times is None:
        return 1000 * (time.monotonic() - member.arrival), 0.0, 0.0
    return (
        1000 * (times.scheduled - times.arrival),
        1000 * (times.first_token - times.scheduled),
        1000 * (times.finished - times.first_token),
    )
