"""Logits as a request wants them changed before a token is drawn, for a whole batch at a time.

The order is vLLM's: allowed tokens, bad words, minimum length, logit bias, then the repetition, frequency and presence
penalties. Each is one gather or scatter for the batch, over the entries that it concerns alone; what a penalty counts
is kept from step to step, so that a long sequence costs no more than a short one with as many different tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from copy import copy

import torch
from torch import Tensor

from lm.params import SamplingParams
from lm.upload import upload

LARGEST_BIAS = 100.0  # a larger one, either way, is taken as this


class Seen:
    """The tokens that a sequence has, each once, and how often each came in its output."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = array("q", dict.fromkeys(prompt))
        self.times = array("f", bytes(4 * len(self.tokens)))
        self._at = {token: at for at, token in enumerate(self.tokens)}
        self._counted = 0  # tokens of the output

    def follow(self, output: Sequence[int]) -> None:
        """Counts what the output has gained since it was seen last."""
        for token in output[self._counted :]:
            at = self._at.setdefault(token, len(self.tokens))
            if at == len(self.tokens):
                self.tokens.append(token)
                self.times.append(0)
            self.times[at] += 1
        self._counted = len(output)

    def ahead(self, more: Sequence[int]) -> tuple[array[int], array[float]]:
        """Tokens and times as they would be if `more` were output, too."""
        if not more:
            return self.tokens, self.times
        tokens, times = self.tokens[:], self.times[:]
        new: dict[int, int] = {}
        for token in more:
            at = self._at.get(token, new.get(token))
            if at is None:
                at = new[token] = len(tokens)
                tokens.append(token)
                times.append(0)
            times[at] += 1
        return tokens, times


class Row:
    """One sequence of a batch, as far as `adjust` needs it. `output` is looked at anew in each step.

    `bad` are token sequences of which the last token cannot follow the others; `more` are tokens after the output that
    are taken as if they stood in it.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], bad: Sequence[Sequence[int]] = ()
    ) -> None:
        self.params = params
        self.output = output
        self.bad = bad
        self.more: Sequence[int] = ()
        self.allowed = None if params.allowed_token_ids is None else array("q", params.allowed_token_ids)
        bias = params.logit_bias or {}
        self.biased = array("q", bias)
        self.bias = array("f", [max(-LARGEST_BIAS, min(LARGEST_BIAS, value)) for value in bias.values()])
        repetition = params.repetition_penalty != 1
        penalised = repetition or params.frequency_penalty != 0 or params.presence_penalty != 0
        self.seen = Seen(prompt if repetition else ()) if penalised else None
        self.plain = not (penalised or bias or bad or params.min_tokens or self.allowed is not None)

    def ahead(self, more: Sequence[int]) -> Row:
        """The same sequence if `more` were output already."""
        if self.plain or not more:
            return self
        row = copy(self)
        row.more = more
        return row

    @property
    def length(self) -> int:
        """Tokens of output."""
        return len(self.output) + len(self.more)

    def banned(self) -> list[int]:
        """Last tokens of the bad sequences of which all the others have just come."""
        if not self.bad:
            return []
        longest = max(map(len, self.bad)) - 1
        end = [*self.output[-longest:], *self.more][-longest:] if longest else []
        return [ids[-1] for ids in self.bad if len(ids) == 1 or end[1 - len(ids) :] == list(ids[:-1])]


class _Entries:
    """Places in a batch of logits, gathered row by row, with a value each where there is one."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._lengths: list[int] = []
        self._tokens = array("q")
        self._values = array("f")

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, row: int, tokens: Collection[int], values: array[float] | None = None) -> None:
        self.rows.append(row)
        self._lengths.append(len(tokens))
        self._tokens.extend(tokens)
        if values is not None:
            self._values.extend(values)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and token of each entry, int64 [N] both."""
        tokens = upload(torch.frombuffer(self._tokens, dtype=torch.int64), device)
        return self._spread(upload(torch.tensor(self.rows), device)), tokens

    def values(self, device: torch.device) -> Tensor:
        return upload(torch.frombuffer(self._values, dtype=torch.float32), device)

    def of_rows(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """A number for each entry from one for each row, in the order in which rows were added."""
        return self._spread(upload(torch.tensor(numbers, dtype=torch.float32), device))

    def _spread(self, each: Tensor) -> Tensor:
        lengths = upload(torch.tensor(self._lengths), each.device)
        return each.repeat_interleave(lengths, output_size=len(self._tokens))


def adjust(logits: Tensor, rows: Sequence[Row], stop_ids: Collection[int] = ()) -> Tensor:
    """Changes logits fp32 [R, V] in place, and returns them; `stop_ids` (EOS) cannot be drawn before a row's
    min_tokens.
    """
    device = logits.device
    allowed, banned, biased, seen = _Entries(), _Entries(), _Entries(), _Entries()
    penalised: list[SamplingParams] = []
    for r, row in enumerate(rows):
        if row.plain:
            continue
        params = row.params
        if row.allowed is not None:
            allowed.add(r, row.allowed)
        if row.bad:
            banned.add(r, row.banned())
        if row.length < params.min_tokens:
            banned.add(r, {*stop_ids, *params.stop_token_ids})
        if row.biased:
            biased.add(r, row.biased, row.bias)
        if row.seen is not None:
            row.seen.follow(row.output)
            seen.add(r, *row.seen.ahead(row.more))
            penalised.append(params)

    if allowed:
        places = allowed.places(device)
        kept = logits[places]
        logits[upload(torch.tensor(allowed.rows), device)] = -torch.inf
        logits[places] = kept
    if banned:
        logits[banned.places(device)] = -torch.inf
    if biased:
        logits[biased.places(device)] += biased.values(device)
    if seen:
        places = seen.places(device)
        value, times = logits[places], seen.values(device)
        repetition = seen.of_rows([p.repetition_penalty for p in penalised], device)
        value = torch.where(value > 0, value / repetition, value * repetition)
        value -= seen.of_rows([p.frequency_penalty for p in penalised], device) * times
        value -= seen.of_rows([p.presence_penalty for p in penalised], device) * (times > 0)
        logits[places] = value
    return logits
