"""From logits to a token: the arithmetic of what a request asks (lm.params), a whole batch at a time.

The order is vLLM's: logit bias, minimum length, repetition, frequency and presence penalties (`adjust`); then
temperature, min-p, top-k, top-p and the draw (`sample`). A draw is one uniform number put through the inverse of the
cumulative distribution, and that number is a pure function of (seed, index of the token): a request's sample does not
depend on who shares its batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.params import SamplingParams

LOWEST_TEMPERATURE = 1e-2  # a smaller one, if it is not greedy, is raised to this
SHORTLIST = 64


class Uniforms:
    """The random numbers of one request: number i is a hash of (seed, i). Without a seed, a seed is drawn."""

    def __init__(self, seed: int | None = None):
        self.key = (secrets.randbits(64) if seed is None else seed % 2**64).to_bytes(8, "little")

    def __getitem__(self, index: int) -> float:
        digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=self.key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


@dataclass
class Row:
    """One sequence of a batch, as far as `adjust` needs it."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]


def adjust(logits: Tensor, rows: Sequence[Row], stop_ids: Collection[int] = ()) -> Tensor:
    """logits fp32 [R, V] -> [R, V], bias and penalties applied; `stop_ids` (EOS) cannot be drawn before a row's
    min_tokens.

    The tensor that was given is left as it is, and is returned where there is nothing to do.
    """
    biases: list[tuple[int, int, float]] = []
    banned: list[tuple[int, int]] = []
    penalised = []
    for r, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            biases += [(r, token, max(-100.0, min(100.0, bias))) for token, bias in params.logit_bias.items()]
        if len(row.output) < params.min_tokens:
            banned += [(r, token) for token in {*stop_ids, *params.stop_token_ids}]
        if params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0:
            penalised.append(r)
    if not (biases or banned or penalised):
        return logits
    logits, device = logits.clone(), logits.device
    if banned:
        r_, token_ = torch.tensor(banned, device=device).T
        logits[r_, token_] = -torch.inf
    if biases:
        at = torch.tensor([(r, token) for r, token, _ in biases], device=device).T
        logits.index_put_((at[0], at[1]), torch.tensor([b for *_, b in biases], device=device), accumulate=True)
    for r in penalised:
        params, output = rows[r].params, torch.tensor(rows[r].output, dtype=torch.int64, device=device)
        line = logits[r]
        if params.repetition_penalty != 1:
            seen = torch.cat((torch.tensor(rows[r].prompt, dtype=torch.int64, device=device), output)).unique()
            value = line[seen]
            line[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
        if len(output) and (params.frequency_penalty != 0 or params.presence_penalty != 0):
            tokens, counts = output.unique(return_counts=True)
            line[tokens] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token a row: logits fp32 [R, V], a uniform in [0, 1) a row -> int64 [R]."""
    if all(p.greedy for p in params):
        return logits.argmax(dim=-1)
    device = logits.device
    greedy = torch.tensor([p.greedy for p in params], device=device)
    temperature = torch.tensor(
        [1.0 if p.greedy else max(p.temperature, LOWEST_TEMPERATURE) for p in params], device=device
    )
    logits = logits / temperature.unsqueeze(1)
    draw = torch.tensor(uniforms, dtype=torch.float64, device=device)
    tokens = logits.argmax(dim=-1)
    whole = [r for r, p in enumerate(params) if not p.greedy and not p.filters]
    if whole:
        tokens[whole] = _inverse_cdf(logits[whole].softmax(dim=-1), draw[whole])
    part = [r for r, p in enumerate(params) if not p.greedy and p.filters]
    if part:
        tokens[part] = _draw_filtered(logits[part], [params[r] for r in part], draw[part])
    return torch.where(greedy, logits.argmax(dim=-1), tokens) if greedy.any() else tokens


def _inverse_cdf(probabilities: Tensor, draw: Tensor) -> Tensor:
    """The index at which the running sum first exceeds draw x total: probabilities [R, K], draw [R] -> int64 [R]."""
    running = probabilities.double().cumsum(dim=-1)
    index = torch.searchsorted(running, (draw * running[:, -1]).unsqueeze(1), right=True).squeeze(1)
    # Rounding may point past the end, or at a token of no probability: the last one that has some is meant then.
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index, last)


def _draw_filtered(logits: Tensor, params: Sequence[SamplingParams], draw: Tensor, length: int | None = None) -> Tensor:
    """min-p, top-k and top-p on a shortlist of the `length` likeliest tokens; a row whose share is not inside it gets a
    longer one, for itself alone: who shares the batch must not decide between tokens of equal probability.

    A full sort of a 49,152-token vocabulary costs fifty times what the first 64 cost, and they nearly always suffice.
    """
    vocabulary, device = logits.shape[1], logits.device
    length = min(length or SHORTLIST, vocabulary)
    limits = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    top_k = torch.tensor(limits, device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(1)
    min_p = torch.tensor([p.min_p for p in params], device=device).unsqueeze(1)
    probabilities = logits.softmax(dim=-1)
    floor = min_p * probabilities.amax(dim=-1, keepdim=True)
    mass = torch.where(probabilities >= floor, probabilities, 0).double().sum(dim=-1, keepdim=True)  # what min-p leaves

    listed, index = probabilities.topk(length, dim=-1)
    listed = torch.where((listed >= floor) & (torch.arange(length, device=device) < top_k), listed, 0)
    running = listed.double().cumsum(dim=-1)
    here = running[:, -1:]
    # Where top-k ends inside the list, its own sum is the whole; without top-k the whole is all that min-p leaves.
    total = torch.where(top_k <= length, here, mass)
    kept = listed.where(running - listed < top_p * total, 0)  # a token stays while those before it do not reach top-p
    tokens = index.gather(1, _inverse_cdf(kept, draw).unsqueeze(1)).squeeze(1)

    known = (top_k <= length) | (top_k == vocabulary)
    enough = ((known & (here >= top_p * total)) | (here >= mass * (1 - 1e-9))).squeeze(1)
    if length < vocabulary and not bool(enough.all()):
        more = [r for r, done in enumerate(enough.tolist()) if not done]
        tokens[more] = _draw_filtered(logits[more], [params[r] for r in more], draw[more], 8 * length)
    return tokens
