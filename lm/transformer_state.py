"""What a Transformer remembers between steps: rows that can be selected (reordered, repeated, dropped) and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import explicit_attention, fused_attention
from lm.groups import regroup
from lm.target_cache import TargetCache
from lm.trace import AttentionTrace
from lm.transformer_config import TransformerConfig


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
    attend to one copy of it, together. cache: the targets' keys and values, row r's in cells 0 ... lengths[r] - 1, in
    groups as the sources have them; lengths int64 [R]. first int64 [R] is the token that the first `step` is to be
    given. Cells beyond a row's length hold nothing of meaning and are never attended to.
    """

    memory: Memory
    cache: TargetCache
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
        keys = like.new_empty(config.decoder_layers, rows, config.heads, 0, 1, config.key)
        values = like.new_empty(config.decoder_layers, rows, config.heads, 0, 1, config.value)
        lengths = torch.zeros_like(sources)
        cache = TargetCache(keys, values)
        return cls(memory, cache, lengths, lengths + config.start_id, config.context, 0, True)

    @property
    def each(self) -> int:
        """The rows of a source."""
        return max(1, len(self.lengths) // max(1, len(self.memory.lengths)))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every row. Raises ValueError when a row would outgrow the model's context."""
        needed = self.longest + tokens
        if needed > self.context:
            raise ValueError(f"a target would have {needed} tokens; the model's context is {self.context}.")
        self.cache.reserve(needed, self.context)

    def advance(self, tokens: int) -> None:
        """Count tokens that were written into every row."""
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def select(self, index: Tensor) -> TransformerState:
        """The rows that `index` int64 [R] names, in its order; a row may be named more than once or not at all."""
        kept, each = regroup(index, self.each)
        memory = self.memory
        if kept != list(range(len(memory.lengths))):
            memory = memory.select(torch.tensor(kept, dtype=torch.int64, device=index.device))
        lengths = self.lengths[index]
        longest = self.longest if self.even else int(lengths.max()) if len(lengths) else 0
        return TransformerState(
            memory,
            self.cache.select(index, kept, each),
            lengths,
            self.first[index],
            self.context,
            longest,
            self.even or bool((lengths == longest).all()),
        )

    @staticmethod
    def join(states: Sequence[TransformerState]) -> TransformerState:
        """The rows of all states, in order, as one state."""
        longest = max(state.longest for state in states)
        lengths = torch.cat([state.lengths for state in states])
        memories, caches = [state.memory for state in states], [state.cache for state in states]
        if len({state.each for state in states}) > 1:
            caches = [cache.apart() for cache in caches]
            memories = [
                memory.select(torch.arange(len(memory.lengths), device=lengths.device).repeat_interleave(state.each))
                for memory, state in zip(memories, states, strict=True)
            ]
        return TransformerState(
            Memory.join(memories),
            TargetCache.join(caches),
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
        self.state, self.record = state, record
        device = state.lengths.device
        new = torch.arange(tokens, device=device)
        self.span = state.longest + tokens
        # int64 [t] where all rows are equally long, else [R, t]
        self.positions = new + state.longest if state.even else state.lengths.unsqueeze(1) + new
        self.past: Tensor | None = None  # bool [R or 1, t, span]: the cells that a row has reached
        if not state.even or tokens > 1 or record is not None:
            positions = self.positions.unsqueeze(0) if state.even else self.positions
            self.past = torch.arange(self.span, device=device) <= positions.unsqueeze(-1)
        state.cache.begin(self.positions)
        self.mask = self._mask()
        self.added = self.mask  # what the fused kernel adds to the scores: it would make that of the mask in each layer
        if self.mask is not None:
            self.added = torch.zeros_like(self.mask, dtype=state.cache.keys.dtype).masked_fill_(~self.mask, -torch.inf)

    def _mask(self) -> Tensor | None:
        """bool [M or 1, E * t, span * P]: the places that a group's rows may attend to; None: all."""
        lineage = self.state.cache.lineage(self.span)
        if lineage is None:
            return self.past
        seen = lineage.unsqueeze(2)  # [M, E, 1, span, P]
        if self.past is None:
            return seen.flatten(3).flatten(1, 2)
        groups = 1 if self.state.even else len(lineage)
        return (seen & self.past.unflatten(0, (groups, -1)).unsqueeze(-1)).flatten(3).flatten(1, 2)

    def target(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.state.cache
        cache.write(layer, k, v, self.positions, self.state.longest if self.state.even else None)
        return self._attend("decoder", layer, q, *cache.read(layer, self.span), self.mask, self.added)

    def source(self, layer: int, q: Tensor) -> Tensor:
        memory = self.state.memory
        return self._attend("cross", layer, q, memory.keys[layer], memory.values[layer], memory.mask, memory.mask)

    def _attend(
        self, kind: str, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, added: Tensor | None
    ) -> Tensor:
        """q [R, t, H, d], k and v [M, H, S, d], mask bool [M or 1, 1 or E * t, S] -> [R, t, H, d].

        The rows of a group are more queries to what it has in common. added: the mask as the fused kernel takes it.
        """
        together = q.reshape(len(k), -1, *q.shape[2:])
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.record is None or not self.record.wants(kind, layer):
            return fused_attention(together, k, v, added).reshape(*q.shape[:3], -1)
        if mask is None:
            mask = torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=q.device)
        mixed, weights = explicit_attention(together, k, v, mask)
        rows, each = len(q), self.state.each
        weights = weights.unflatten(2, (each, -1)).transpose(1, 2).flatten(0, 1)  # [R, H, t, S]
        if kind == "cross":
            real = mask[:, 0].expand(len(k), -1).repeat_interleave(each, dim=0)
        else:
            weights = weights.unflatten(-1, (self.span, -1)).sum(dim=-1)  # a row's weight is at one place of a cell
            assert self.past is not None
            real = self.past[:, -1].expand(rows, -1)
        self.record.add(kind, layer, weights, keys=real)
        return mixed.reshape(*q.shape[:3], -1)
