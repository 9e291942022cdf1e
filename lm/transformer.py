"""Transformer: the encoder-decoder of 2017, as printed (arXiv 1706.03762).

Each sub-layer is a residual one, normed after the sum (section 3.1, "post-norm"):

    x = LayerNorm(x + Dropout(Sublayer(x)))

An encoder layer has two sub-layers, self-attention and an MLP; a decoder layer has three: self-attention over the
target so far, attention over what the encoder made of the source (`memory`), and an MLP. Most later code norms before
the sub-layer; that is `norm: pre`, never the default.

One forward of each stack serves every use. The decoder's layers know no batch, cache or mask: a `Look` does, of which
there are two, `WholeTarget` here (training and forced targets) and `Cached` in lm/transformer_state.py (decoding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.attention import explicit_attention, fused_attention
from lm.dropout import dropout
from lm.linear import Linear, Packed, forget_packed, linear, packing_pays
from lm.loss import Loss, head_loss
from lm.positions import sinusoidal_table
from lm.trace import AttentionTrace
from lm.transformer_config import TransformerConfig
from lm.transformer_state import Cached, TransformerState


class Look(Protocol):
    """What the queries of a decoder layer see: [B, T, H, d_k] -> [B, T, H, d_v]."""

    def target(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Masked self-attention; k and v are those of the same tokens as q."""

    def source(self, layer: int, q: Tensor) -> Tensor:
        """Cross-attention."""


class MultiHeadAttention(nn.Module):
    """The learned maps of section 3.2.2: to each head's queries, keys and values, and from all heads' outputs back.

    Stored unfused; `project` computes the three as one product where that is faster.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.key_dim, self.value_dim = config.heads, config.key, config.value
        keys, values = config.heads * config.key, config.heads * config.value
        self.q_proj = Linear(config.width, keys, bias=config.bias)
        self.k_proj = Linear(config.width, keys, bias=config.bias)
        self.v_proj = Linear(config.width, values, bias=config.bias)
        self.o_proj = Linear(values, config.width, bias=config.bias)
        self.packed_in, self.packed_out = Packed(), Packed()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, width] -> q and k [B, T, H, d_k], v [B, T, H, d_v]."""
        q, k, v = self._heads(together(x, (self.q_proj, self.k_proj, self.v_proj), self.packed_in))
        return q, k, v

    def query(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> q [B, T, H, d_k]."""
        return self._heads(together(x, (self.q_proj,), self.packed_in))[0]

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [B, S, width] -> k [B, S, H, d_k], v [B, S, H, d_v]."""
        k, v = self._heads(together(memory, (self.k_proj, self.v_proj)))
        return k, v

    def _heads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)) for part in parts]

    def output(self, mixed: Tensor) -> Tensor:
        """[B, T, H, d_v] -> [B, T, width]."""
        return together(mixed.flatten(-2), (self.o_proj,), self.packed_out)[0]


def together(x: Tensor, maps: Sequence[Linear], packed: Packed | None = None) -> Sequence[Tensor]:
    """Several maps of the same x, as one product where x has so many rows that gathering the weights costs little.

    packed: where the weights are kept for decoding, None to keep none.
    """
    weights: list[Tensor] = [map.weight for map in maps]
    biases: list[Tensor | None] = [map.bias for map in maps]
    sizes = [len(weight) for weight in weights]
    if packed is not None and packing_pays(x, weights[0]):
        return packed(x, weights, biases).split(sizes, dim=-1)
    if len(maps) == 1 or x.numel() < 4 * weights[0].numel():
        return [map(x) for map in maps]
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    return linear(x, torch.cat(weights), bias).split(sizes, dim=-1)


class MLP(nn.Module):
    """The position-wise network max(0, x W1 + b1) W2 + b2 (section 3.3), or with GELU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.activation
        self.up_proj = Linear(config.width, config.mlp_width, bias=config.bias)
        self.down_proj = Linear(config.mlp_width, config.width, bias=config.bias)
        self.packed_up, self.packed_down = Packed(), Packed()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        (inner,) = together(x, (self.up_proj,), self.packed_up)
        if self.activation == "relu":
            inner = F.relu(inner)
        else:
            inner = F.gelu(inner, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return together(inner, (self.down_proj,), self.packed_down)[0]


class Residual(nn.LayerNorm):
    """What stands around a sub-layer: `leave(x, Sublayer(enter(x)))`."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config.width, eps=config.norm_eps)
        self.post, self.dropout = config.norm == "post", config.dropout

    def enter(self, x: Tensor) -> Tensor:
        """What the sub-layer reads: x; pre: LayerNorm(x)."""
        return x if self.post else self(x)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """LayerNorm(x + Dropout(y)); pre: x + Dropout(y)."""
        x = x + dropout(y, self.dropout, self.training)
        return self(x) if self.post else x


class EncoderLayer(nn.Module):
    """Self-attention over the source, and an MLP."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_dropout = config.attention_dropout
        self.self_attn, self.self_attn_norm = MultiHeadAttention(config), Residual(config)
        self.mlp, self.mlp_norm = MLP(config), Residual(config)

    def forward(self, x: Tensor, mask: Tensor | None, record: AttentionTrace | None = None) -> Tensor:
        """x [B, S, width]; mask bool [B, 1, S], the tokens that may be attended to, None for all."""
        q, k, v = self.self_attn.project(self.self_attn_norm.enter(x))
        if record is not None and record.wants("encoder", self.layer):
            real = torch.ones(x.shape[0], x.shape[1], dtype=torch.bool) if mask is None else mask.squeeze(1)
            mixed, weights = explicit_attention(q, k, v, real.unsqueeze(1).to(x.device))
            record.add("encoder", self.layer, weights, queries=real, keys=real)
        else:
            mixed = fused_attention(q, k, v, mask, dropout=self.attention_dropout if self.training else 0.0)
        x = self.self_attn_norm.leave(x, self.self_attn.output(mixed))
        return self.mlp_norm.leave(x, self.mlp(self.mlp_norm.enter(x)))


class DecoderLayer(nn.Module):
    """Self-attention over the target so far, attention over the source, and an MLP."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.self_attn, self.self_attn_norm = MultiHeadAttention(config), Residual(config)
        self.cross_attn, self.cross_attn_norm = MultiHeadAttention(config), Residual(config)
        self.mlp, self.mlp_norm = MLP(config), Residual(config)

    def forward(self, x: Tensor, look: Look) -> Tensor:
        """x [B, T, width] -> the same shape."""
        q, k, v = self.self_attn.project(self.self_attn_norm.enter(x))
        x = self.self_attn_norm.leave(x, self.self_attn.output(look.target(self.layer, q, k, v)))
        q = self.cross_attn.query(self.cross_attn_norm.enter(x))
        x = self.cross_attn_norm.leave(x, self.cross_attn.output(look.source(self.layer, q)))
        return self.mlp_norm.leave(x, self.mlp(self.mlp_norm.enter(x)))


class WholeTarget:
    """A whole target at once: position t sees targets 0 ... t, and all of the source."""

    def __init__(self, layers: Sequence[DecoderLayer], memory: Tensor, mask: Tensor | None, dropout: float):
        self.layers, self.memory, self.mask, self.dropout = layers, memory, mask, dropout

    def target(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attention(q, k, v, None, causal=True, dropout=self.dropout)

    def source(self, layer: int, q: Tensor) -> Tensor:
        k, v = self.layers[layer].cross_attn.keys_values(self.memory)
        return fused_attention(q, k, v, self.mask, dropout=self.dropout)


class Encoder(nn.Module):
    """The stack that reads the source."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_layers))
        if config.norm == "pre":
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)


class Decoder(nn.Module):
    """The stack that writes the target."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.decoder_layers))
        if config.norm == "pre":
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)


class Transformer(nn.Module):
    """See the module's docstring. Made with random weights (`initialise`), in fp32."""

    encoder_decoder = True
    positions: Tensor | None

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)  # the target's, and what is tied to it
        if config.tie_embeddings != "all":
            self.embed_source = nn.Embedding(config.vocab_size, config.width)
        if config.tie_embeddings == "none":
            self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        if config.positions == "learned":
            self.embed_source_positions = nn.Embedding(config.context, config.width)
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("positions", self.position_table(), persistent=False)
        self.packed_head = Packed()
        self.recompute = False  # activation checkpointing, layer by layer
        self.initialise()

    def position_table(self, device: torch.device | None = None) -> Tensor | None:
        """The sinusoids of section 3.5, fp32 [context, width]; None where positions are learned or not told."""
        config = self.config
        return sinusoidal_table(config.context, config.width, device) if config.positions == "sinusoidal" else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Matrices uniform in +- sqrt(6 / (fan_in + fan_out)), biases 0, norms 1 and 0, embeddings N(0, 1 / width).

        The paper prints none of this. Its authors' code (tensor2tensor's transformer_base_v1) draws matrices by
        "uniform unit scaling" of gain 1 over the mean of both fans, which is Xavier's rule (Glorot and Bengio 2010, eq.
        16). Embeddings are multiplied by sqrt(width) on the way in, and their transpose makes the logits: at this
        deviation both begin with unit variance.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "embed" in name or "lm_head" in name:
                nn.init.normal_(parameter, std=self.config.width**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.decoder.layers))

    @property
    def output_weight(self) -> Tensor:
        """[vocab, width]: the target's embedding itself where it is tied."""
        return self.lm_head.weight if self.config.tie_embeddings == "none" else self.embed_tokens.weight

    def embed_src(self, src: Tensor) -> Tensor:
        """Tokens int64 [B, S] -> [B, S, width]."""
        own = self.config.tie_embeddings != "all"
        positions = torch.arange(src.shape[1], device=src.device)
        learned = self.embed_source_positions if self.config.positions == "learned" else None
        return self._embed(src, positions, self.embed_source if own else self.embed_tokens, learned)

    def embed_tgt(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens int64 [B, T], positions int64 [B or nothing, T] -> [B, T, width]."""
        learned = self.embed_positions if self.config.positions == "learned" else None
        return self._embed(tokens, positions, self.embed_tokens, learned)

    def _embed(self, tokens: Tensor, positions: Tensor, table: nn.Embedding, learned: nn.Embedding | None) -> Tensor:
        """Dropout(sqrt(width) * embedding + position) (sections 3.4, 3.5 and 5.4)."""
        x = table(tokens) * math.sqrt(self.config.width)
        if learned is not None:
            x = x + learned(positions)
        elif self.positions is not None:
            x = x + self.positions[positions].to(x.dtype)
        return dropout(x, self.config.dropout, self.training)

    def encode(self, src: Tensor, mask: Tensor | None = None, record: AttentionTrace | None = None) -> Tensor:
        """src int64 [B, S]; mask bool [B, 1, S], True = may be attended to, None for all -> memory [B, S, width]."""
        x = self.embed_src(src)
        for layer in self.encoder.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, use_reentrant=False)
            else:
                x = layer(x, mask, record)
        return self.encoder.norm(x) if self.config.norm == "pre" else x

    def decode(self, tokens: Tensor, positions: Tensor, look: Look) -> Tensor:
        """Tokens int64 [B, T] at `positions` int64 [B or nothing, T] -> [B, T, width], ready for `logits`."""
        x = self.embed_tgt(tokens, positions)
        for layer in self.decoder.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, look, use_reentrant=False)
            else:
                x = layer(x, look)
        return self.decoder.norm(x) if self.config.norm == "pre" else x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]."""
        if packing_pays(hidden, self.output_weight):
            return self.packed_head(hidden, [self.output_weight], [None])
        return linear(hidden, self.output_weight)

    def train(self, mode: bool = True) -> Transformer:
        if mode:  # the weights are about to change
            forget_packed(self)
        return super().train(mode)

    def forward(self, batch: Mapping[str, Tensor], smoothing: float = 0.0) -> Loss:
        """The loss of translations, all positions in parallel.

        batch: src int64 [B, S], src_mask bool [B, S] (the real tokens, which come first), tgt_input int64 [B, T] and
        tgt_output int64 [B, T], which is lm.loss.IGNORE where nothing is asked. Raises ValueError for a source or a
        target that is longer than the context.
        """
        for name, side in (("source", "src"), ("target", "tgt_input")):
            if batch[side].shape[1] > self.config.context:
                raise ValueError(
                    f"a {name} has {batch[side].shape[1]} tokens; the model's context is {self.config.context}."
                )
        mask = attendable(batch["src_mask"])
        memory = self.encode(batch["src"], mask)
        dropout = self.config.attention_dropout if self.training else 0.0
        look = WholeTarget(self.decoder_layers, memory, mask, dropout)
        tgt = batch["tgt_input"]
        hidden = self.decode(tgt, torch.arange(tgt.shape[1], device=tgt.device), look)
        return head_loss(hidden, self.output_weight, batch["tgt_output"], None, smoothing)

    def room(self, source_tokens: int) -> int:
        """How many tokens can be decoded after a source of so many: as long as the longest target, whatever the source.

        Raises ValueError, one sentence, for a source that is empty or too long.
        """
        if source_tokens < 1:
            raise ValueError("the source is empty; it must hold at least one token.")
        if source_tokens > self.config.context:
            raise ValueError(f"the source has {source_tokens} tokens; it may have {self.config.context} at most.")
        return self.config.context

    def start(
        self, src: Tensor, src_mask: Tensor | None = None, record: AttentionTrace | None = None
    ) -> TransformerState:
        """Read sources: src int64 [B, S], src_mask bool [B, S] with the True cells of a row first -> a state, ready for
        `step`: the keys and values of every layer's cross-attention, once, and no target yet.

        Raises ValueError for a source that is empty or too long.
        """
        lengths = torch.full((len(src),), src.shape[1]) if src_mask is None else src_mask.sum(dim=1)
        for extreme in (int(lengths.min()), int(lengths.max())):
            self.room(extreme)
        longest = int(lengths.max())
        src = src[:, :longest]
        mask = attendable(None if src_mask is None else src_mask[:, :longest], look=True)
        memory = self.encode(src, mask, record)
        pairs = [layer.cross_attn.keys_values(memory) for layer in self.decoder_layers]
        return TransformerState.begin(self.config, pairs, lengths.to(src.device))

    def step(
        self, tokens: Tensor, state: TransformerState, record: AttentionTrace | None = None
    ) -> tuple[Tensor, TransformerState]:
        """The next t target tokens of every row, int64 [B, t] -> logits [B, t, vocab] for what follows each, and the
        state after them.
        """
        look = Cached(state, tokens.shape[1], record)
        hidden = self.decode(tokens, look.positions, look)
        state.advance(tokens.shape[1])
        return self.logits(hidden), state


def attendable(src_mask: Tensor | None, look: bool = False) -> Tensor | None:
    """src_mask bool [B, S] as attention's mask [B, 1, S], or None where nothing is padding, which is faster.

    `look` has that found out on a GPU too, where it waits for the device.
    """
    if src_mask is None or ((look or src_mask.device.type == "cpu") and bool(src_mask.all())):
        return None
    return src_mask.unsqueeze(1)
