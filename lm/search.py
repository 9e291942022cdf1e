"""Decoding, over `start` and `step` alone: it works for whatever model has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lm.adjust import Row, adjust
from lm.sampling import SamplingParams, Uniforms, sample
from lm.trace import AttentionTrace


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    record: AttentionTrace | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue prompts of token ids together; yield, step by step, the (row, token) pairs that the step produced.

    What a prompt is, is the model's: an encoder-decoder reads a source and starts anew, a decoder goes on. A row ends
    with a token of `stop_ids` or params.stop_token_ids (which is yielded too), after params.max_tokens, or when the
    model has no room for more; a finished row leaves the batch, and the record, after the step is yielded. Row r draws
    from seed + r. Raises ValueError for an empty prompt or one that leaves no room.
    """
    rooms, device = checked(model, prompts), next(model.parameters()).device
    src, mask = pad(prompts, device)
    state = model.start(src, mask, record=record)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else stop_ids)}
    live = list(range(len(prompts)))
    rows = [Row(params, prompt, []) for prompt in prompts]
    uniforms = [Uniforms(None if params.seed is None else params.seed + r) for r in live]
    outputs: list[list[int]] = [[] for _ in prompts]
    for one, output in zip(rows, outputs, strict=True):
        one.output = output
    tokens = state.first
    while live:
        logits, state = model.step(tokens.unsqueeze(1), state, record=record)
        logits = adjust(logits[:, -1].float(), [rows[r] for r in live], stop_ids)
        tokens = sample(logits, [params] * len(live), [uniforms[r][len(outputs[r])] for r in live])
        produced = list(zip(live, tokens.tolist(), strict=True))
        going = []
        for position, (row, token) in enumerate(produced):
            outputs[row].append(token)
            length = len(outputs[row])
            full = length >= rooms[row]
            if token not in ends and not full and (params.max_tokens is None or length < params.max_tokens):
                going.append(position)
        yield produced
        if len(going) < len(live):
            index = torch.tensor(going, dtype=torch.int64, device=device)
            state, tokens = state.select(index), tokens[index]
            if record is not None:
                record.select(index)
            live = [live[position] for position in going]


def generate(
    model: Any, prompts: Sequence[Sequence[int]], params: SamplingParams, stop_ids: Collection[int] = ()
) -> list[list[int]]:
    """The token ids that `stream` yields, a list for each prompt."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for produced in stream(model, prompts, params, stop_ids):
        for row, token in produced:
            outputs[row].append(token)
    return outputs


def checked(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens the model has room for after each prompt, 1 at least. Raises ValueError, naming the prompt."""
    rooms = []
    for row, prompt in enumerate(prompts):
        try:
            rooms.append(model.room(len(prompt)))
        except ValueError as error:
            raise ValueError(f"prompt {row}: {error}") from None
    return rooms


def pad(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Sequences of ids as one tensor: int64 [B, longest], padded with 0 at the end, and the mask of what is real."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = True
    return ids.to(device), mask.to(device)
