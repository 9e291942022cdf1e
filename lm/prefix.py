"""A decoder-only LM as translator: source and target as one sequence, and who may see whom in it.

A source's tokens end with the separator (bos), which is also what a target's input begins with, so the sequence is
the source without its last token, and then the target's input. Causal, every token sees those before it; with a visible
prefix ("prefix LM", arXiv 2202.00528, figure 1) the tokens of the source all see each other, as in an encoder, and
those of the target see what is before them. The separator is the target's: nothing in the prefix sees what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lm.attention import fused_attention
from lm.loss import IGNORE


class Joined(NamedTuple):
    """Translations as sequences, the real tokens of a row first."""

    tokens: Tensor  # int64 [B, N]; 0 at padding
    targets: Tensor  # int64 [B, N]; lm.loss.IGNORE but for the target's tokens
    prefix: Tensor  # int64 [B]: how many of a row's tokens are the source's


def join(batch: Mapping[str, Tensor], context: int) -> Joined:
    """Sources and targets as one sequence a row, without holes between them: a row's target stands where its own source
    ends, so that a sentence is computed alike beside whatever others.

    batch: src int64 [B, S], src_mask bool [B, S] (the real tokens, which come first, at least one), tgt_input and
    tgt_output int64 [B, T], lm.loss.IGNORE at padding. context: what the model can read; a longer row stays as it is.
    """
    src, tgt_input, tgt_output = batch["src"], batch["tgt_input"], batch["tgt_output"]
    prefix = batch["src_mask"].sum(dim=1) - 1
    lengths = prefix + (tgt_output != IGNORE).sum(dim=1)
    # As long as the longest row; on a GPU, which would have to be waited for, as long as any could be. But a batch of
    # one row with a long source and one with a long target may fit where a row of both would not.
    longest = src.shape[1] - 1 + tgt_input.shape[1]
    if src.device.type == "cpu" or longest > context:
        longest = int(lengths.max())
    place = torch.arange(longest, device=src.device).expand(len(src), longest)
    of_source = place < prefix.unsqueeze(1)
    inside = place < lengths.unsqueeze(1)
    at = (place - prefix.unsqueeze(1)).clamp(0, tgt_input.shape[1] - 1)
    source = src.gather(1, place.clamp(max=src.shape[1] - 1))
    tokens = torch.where(of_source, source, tgt_input.gather(1, at)).masked_fill(~inside, 0)
    targets = tgt_output.gather(1, at).masked_fill(of_source | ~inside, IGNORE)
    return Joined(tokens, targets, prefix)


def sees_prefix(mask: Tensor, prefix: Tensor) -> Tensor:
    """mask bool [B or 1, T, N], causal; prefix int64 [B] -> bool [B, T, N]: the keys of a row's prefix are seen by all
    of its queries as well.
    """
    return mask | (torch.arange(mask.shape[-1], device=mask.device) < prefix.view(-1, 1, 1))


class PrefixAttend:
    """Attention over whole sequences [B, N, ...] whose first prefix[b] tokens are visible to all: training's policy."""

    def __init__(self, prefix: Tensor, length: int):
        causal = torch.ones(1, length, length, dtype=torch.bool, device=prefix.device).tril()
        self.mask = sees_prefix(causal, prefix)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attention(q, k, v, self.mask)
