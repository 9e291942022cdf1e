"""Logits to tokens and to what the client may see of the probabilities; the arithmetic is lm's (adjust, sampling).

The order, which is vLLM's: (1) tokens that a grammar does not let come are taken out; (2) log-probabilities, of what is
left of the logits as the model gave them; (3) allowed tokens, bad words, minimum length, logit bias, penalties; (4)
greedy rows take the largest; the others are divided by the temperature, cut by min-p, top-k and top-p, and drawn from.
A draw depends on the logits, the request's seed and the index of the token alone, never on the batch: so a token drawn
beside a draft is the one that would have been drawn without it.

Where a grammar leaves nothing but EOS, that is drawn, whatever (3) says of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lm.adjust import Row, adjust
from lm.greatest import greatest
from lm.params import SamplingParams
from lm.sampling import Uniforms, sample
from lm.upload import upload
from serve.engine.masks import Masks
from serve.engine.messages import TokenLogprobs
from serve.engine.requests import Request

NOTHING = -1  # in place of a token where a request excludes all there are


class Draw(NamedTuple):
    """A request's state in the sampler."""

    params: SamplingParams
    row: Row
    uniforms: Uniforms


def prepare(
    request: Request, before: Sequence[int], seed: int, eos: Collection[int], bad: Sequence[Sequence[int]] = ()
) -> Draw:
    """The state that a new request needs. `before`: the tokens that its output continues, which penalties look at;
    `bad`: its bad words, as tokens.
    """
    params = request.params
    if params.min_tokens:  # until then EOS is banned, as the stop tokens are; as in vLLM, also where it would not stop
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *eos))
    return Draw(params, Row(params, before, request.output, bad), Uniforms(seed))


class Drawn(NamedTuple):
    """A token, or NOTHING, and what its request has asked to see of the probabilities."""

    token: int
    logprobs: TokenLogprobs | None


def draw(
    requests: Sequence[Request], counts: Sequence[int], logits: Tensor, masks: Masks | None = None, eos: int = 0
) -> list[list[Drawn]]:
    """The tokens that each request goes on with, as many as the model agreed with its draft, and one more.

    logits fp32 [sum of counts, V], which are overwritten: for each request the row of its next token, then one after
    each token of its draft. A row is drawn from as if the draft before it stood in the output; from the first that is
    not the draft's own on, they are of no worth. `masks` and `eos` are for requests that have a rule.
    """
    final = [] if masks is None else masks.apply(requests, counts, logits)
    draws: list[Draw] = []
    rows: list[Row] = []
    ks: dict[tuple[int, ...] | int, list[int]] = {}  # what was asked for, and rows of whom
    for request, count in zip(requests, counts, strict=True):
        own: Draw = request.draw
        shown = own.params.logprob_token_ids or own.params.logprobs
        for ahead in range(count):
            if shown is not None:
                ks.setdefault(shown, []).append(len(rows))
            draws.append(own)
            rows.append(own.row.ahead(request.draft[:ahead]) if ahead else own.row)
    raw = {shown: logits.index_select(0, upload(torch.tensor(asked), logits.device)) for shown, asked in ks.items()}
    logits = adjust(logits, rows)
    if final:
        logits[upload(torch.tensor(final), logits.device), eos] = 0.0
    uniforms = [0.0] * len(rows)
    first = 0
    for request, count in zip(requests, counts, strict=True):
        own = request.draw
        if not own.params.greedy:
            length = len(request.output)
            for ahead in range(count):
                uniforms[first + ahead] = own.uniforms[length + ahead]
        first += count
    tokens = sample(logits, [own.params for own in draws], uniforms).tolist()
    asking = [r for r, row in enumerate(rows) if not row.plain]
    if asking:
        for r, value in zip(asking, logits[asking, [tokens[r] for r in asking]].tolist(), strict=True):
            if value == -torch.inf:
                tokens[r] = NOTHING

    entries: list[TokenLogprobs | None] = [None] * len(rows)
    for shown, asked in ks.items():
        chosen = [max(tokens[row], 0) for row in asked]
        for row, entry in zip(asked, logprobs(raw[shown], chosen, shown), strict=True):
            entries[row] = entry
    return _agreed(requests, counts, [Drawn(*pair) for pair in zip(tokens, entries, strict=True)])


def _agreed(requests: Sequence[Request], counts: Sequence[int], drawn: Sequence[Drawn]) -> list[list[Drawn]]:
    """Of each request's rows those up to the first whose token is not the draft's."""
    made, first = [], 0
    for request, count in zip(requests, counts, strict=True):
        kept = 1
        while kept < count and drawn[first + kept - 1].token == request.draft[kept - 1]:
            kept += 1
        made.append(list(drawn[first : first + kept]))
        first += count
    return made


def logprobs(logits: Tensor, tokens: Sequence[int], shown: int | Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits fp32 [R, V]: the log-probability and rank of its token, and the `shown` most probable
    tokens (-1: all), or the tokens `shown`.
    """
    table = torch.log_softmax(logits, dim=-1)
    vocabulary, device = table.shape[1], table.device
    chosen = table.gather(1, torch.tensor(tokens, dtype=torch.int64, device=device).unsqueeze(1))
    if isinstance(shown, int):
        k = vocabulary if shown == -1 else min(shown, vocabulary)
        values, ids = greatest(table, max(k, 1))
        ranks = (values > chosen).sum(dim=-1) + 1
        beyond = (chosen < values[:, -1:]).squeeze(1)
    else:
        k = len(shown)
        ids = torch.tensor(shown, dtype=torch.int64, device=device).expand(len(table), -1)
        values = table.gather(1, ids)
        ranks = torch.empty(len(table), dtype=torch.int64, device=device)
        beyond = torch.ones(len(table), dtype=torch.bool, device=device)
    if bool(beyond.any()):  # all tokens are gone through for those alone that the shown ones do not place
        ranks[beyond] = (table[beyond] > chosen[beyond]).sum(dim=-1) + 1
    return [
        TokenLogprobs(token, value, rank, list(zip(row_ids[:k], row_values[:k], strict=True)))
        for token, value, rank, row_ids, row_values in zip(
            tokens, chosen.squeeze(1).tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
