"""From logits to a token: the arithmetic of what a request asks (lm.params), a whole batch at a time.

The order is vLLM's: what lm.adjust does; then temperature, min-p, top-k, top-p and the draw (`sample`). A draw is one
uniform number put through the inverse of the cumulative distribution, and that number is a pure function of (seed,
index of the token): a request's sample does not depend on who shares its batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from lm.greatest import argmax, greatest
from lm.params import SamplingParams
from lm.upload import upload

LOWEST_TEMPERATURE = 1e-2  # a smaller one, if it is not 0, is raised to this, as in vLLM
SHORTLIST = 64
BLOCK = 256  # tokens whose probabilities are summed up before one of them is looked for
CELLS = 800_000  # logits that a CPU works on at a time: what fits a core's cache
F64 = torch.float64


class Uniforms:
    """The random numbers of one request: number i is a hash of (seed, i). Without a seed, a seed is drawn."""

    def __init__(self, seed: int | None = None):
        self.key = (secrets.randbits(64) if seed is None else seed % 2**64).to_bytes(8, "little")

    def __getitem__(self, index: int) -> float:
        digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=self.key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token a row: logits fp32 [R, V], a uniform in [0, 1) a row -> int64 [R]."""
    device = logits.device
    tokens = argmax(logits)
    at_once = max(1, CELLS // logits.shape[1]) if device.type == "cpu" else len(params)
    for draw, filters in ((_draw, False), (_draw_filtered, True)):
        drawn = [r for r, p in enumerate(params) if not p.greedy and p.filters == filters]
        for first in range(0, len(drawn), at_once):
            few = drawn[first : first + at_once]
            rows = upload(torch.tensor(few), device)
            asked = [params[r] for r in few]
            temperature = upload(torch.tensor([max(p.temperature, LOWEST_TEMPERATURE) for p in asked]), device)
            scaled = logits.index_select(0, rows).div_(temperature.unsqueeze(1))
            tokens[rows] = draw(scaled, asked, upload(torch.tensor([uniforms[r] for r in few], dtype=F64), device))
    return tokens


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """One of all tokens a row: [R, V], fp64 [R] -> int64 [R]. First the block that it is in, then which of it."""
    vocabulary, device = logits.shape[1], logits.device
    probabilities = logits.softmax(dim=-1)
    whole = vocabulary // BLOCK * BLOCK
    sums = probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1) if whole else probabilities[:, :0]
    if whole < vocabulary:
        sums = torch.cat((sums, probabilities[:, whole:].sum(dim=-1, keepdim=True)), dim=1)
    block, inside = _inverse_cdf(sums, uniform)
    token = block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)
    weights = probabilities.gather(1, token.clamp(max=vocabulary - 1)) * (token < vocabulary)
    return block * BLOCK + _inverse_cdf(weights, inside)[0]


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the running sum first exceeds uniform x total, and what share of that index's own weight has
    been passed then: weights [R, K], uniform fp64 [R] -> int64 [R], fp64 [R].
    """
    running = weights.double().cumsum(dim=-1)
    target = (uniform * running[:, -1]).unsqueeze(1)
    index = torch.searchsorted(running, target, right=True)
    # Rounding may point past the end, or at a token of no weight: the last one that has some is meant then.
    last = (weights > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    index = torch.minimum(index, last)
    own = weights.gather(1, index).double()
    share = (target - running.gather(1, index) + own) / own
    return index.squeeze(1), share.squeeze(1).clamp(0, 1)


def _draw_filtered(logits: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """min-p, top-k and top-p: [R, V], fp64 [R] -> int64 [R]. From the SHORTLIST likeliest tokens of each row; a row
    whose share is not inside them is looked at by itself: who shares the batch must not decide between equals.

    A full sort of a 49,152-token vocabulary costs fifty times what the first 64 cost, and they mostly suffice.
    """
    vocabulary, device = logits.shape[1], logits.device
    length = min(SHORTLIST, vocabulary)
    limits = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    top_k = upload(torch.tensor(limits), device).unsqueeze(1)
    top_p = upload(torch.tensor([p.top_p for p in params], dtype=F64), device).unsqueeze(1)
    min_p = upload(torch.tensor([p.min_p for p in params], dtype=F64), device).unsqueeze(1)

    values, index = greatest(logits, length)
    weights = (values - values[:, :1]).double().exp()  # against the likeliest token's
    least = weights[:, -1:]
    # Where min-p and top-k leave no token that is not in the list, its own sum is the whole; where neither is asked
    # for, the whole is that of all tokens; otherwise it is not known here.
    complete = (top_k <= length) | (least < min_p) | (least == 0)
    if length == vocabulary:
        complete = torch.ones_like(complete)
    unbounded = [r for r, p in enumerate(params) if p.top_k <= 0 and p.min_p == 0]
    mass = torch.full_like(top_p, torch.inf)
    if unbounded:
        rows = upload(torch.tensor(unbounded), device)
        likeliest = logits.index_select(0, rows).softmax(dim=-1).gather(1, index[rows, :1])
        mass[rows] = 1 / likeliest.double()
    weights = weights.where((weights >= min_p) & (torch.arange(length, device=device) < top_k), 0)
    running = weights.cumsum(dim=-1)
    goal = top_p * torch.where(complete, running[:, -1:], mass)
    kept = weights.where(running - weights < goal, 0)  # a token stays while those before it do not reach top-p
    tokens = index.gather(1, _inverse_cdf(kept, uniform)[0].unsqueeze(1)).squeeze(1)

    enough = (complete | (running[:, -1:] >= goal)).squeeze(1).tolist()
    for row, good in enumerate(enough):
        if not good:
            tokens[row] = _draw_long(logits[row], params[row], uniform[row])
    return tokens


def _draw_long(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """The same for one row [V], whatever it keeps; sorted is what the filters may leave, and no more."""
    vocabulary, probabilities = len(logits), logits.softmax(dim=-1)
    floor = params.min_p * float(probabilities.max())
    if params.top_k > 0:
        listed, index = probabilities.topk(min(params.top_k, vocabulary))
        listed = torch.where(listed >= floor, listed, 0)
    else:
        if params.min_p == 0:  # less than half of what top-p leaves out is below this, however many those are
            floor = (1 - params.top_p) / (2 * vocabulary)
        index = (probabilities >= floor).nonzero().squeeze(1)
        listed, order = probabilities[index].sort(descending=True, stable=True)
        index = index[order]
    if not len(index):  # no numbers: there is nothing to choose from
        return logits.argmax()
    running = listed.double().cumsum(dim=-1)
    total = float(running[-1]) if params.top_k > 0 or params.min_p > 0 else 1.0
    kept = listed.where(running - listed < params.top_p * total, 0)
    return index[_inverse_cdf(kept.unsqueeze(0), uniform.unsqueeze(0))[0]].squeeze(0)
