"""How much of a prompt is read in a step while others wait for their next token: learned from what steps have taken.

Somebody's stream pauses for as long as a step takes, and a step takes longer the more prompt it has beside the single
tokens. So a step has as many tokens for each prompt as take STRETCH - 1 times what the step would take without them:
one long prompt makes the others' gaps STRETCH times as long. Where nobody is answered yet, each prompt of a crowd gets
what takes SHORT seconds, and a step is of two of them. Which prompt has how much of that is the scheduler's to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.engine.scheduler import Share

STRETCH = 1.6  # aimed at; well below 2, so that also the slowest of a hundred steps is not above it
LEAST = 4  # tokens of a prompt in a step, however dear they seem
SHORT = 0.06  # seconds for a prompt's part of a step where others wait for theirs, and nobody for a next token
TELLING = 32  # tokens of a prompt from which a step with no others tells what a token costs
WEIGHT = 0.3  # of the newest measurement in what is believed
FACTOR = 2.0  # a measurement counts as no more than this times, and no less than 1 / this of, what was believed
FREE = 0.05  # of a step is its prompt's, at least: nothing costs nothing
LONGEST_DRAFT = 64  # tokens: what is computed after a prompt in larger pieces is a preempted sequence, read again


class Pace:
    """Believes in seconds for a step of n single tokens, one number for each power of two, and for a prompt's token.

    `observe` is told what each step took; there is no clock in here.
    """

    def __init__(self) -> None:
        self._single: dict[int, float] = {}  # seconds of a step, by the bit length of its number of single tokens
        self._token: float | None = None  # seconds that a prompt's token adds

    def observe(self, shares: Iterable[Share], seconds: float) -> None:
        """The model has computed these shares, which Scheduler.schedule had chosen, in so many seconds of its own time
        (without sampling, text and scheduling). May be called before or after Scheduler.computed.
        """
        single = prompt = 0
        for request, start, length in shares:
            if start >= len(request.prompt) and length <= 1 + LONGEST_DRAFT:
                single += length * request.width
            else:
                prompt += length
        self.learn(single, prompt, seconds)

    def learn(self, single: int, prompt: int, seconds: float) -> None:
        """A step of `single` tokens of those who decode and `prompt` tokens of prompts took so many seconds."""
        quiet = self._quiet(max(single, 1))
        if prompt == 0:
            if single:
                known = self._single.get(single.bit_length())
                self._single[single.bit_length()] = seconds if known is None else _moved(known, seconds)
        elif quiet is not None and (single or prompt >= TELLING):
            each = max(seconds - quiet, FREE * seconds) / prompt
            self._token = each if self._token is None else _moved(self._token, each)
        elif prompt >= TELLING:
            self._token = seconds / prompt

    def part(self, single: int) -> int | None:
        """How many tokens a step with `single` tokens of those who decode has for each prompt.
        None: as many as there is room for, as nothing has been learned yet.
        """
        quiet = self._quiet(single)
        if self._token is None or (single and quiet is None):
            return None
        spare = (STRETCH - 1.0) * quiet if single and quiet else SHORT
        return max(LEAST, int(min(spare / max(self._token, 1e-9), 1e6)))

    def _quiet(self, single: int) -> float | None:
        """Seconds of a step of so many single tokens and no prompt: of the nearest number that has been seen."""
        if not self._single:
            return None
        bits = single.bit_length()
        return self._single[min(self._single, key=lambda seen: (abs(seen - bits), seen))]


def _moved(known: float, measured: float) -> float:
    """What is believed after a measurement: nearer to it, but by no single one carried far."""
    bounded = min(max(measured, known / FACTOR), known * FACTOR)
    return known + WEIGHT * (bounded - known)
