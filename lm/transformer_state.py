"""What a Transformer remembers between steps: rows that can be selected (reordered, repeated, dropped) and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import explicit_attention, fused_attention
from lm.trace import AttentionTrace
from lm.transformer_config import TransformerConfig

LEAST_CELLS = 16  # of a cache that is made or grows: it doubles from here


@dataclass
class Memory:
    """The cross-attention's keys and values of some sources, made once: a list, a layer each, of [M, H, S, d].

    lengths int64 [M]; mask bool [M, 1, S], or None where every source fills its row.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> Memory:
        longest = keys[0].shape[2]
        mask = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1)
        return cls(keys, values, lengths, mask)

    def select(self, index: Tensor) -> Memory:
        return replace(
            self,
            keys=[k.index_select(0, index) for k in self.keys],
            values=[v.index_select(0, index) for v in self.values],
            lengths=self.lengths[index],
            mask=None if self.mask is None else self.mask[index],
        )

    @staticmethod
    def join(parts: Sequence[Memory]) -> Memory:
        # The longest that is there: what was padded for a longer source that has left since is cut off.
        longest = max((int(part.lengths.max()) for part in parts if len(part.lengths)), default=1)

        def stack(layers: list[list[Tensor]]) -> list[Tensor]:
            return [
                torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])
                for tensors in zip(*layers, strict=True)
            ]

        keys, values = stack([part.keys for part in parts]), stack([part.values for part in parts])
        return Memory.of(keys, values, torch.cat([part.lengths for part in parts]))


@dataclass
class TransformerState:
    """R rows, each a target so far and its source.

    memory: of M sources; every one has R / M rows, which stand beside each other (the hypotheses of a beam): they
    attend to one copy of it, together. keys [layers, R, H, cells, d_k] and values [layers, R, H, cells, d_v]: the
    target's cache, row r's in cells 0 ... lengths[r] - 1; lengths int64 [R]. first int64 [R] is the token that the
    first `step` is to be given. Cells beyond a row's length hold nothing of meaning and are never attended to.
    """

    memory: Memory
    keys: Tensor
    values: Tensor
    lengths: Tensor
    first: Tensor
    context: int
    longest: int  # of lengths
    even: bool  # whether all lengths are the longest: no mask is needed then

    @classmethod
    def begin(
        cls, config: TransformerConfig, pairs: Sequence[tuple[Tensor, Tensor]], sources: Tensor
    ) -> TransformerState:
        """pairs: of each layer, k [B, S, H, d_k] and v [B, S, H, d_v] of the sources; sources int64 [B], how long."""
        memory = Memory.of(
            [k.transpose(1, 2).contiguous() for k, _ in pairs],
            [v.transpose(1, 2).contiguous() for _, v in pairs],
            sources,
        )
        rows, like = len(sources), memory.keys[0]
        keys = like.new_empty(config.decoder_layers, rows, config.heads, 0, config.key)
        values = like.new_empty(config.decoder_layers, rows, config.heads, 0, config.value)
        lengths = torch.zeros_like(sources)
        return cls(memory, keys, values, lengths, lengths + config.start_id, config.context, 0, True)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every row. Raises ValueError when a row would outgrow the model's context."""
        needed, cells = self.longest + tokens, self.keys.shape[3]
        if needed > self.context:
            raise ValueError(f"a target would have {needed} tokens; the model's context is {self.context}.")
        if needed > cells:
            more = min(self.context, max(needed, 2 * cells, LEAST_CELLS)) - cells
            self.keys, self.values = F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more))

    def advance(self, tokens: int) -> None:
        """Count tokens that were written into every row."""
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def select(self, index: Tensor) -> TransformerState:
        """The rows that `index` int64 [R] names, in its order; a row may be named more than once or not at all."""
        each = len(self.lengths) // max(1, len(self.memory.lengths))
        lengths = self.lengths[index]
        longest = self.longest if self.even else int(lengths.max()) if len(lengths) else 0
        return TransformerState(
            self._select_memory((index // max(1, each)).tolist(), index.device),
            self.keys.index_select(1, index),
            self.values.index_select(1, index),
            lengths,
            self.first[index],
            self.context,
            longest,
            self.even or bool((lengths == longest).all()),
        )

    def _select_memory(self, sources: list[int], device: torch.device) -> Memory:
        """Of the source that each new row has; no copy where all sources stay as they are."""
        distinct = list(dict.fromkeys(sources))
        each = len(sources) // max(1, len(distinct))
        if sources != [source for source in distinct for _ in range(each)]:
            distinct = sources  # no longer the same number of rows beside each other for each: a copy a row
        if distinct == list(range(len(self.memory.lengths))):
            return self.memory
        return self.memory.select(torch.tensor(distinct, dtype=torch.int64, device=device))

    @staticmethod
    def join(states: Sequence[TransformerState]) -> TransformerState:
        """The rows of all states, in order, as one state."""
        cells = max(state.keys.shape[3] for state in states)
        longest = max(state.longest for state in states)
        lengths = torch.cat([state.lengths for state in states])
        each = {len(state.lengths) // max(1, len(state.memory.lengths)) for state in states}
        memories = [
            state.memory
            if len(each) == 1
            else state.memory.select(
                torch.arange(len(state.memory.lengths), device=lengths.device).repeat_interleave(
                    len(state.lengths) // max(1, len(state.memory.lengths))
                )
            )
            for state in states
        ]
        return TransformerState(
            Memory.join(memories),
            torch.cat([F.pad(state.keys, (0, 0, 0, cells - state.keys.shape[3])) for state in states], dim=1),
            torch.cat([F.pad(state.values, (0, 0, 0, cells - state.values.shape[3])) for state in states], dim=1),
            lengths,
            torch.cat([state.first for state in states]),
            states[0].context,
            longest,
            all(state.even and state.longest == longest for state in states),
        )


class Cached:
    """The `Look` of `step`: new keys and values are written into the state, and all that a row then holds is seen."""

    def __init__(self, state: TransformerState, tokens: int, record: AttentionTrace | None = None):
        state.reserve(tokens)
        self.state, self.tokens, self.record = state, tokens, record
        device = state.lengths.device
        new = torch.arange(tokens, device=device)
        self.span = state.longest + tokens
        self.rows = torch.arange(len(state.lengths), device=device).unsqueeze(1)
        # int64 [t] where all rows are equally long, else [R, t]
        self.positions = new + state.longest if state.even else state.lengths.unsqueeze(1) + new
        self.mask: Tensor | None = None  # bool [R or 1, t, span]
        if not state.even or tokens > 1 or record is not None:
            positions = self.positions.unsqueeze(0) if state.even else self.positions
            self.mask = torch.arange(self.span, device=device) <= positions.unsqueeze(-1)

    def target(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.state.keys[layer], self.state.values[layer]  # [R, H, cells, d]
        if self.state.even:
            keys[:, :, self.state.longest : self.span] = k.transpose(1, 2)
            values[:, :, self.state.longest : self.span] = v.transpose(1, 2)
        else:
            keys[self.rows, :, self.positions] = k
            values[self.rows, :, self.positions] = v
        return self._attend("decoder", layer, q, keys[:, :, : self.span], values[:, :, : self.span], self.mask)

    def source(self, layer: int, q: Tensor) -> Tensor:
        memory = self.state.memory
        # The rows of one source are more queries to it.
        together = q.reshape(len(memory.lengths), -1, *q.shape[2:])
        mixed = self._attend("cross", layer, together, memory.keys[layer], memory.values[layer], memory.mask)
        return mixed.reshape(*q.shape[:3], -1)

    def _attend(self, kind: str, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, t, H, d], k and v [B, H, S, d], mask bool [B or 1, 1 or t, S] -> [B, t, H, d]."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.record is None or not self.record.wants(kind, layer):
            return fused_attention(q, k, v, mask)
        if mask is None:
            mask = torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=q.device)
        mixed, weights = explicit_attention(q, k, v, mask)
        rows = len(self.state.lengths)
        if kind == "cross":
            each = rows // max(1, len(weights))
            weights = weights.unflatten(2, (each, -1)).transpose(1, 2).flatten(0, 1)  # [R, H, t, S]
            real = mask[:, 0].expand(len(self.state.memory.lengths), -1).repeat_interleave(each, dim=0)
        else:
            real = mask[:, -1].expand(rows, -1)
        self.record.add(kind, layer, weights, keys=real)
        return mixed
