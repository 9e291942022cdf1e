"""Speculation by prompt lookup: what followed the last time that the sequence ended as it ends now.

A model that reads several tokens at once takes hardly longer than for one, so guesses are nearly free to check: the
engine has the proposed tokens computed behind the known ones, draws after each of them, and keeps what it drew as long
as that is what had been proposed. Nothing of it changes what is drawn. Text that repeats (code, a document that is
quoted or edited) is where the guesses are right (Saxena 2023, "prompt lookup decoding").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serve.engine.requests import BeamRequest, Request, Status


class Speculation(NamedTuple):
    """At most `tokens` are proposed a step, after an n-gram of `longest` tokens or fewer, down to `shortest`."""

    tokens: int
    longest: int
    shortest: int


class PromptLookup:
    """A sequence, with an index of where each of its n-grams stood last: a proposal costs the same however long it is,
    and so does a token more.
    """

    def __init__(self, prompt: Iterable[int], longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where it went on after the n-gram
        self._output = 0  # tokens of the output that are in the index
        for token in prompt:
            self._append(token)

    def follow(self, output: Sequence[int]) -> None:
        """Takes in what the output has gained."""
        for token in output[self._output :]:
            self._append(token)
        self._output = len(output)

    def propose(self, count: int) -> list[int]:
        """`count` tokens that may follow, or none. Where what followed reaches the end, it is taken to go round."""
        length = len(self._tokens)
        for size in self._sizes:
            at = self._after.get(tuple(self._tokens[-size:])) if size < length else None
            if at is not None:
                return [self._tokens[at + i % (length - at)] for i in range(count)]
        return []

    def _append(self, token: int) -> None:
        at = len(self._tokens)
        for size in self._sizes:
            if size <= at:
                self._after[tuple(self._tokens[at - size :])] = at
        self._tokens.append(token)


class Drafter:
    """Proposes for those who decode."""

    def __init__(self, speculation: Speculation) -> None:
        self._speculation = speculation
        self._lookups: dict[Request, PromptLookup] = {}

    def propose(self, running: Iterable[Request]) -> None:
        """Sets the draft of each request that lacks one token alone. It fits what the request may still generate."""
        tokens, longest, shortest = self._speculation
        for request in running:
            if isinstance(request, BeamRequest) or not request.output or request.known - request.computed != 1:
                continue
            lookup = self._lookups.get(request)
            if lookup is None:
                lookup = self._lookups[request] = PromptLookup(request.prompt, longest, shortest)
            lookup.follow(request.output)
            request.draft = lookup.propose(min(tokens, request.limit - len(request.output) - 1))
            if request.rule is not None:
                request.draft = request.rule.agreed(request.draft)

    def tidy(self) -> None:
        """Lets go of the sequences that have ended."""
        for request in [request for request in self._lookups if request.status is Status.FINISHED]:
            del self._lookups[request]
