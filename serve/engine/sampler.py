"""Logits to tokens and to what the client may see of the probabilities; the arithmetic is lm.sampling's.

The order, which is vLLM's: (1) log-probabilities, of the logits as the model gave them; (2) logit bias, minimum
length, penalties; (3) greedy rows take the largest; the others are divided by the temperature, cut by min-p, top-k
and top-p, and drawn from. A draw depends on the request's seed and the index of the token alone, never on the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lm.params import SamplingParams
from lm.sampling import Row, Uniforms, adjust, sample
from serve.engine.messages import TokenLogprobs
from serve.engine.requests import Request


class Draw(NamedTuple):
    """A request's state in the sampler."""

    params: SamplingParams
    row: Row
    uniforms: Uniforms


def prepare(request: Request, before: Sequence[int], seed: int, eos: Collection[int]) -> Draw:
    """The state that a new request needs. `before`: the tokens that its output continues, which penalties look at."""
    params = request.params
    if params.min_tokens and not params.ignore_eos:  # until then EOS is banned, as the stop tokens are
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *eos))
    return Draw(params, Row(params, before, request.output), Uniforms(seed))


def draw(requests: Sequence[Request], logits: Tensor) -> list[int]:
    """One token for each request; logits fp32 [R, V]."""
    draws: list[Draw] = [request.draw for request in requests]
    logits = adjust(logits, [d.row for d in draws])
    uniforms = [0.0 if d.params.greedy else d.uniforms[len(d.row.output)] for d in draws]
    return sample(logits, [d.params for d in draws], uniforms).tolist()


def logprobs(logits: Tensor, tokens: Sequence[int], k: int) -> list[TokenLogprobs]:
    """For each row of logits fp32 [R, V]: the log-probability and rank of its token, and the k most probable tokens."""
    table = torch.log_softmax(logits, dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, dtype=torch.int64, device=table.device).unsqueeze(1))
    ranks = (table > chosen).sum(dim=-1) + 1
    top = table.topk(min(k, table.shape[1]), dim=-1)
    return [
        TokenLogprobs(token, value, rank, list(zip(ids, values, strict=True)))
        for token, value, rank, ids, values in zip(
            tokens, chosen.squeeze(1).tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
