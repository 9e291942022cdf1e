"""The attention record: what each head of each layer attended to, whatever the architecture.

`AttentionTrace` is given to a model's calls (`start`, `step`, and those that read whole sentences) as `record=`. The
model hands it weights as they arise; search tells it how rows were selected. It knows three kinds of attention:

    encoder   source positions over source positions            (Transformer)
    decoder   target positions over target positions, causal    (Transformer; DecoderLM, over all that it reads)
    cross     target positions over source positions            (Transformer; RNNSearch: one layer, one head)

`Maps` is one sentence of it: maps cut to the sentence's own lengths, with the tokens of their axes. Pictures are drawn
from that alone, and it can be saved and read again. Layers and heads are counted from 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("encoder", "decoder", "cross")
CELLS = 1 << 25  # 128 MiB in float32; 6 layers x 8 heads x 3 kinds of a 30-token sentence are 1 << 17


@dataclass
class _Chunk:
    """What one `add` brought. Rows are selected by composing indices: a map is never copied for each beam."""

    weights: Tensor  # [b, H, q, k]
    energies: Tensor | None  # [b, H, q, k]
    queries: Tensor  # bool [b, q]
    keys: Tensor  # bool [b, k]
    index: Tensor  # int64 [B]: row r of the record is row index[r] of this chunk


class AttentionTrace:
    """A record of attention, bounded by kinds, layers, heads and a number of cells.

    kinds: of KINDS. layers, heads: the numbers to keep, None for all. cells: how many weights and energies may be kept
    at most. Everything is kept detached, in float32, on the CPU. Recording never changes what a model computes.
    """

    def __init__(
        self,
        kinds: Collection[str] = KINDS,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        cells: int = CELLS,
    ):
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is not a kind of attention; the kinds are {', '.join(KINDS)}.")
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.layers = None if layers is None else tuple(sorted(set(layers)))
        self.heads = None if heads is None else tuple(sorted(set(heads)))
        self.cells, self.used = cells, 0
        self.offered: dict[str, set[int]] = {}  # the layers that the model has, as far as it asked
        self._chunks: dict[tuple[str, int], list[_Chunk]] = {}

    def wants(self, kind: str, layer: int) -> bool:
        """Whether `add` would keep this: a layer that is not wanted may stay on the fused path."""
        self.offered.setdefault(kind, set()).add(layer)
        return kind in self.kinds and (self.layers is None or layer in self.layers)

    def add(
        self,
        kind: str,
        layer: int,
        weights: Tensor,
        energies: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> None:
        """Keep weights [B, H, q, k] of one layer, and the energies that they are the softmax of, where they are wanted.

        Calls for the same kind and layer follow one another in time: their queries are appended, and the keys, which
        may have become more, are padded with 0 on the right in the earlier ones. queries bool [B, q] and keys bool
        [B, k] name the real ones, None for all: `row` drops the others, the padding of a batch of unequal sentences.
        Raises ValueError, one sentence, for a head that is not there and beyond `cells`.
        """
        if not self.wants(kind, layer):
            return
        rows, heads, q, k = weights.shape
        if self.heads is not None and self.heads and self.heads[-1] >= heads:
            raise ValueError(
                f"head {self.heads[-1]} is asked for; {kind} layer {layer} has heads 0 to {heads - 1}, counted from 0."
                if heads > 1
                else f"head {self.heads[-1]} is asked for; {kind} layer {layer} has one head, 0."
            )
        before = self._chunks.get((kind, layer))
        if before and len(before[-1].index) != rows:
            raise ValueError(f"{kind} layer {layer} has {rows} rows; the record has {len(before[-1].index)}.")
        size = rows * (heads if self.heads is None else len(self.heads)) * q * k * (1 if energies is None else 2)
        if self.used + size > self.cells:
            raise ValueError(
                f"the attention record would hold more than {self.cells} weights; "
                "record fewer layers or heads, or a shorter text."
            )
        self.used += size
        ones = torch.ones
        chunk = _Chunk(
            self._keep(weights),
            None if energies is None else self._keep(energies),
            ones(rows, q, dtype=torch.bool) if queries is None else queries.detach().to("cpu", copy=True),
            ones(rows, k, dtype=torch.bool) if keys is None else keys.detach().to("cpu", copy=True),
            torch.arange(rows),
        )
        self._chunks.setdefault((kind, layer), []).append(chunk)

    def _keep(self, maps: Tensor) -> Tensor:
        maps = maps.detach() if self.heads is None else maps.detach()[:, list(self.heads)]
        return maps.to("cpu", torch.float32, copy=True)

    def select(self, index: Tensor) -> None:
        """Reorder, repeat or drop the rows of all that is recorded, as `state.select(index)` does; index int64 [R]."""
        index = index.detach().to("cpu")
        for chunks in self._chunks.values():
            for chunk in chunks:
                chunk.index = chunk.index[index]

    @property
    def encoder(self) -> dict[int, Tensor]:
        """{layer: [B, H, S, S]}."""
        return self._all("encoder")

    @property
    def decoder(self) -> dict[int, Tensor]:
        """{layer: [B, H, T, T]}."""
        return self._all("decoder")

    @property
    def cross(self) -> dict[int, Tensor]:
        """{layer: [B, H, T, S]}."""
        return self._all("cross")

    @property
    def energies(self) -> dict[int, Tensor]:
        """{layer: [B, H, T, S]} of the cross-attention, where the model gave them."""
        kept = {layer: chunks for (kind, layer), chunks in sorted(self._chunks.items()) if kind == "cross"}
        parts = {layer: [(c.energies, c.index) for c in chunks] for layer, chunks in kept.items()}
        return {
            layer: _append([e[index] for e, index in pairs if e is not None], -torch.inf)
            for layer, pairs in parts.items()
            if all(e is not None for e, _ in pairs)
        }

    def _all(self, kind: str) -> dict[int, Tensor]:
        return {
            layer: _append([chunk.weights[chunk.index] for chunk in chunks], 0.0)
            for (name, layer), chunks in sorted(self._chunks.items())
            if name == kind
        }

    def row(self, b: int) -> Maps:
        """The sentence of row b, its maps cut to its own queries and keys. A copy: it stays when rows are selected.

        Search takes it when a hypothesis ends. The tokens of the axes are for the caller to fill in.
        """
        maps = Maps(heads=self.heads)
        for (kind, layer), chunks in sorted(self._chunks.items()):
            at = [int(chunk.index[b]) for chunk in chunks]
            keys = max(int(chunk.keys[row].sum()) for chunk, row in zip(chunks, at, strict=True))
            parts, energies = [], []
            for chunk, row in zip(chunks, at, strict=True):
                real = chunk.queries[row]
                parts.append(chunk.weights[row][:, real, :keys])
                if chunk.energies is not None:
                    energies.append(chunk.energies[row][:, real, :keys])
            maps.of(kind)[layer] = _append(parts, 0.0)
            if kind == "cross" and len(energies) == len(chunks):
                maps.energies[layer] = _append(energies, -torch.inf)
        return maps


def _append(parts: Sequence[Tensor], fill: float) -> Tensor:
    """[..., q, k] each, k of any size -> [..., all q, largest k]."""
    widest = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=fill) for part in parts], dim=-2)


@dataclass
class Maps:
    """The attention of one sentence: {layer: [H, q, k]} for each kind, and the tokens along the axes.

    encoder [H, S, S], decoder [H, T, T], cross and its energies [H, T, S]. source: the S tokens that the encoder read;
    inputs: the T tokens that the decoder read; outputs: the token that it wrote at each of these T steps. heads: the
    numbers of the heads that were kept, None for all.
    """

    encoder: dict[int, Tensor] = field(default_factory=dict)
    decoder: dict[int, Tensor] = field(default_factory=dict)
    cross: dict[int, Tensor] = field(default_factory=dict)
    energies: dict[int, Tensor] = field(default_factory=dict)
    source: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    heads: tuple[int, ...] | None = None

    def of(self, kind: str) -> dict[int, Tensor]:
        """{layer: [H, q, k]} of a kind of KINDS."""
        return {"encoder": self.encoder, "decoder": self.decoder, "cross": self.cross}[kind]

    @property
    def kinds(self) -> list[str]:
        """The kinds that were recorded."""
        return [kind for kind in KINDS if self.of(kind)]

    def axes(self, kind: str) -> tuple[list[str], list[str]]:
        """The tokens of the queries and of the keys. Numbers where the tokens are not known.

        A row of the cross-attention is named by the token written then, as in arXiv 1409.0473; a row of
        self-attention by the token read there.
        """
        queries, keys = {
            "encoder": (self.source, self.source),
            "decoder": (self.inputs, self.inputs),
            "cross": (self.outputs, self.source),
        }[kind]
        _, q, k = next(iter(self.of(kind).values())).shape
        return _or_numbers(queries, q), _or_numbers(keys, k)

    def head_numbers(self, kind: str) -> list[int]:
        """The numbers of the heads along dimension 0 of a kind's maps."""
        return list(self.heads) if self.heads is not None else list(range(next(iter(self.of(kind).values())).shape[0]))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the tokens lie in its metadata as JSON."""
        from safetensors.torch import save_file

        tensors = {f"{kind}.{layer}": maps.contiguous() for kind in KINDS for layer, maps in self.of(kind).items()}
        tensors |= {f"energies.{layer}": maps.contiguous() for layer, maps in self.energies.items()}
        tokens = {"source": self.source, "inputs": self.inputs, "outputs": self.outputs, "heads": self.heads}
        save_file(tensors, file, metadata={"heed_attention": json.dumps(tokens)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Maps:
        """What `save` wrote. Raises ValueError, one sentence, for a file that is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(file), framework="pt") as opened:
                tokens: Mapping = json.loads((opened.metadata() or {})["heed_attention"])
                maps = cls(source=tokens["source"], inputs=tokens["inputs"], outputs=tokens["outputs"])
                maps.heads = None if tokens["heads"] is None else tuple(tokens["heads"])
                for name in opened.keys():  # noqa: SIM118 - no dictionary
                    kind, layer = name.split(".")
                    table = maps.energies if kind == "energies" else maps.of(kind)
                    table[int(layer)] = opened.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise ValueError(f"{file} is not an attention record; it must be a file that Maps.save wrote.") from None
        for kind in (*KINDS, "energies"):
            table = maps.energies if kind == "energies" else maps.of(kind)
            ordered = dict(sorted(table.items()))
            table.clear()
            table.update(ordered)
        return maps


def _or_numbers(tokens: list[str], n: int) -> list[str]:
    return tokens if len(tokens) == n else [str(i) for i in range(n)]
