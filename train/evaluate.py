"""Held-out loss: a split in windows that do not overlap, every token a target once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from train.data import Tokens, windows
from train.launch import Launch

LOGITS = 1 << 23  # of one batch, about: what the loss keeps in memory at a time is less


@dataclass
class Held:
    """What an evaluation found."""

    loss: float  # nats a token
    bits_per_byte: float | None  # None where the split does not say how many bytes it stands for
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any,
    launch: Launch,
    split: Tokens,
    *,
    context: int,
    limit: int | None = None,
    eos_id: int | None = None,
    document_mask: bool = False,
) -> Held:
    """The mean loss of `model` over a split, or its first `limit` targets, in windows of `context` tokens.

    The ranks share the batches. Each runs equally many, for the collectives that a sharded model makes in its forward.
    Raises launch.Abandoned, on all of them, when one is asked to stop.
    """
    rows = max(1, LOGITS // (context * min(model.config.vocab_size, 4096)))
    batches = windows(split, context, rows=rows, limit=limit, eos_id=eos_id, document_mask=document_mask)
    training = model.training
    model.eval()
    total, count = 0.0, 0.0
    for group in _groups(batches, launch.world):
        launch.check()
        mine = launch.rank < len(group)
        batch = {name: tensor.to(launch.device) for name, tensor in group[launch.rank if mine else 0].items()}
        with launch.accelerator.autocast():
            loss, targets, _ = model(batch)
        if mine:
            total, count = total + float(loss), count + float(targets)
    model.train(training)
    total, count = launch.sum([total, count])
    loss = total / count
    bytes_a_token = split.bytes_total / len(split) if split.bytes_total else None
    return Held(loss, loss / math.log(2) / bytes_a_token if bytes_a_token else None, int(count))


def _groups(batches: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(batches, size)):
        yield group
