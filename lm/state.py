"""What decoding remembers between steps: rows that can be selected (reordered, repeated, dropped) and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.attention import explicit_attention, fused_attention, may_attend
from lm.config import DecoderConfig
from lm.prefix import sees_prefix
from lm.trace import AttentionTrace


@dataclass
class DecoderState:
    """The KV cache of a decoder, contiguous: row b holds its tokens' keys and values in cells 0 ... lengths[b] - 1.

    keys and values are a list, a layer each, of [B, capacity, KV, D]; lengths int64 [B]; first int64 [B] is the token
    that the first `step` is to be given. Cells beyond a row's length hold nothing of meaning and are never attended to.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    first: Tensor
    context: int

    @classmethod
    def empty(cls, config: DecoderConfig, rows: int, first: Tensor, dtype: torch.dtype) -> DecoderState:
        shape, device = (rows, 0, config.kv, config.dim), first.device
        keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        return cls(keys, values, torch.zeros(rows, dtype=torch.int64, device=device), first, config.context)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every row. Raises ValueError when a row would outgrow the model's context."""
        needed = int(self.lengths.max()) + tokens if len(self.lengths) else tokens
        if needed > self.context:
            raise ValueError(f"a sequence would have {needed} tokens; the model's context is {self.context}.")
        capacity = self.keys[0].shape[1] if self.keys else needed
        if needed > capacity:
            more = min(self.context, max(needed, 2 * capacity, 16)) - capacity
            self.keys = [_longer(tensor, more) for tensor in self.keys]
            self.values = [_longer(tensor, more) for tensor in self.values]

    def select(self, index: Tensor) -> DecoderState:
        """The rows that `index` int64 [R] names, in its order; a row may be named more than once or not at all."""
        keys, values = [k[index] for k in self.keys], [v[index] for v in self.values]
        return DecoderState(keys, values, self.lengths[index], self.first[index], self.context)

    @staticmethod
    def join(states: Sequence[DecoderState]) -> DecoderState:
        """The rows of all states, in order, as one state."""
        capacity = max(state.keys[0].shape[1] for state in states)

        def stack(layers: list[list[Tensor]]) -> list[Tensor]:
            return [
                torch.cat([_longer(t, capacity - t.shape[1]) for t in parts]) for parts in zip(*layers, strict=True)
            ]

        return DecoderState(
            stack([state.keys for state in states]),
            stack([state.values for state in states]),
            torch.cat([state.lengths for state in states]),
            torch.cat([state.first for state in states]),
            states[0].context,
        )


def _longer(tensor: Tensor, cells: int) -> Tensor:
    if cells <= 0:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], cells, *tensor.shape[2:])), dim=1)


class CacheAttend:
    """The policy of `step` and `start`: write the new keys and values into the cache, attend to all that a row then
    holds.

    positions int64 [B, t] are those of the new tokens; the state's lengths are still the old ones. real bool [B, t]:
    the new tokens that are no padding, None for all. prefix int64 [B]: how many cells every query of a row may see,
    later ones too (lm.prefix). Weights go into `record`, where it wants them.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        state: DecoderState,
        positions: Tensor,
        real: Tensor | None = None,
        prefix: Tensor | None = None,
        record: AttentionTrace | None = None,
    ):
        self.windows, self.state, self.positions, self.prefix = windows, state, positions, prefix
        self.real, self.record = real, record
        self.rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        self.span = int(positions.max()) + 1 if positions.numel() else 0
        self.masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.state.keys[layer], self.state.values[layer]
        keys[self.rows, self.positions] = k
        values[self.rows, self.positions] = v
        keys, values = keys[:, : self.span], values[:, : self.span]
        window = self.windows[layer]
        if window not in self.masks:
            mask = may_attend(self.positions, torch.arange(self.span, device=q.device), window)
            self.masks[window] = mask if self.prefix is None else sees_prefix(mask, self.prefix)
        mask = self.masks[window]
        if self.record is None or not self.record.wants("decoder", layer):
            return fused_attention(q, keys, values, mask)
        mixed, weights = explicit_attention(q, keys, values, mask)
        real = torch.ones_like(self.positions, dtype=torch.bool) if self.real is None else self.real
        held = self.state.lengths + real.sum(dim=1)
        cells = torch.arange(self.span, device=q.device) < held.unsqueeze(1)
        self.record.add("decoder", layer, weights, queries=real, keys=cells)
        return mixed
