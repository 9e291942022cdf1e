"""Measures on attention maps: numbers for what the pictures show.

All take weights whose last dimension is over the keys and sums to 1, as an attention record holds them (lm.trace).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm.trace import Maps


def strongest(weights: Tensor, truth: Sequence[int | None]) -> tuple[int, int]:
    """At how many queries the largest weight lies on the true key, and how many have a true key.

    weights [q, k]; truth: q entries, the true key of each query, None where there is none. Raises ValueError where the
    lengths differ.
    """
    if weights.dim() != 2 or len(truth) != weights.shape[0]:
        raise ValueError(f"the truth names {len(truth)} queries; the map has the shape {tuple(weights.shape)}.")
    found = weights.argmax(dim=-1).tolist()
    asked = [(key, true) for key, true in zip(found, truth, strict=True) if true is not None]
    return sum(key == true for key, true in asked), len(asked)


def reversal(source: int, target: int) -> list[int | None]:
    """The true alignment of a reversed sentence: output i came from source token source - 1 - i.

    source, target: the tokens of each, without the end-of-sentence that follows both; the last entry, for the output
    of that, is None.
    """
    return [source - 1 - i if i < source else None for i in range(target)] + [None]


def monotone(source: int, target: int) -> list[int | None]:
    """The same for a copied sentence: output i came from source token i."""
    return [i if i < source else None for i in range(target)] + [None]


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in bits of each distribution: [..., k] -> [...]. 0: one key alone; log2(n): n keys alike."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1) / torch.log(torch.tensor(2.0))


def head_entropy(maps: Maps) -> dict[str, dict[int, list[float]]]:
    """{kind: {layer: [mean entropy in bits over the queries, a head each]}}, of all that a sentence's record holds."""
    return {
        kind: {layer: entropy(weights).mean(dim=-1).tolist() for layer, weights in maps.of(kind).items()}
        for kind in maps.kinds
    }


def agreement(first: Tensor, second: Tensor) -> float:
    """The share of queries at which two maps [q, k] of the same pair of sentences have their largest weight alike."""
    if first.shape != second.shape:
        raise ValueError(
            f"the maps have the shapes {tuple(first.shape)} and {tuple(second.shape)}; they must be equal."
        )
    return (first.argmax(dim=-1) == second.argmax(dim=-1)).float().mean().item()
