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

from lm.params import SamplingParams
from lm.upload import upload

LOWEST_TEMPERATURE = 1e-2  # a smaller one, if it is not greedy, is raised to this
SHORTLIST = 64
BLOCK = 256  # tokens whose probabilities are summed up before one of them is looked for
CELLS = 400_000  # logits that a CPU works on at a time: what fits a core's cache


class Uniforms:
    """The random numbers of one request: number i is a hash of (seed, i). Without a seed, a seed is drawn."""

    def __init__(self, seed: int | None = None):
        self.key = (secrets.randbits(64) if seed is None else seed % 2**64).to_bytes(8, "little")

    def __getitem__(self, index: int) -> float:
        digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=self.key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token a row: logits fp32 [R, V], a uniform in [0, 1) a row -> int64 [R]."""
    greedy = [r for r, p in enumerate(params) if p.greedy]
    if len(greedy) == len(params):
        return logits.argmax(dim=-1)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    if greedy:
        rows = upload(torch.tensor(greedy), logits.device)
        tokens[rows] = logits[rows].argmax(dim=-1)
    at_once = max(1, CELLS // logits.shape[1]) if logits.device.type == "cpu" else len(params)
    for filters in (False, True):
        drawn = [r for r, p in enumerate(params) if not p.greedy and p.filters == filters]
        for first in range(0, len(drawn), at_once):
            few = drawn[first : first + at_once]
            rows = upload(torch.tensor(few), logits.device)
            asked = [params[r] for r in few]
            temperature = upload(torch.tensor([max(p.temperature, LOWEST_TEMPERATURE) for p in asked]), logits.device)
            probabilities = (logits[rows] / temperature.unsqueeze(1)).softmax(dim=-1)
            uniform = upload(torch.tensor([uniforms[r] for r in few], dtype=torch.float64), logits.device)
            tokens[rows] = _draw_filtered(probabilities, asked, uniform) if filters else _draw(probabilities, uniform)
    return tokens


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One of all tokens a row: [R, V], [R] -> int64 [R]. First the block that it is in, then the token in the block."""
    vocabulary, device = probabilities.shape[1], probabilities.device
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


def _draw_filtered(probabilities: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """min-p, top-k and top-p: [R, V], [R] -> int64 [R]. From the SHORTLIST likeliest tokens of each row; a row whose
    share is not inside them is looked at by itself: who shares the batch must not decide between equals.

    A full sort of a 49,152-token vocabulary costs fifty times what the first 64 cost, and they mostly suffice.
    """
    vocabulary, device = probabilities.shape[1], probabilities.device
    length = min(SHORTLIST, vocabulary)
    limits = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    top_k = upload(torch.tensor(limits), device).unsqueeze(1)
    top_p = upload(torch.tensor([p.top_p for p in params], dtype=torch.float64), device).unsqueeze(1)
    min_p = upload(torch.tensor([p.min_p for p in params]), device).unsqueeze(1)

    listed, index = probabilities.topk(length, dim=-1)
    floor, least = min_p * listed[:, :1], listed[:, -1:]
    # Whether min-p and top-k leave no token that is not in the list. Otherwise, where neither is asked for, the whole
    # is 1, and is not known to less than rounding.
    complete = (top_k <= length) | (least < floor) | (least == 0)
    if length == vocabulary:
        complete = torch.ones_like(complete)
    unbounded = (top_k == vocabulary) & (min_p == 0)
    listed = torch.where((listed >= floor) & (torch.arange(length, device=device) < top_k), listed, 0)
    running = listed.double().cumsum(dim=-1)
    here = running[:, -1:]
    goal = top_p * torch.where(complete, here, 1.0)
    kept = listed.where(running - listed < goal, 0)  # a token stays while those before it do not reach top-p
    tokens = index.gather(1, _inverse_cdf(kept, uniform)[0].unsqueeze(1)).squeeze(1)

    enough = (complete | (unbounded & (here >= goal))).squeeze(1).tolist()
    for row, good in enumerate(enough):
        if not good:
            tokens[row] = _draw_long(probabilities[row], params[row], uniform[row])
    return tokens


def _draw_long(probabilities: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """The same for one row [V], whatever it keeps; sorted is what the filters may leave, and no more."""
    vocabulary = len(probabilities)
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
    running = listed.double().cumsum(dim=-1)
    total = float(running[-1]) if params.top_k > 0 or params.min_p > 0 else 1.0
    kept = listed.where(running - listed < params.top_p * total, 0)
    return index[_inverse_cdf(kept.unsqueeze(0), uniform.unsqueeze(0))[0]].squeeze(0)
