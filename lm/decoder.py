"""DecoderLM: the decoder-only causal Transformer that today's language models are.

Each block adds two things to the residual stream x: what attention gathers from the tokens before, and what the MLP
makes of each token alone (pre-norm):

    x = x + attention(norm(x))
    x = x + mlp(norm(x))

One forward serves training and generation: `hidden(tokens, positions, attend)`, where the policy `attend` knows the
batch, the cache and the mask (lm/attention.py, lm/state.py); serve/engine has it with pages, or as one call in C.
Modules carry the names that Llama's checkpoints use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.attention import Attend, CausalAttend
from lm.config import DecoderConfig
from lm.dropout import dropout
from lm.layers import MLP, RMSNorm, make_norm
from lm.linear import Linear, linear
from lm.loss import Loss, head_loss
from lm.positions import rotary_table, rotate, sinusoidal_table
from lm.prefix import PrefixAttend, join
from lm.state import CacheAttend, DecoderState
from lm.trace import AttentionTrace


class Attention(nn.Module):
    """The learned maps to queries, keys and values, and back (arXiv 1706.03762, section 3.2.2); grouped (arXiv
    2305.13245).
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.dim = config.dim
        self.q_proj = Linear(config.width, config.heads * config.dim, bias=config.has_bias("qkv"))
        self.k_proj = Linear(config.width, config.kv * config.dim, bias=config.has_bias("qkv"))
        self.v_proj = Linear(config.width, config.kv * config.dim, bias=config.has_bias("qkv"))
        self.o_proj = Linear(config.heads * config.dim, config.width, bias=config.has_bias("o"))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.dim, config.norm_eps)
            self.k_norm = RMSNorm(config.dim, config.norm_eps)

    def project(self, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., width], rotary angles [..., 2, D] or None -> q [..., H, D], k [..., KV, D], v [..., KV, D]."""
        q, k, v = (map(x).unflatten(-1, (-1, self.dim)) for map in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return q, k, v


class Block(nn.Module):
    """One layer: `before` the tokens meet, their meeting (`attend`), and `after` it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.dropout, self.rotates = layer, config.dropout, config.rotates()[layer]
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def before(self, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), table if self.rotates else None)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + dropout(self.self_attn.o_proj(mixed.flatten(-2)), self.dropout, self.training)
        return x + dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)

    def forward(self, x: Tensor, table: Tensor | None, attend: Attend) -> Tensor:
        q, k, v = self.before(x, table)
        return self.after(x, attend(self.layer, q, k, v))


class DecoderLM(nn.Module):
    """See the module's docstring. Made with random weights (`initialise`), in fp32."""

    encoder_decoder = False
    positions: Tensor | None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("positions", self.position_table(), persistent=False)
        self.recompute = False  # activation checkpointing, block by block
        self.initialise()

    def position_table(self, device: torch.device | None = None) -> Tensor | None:
        """What a position looks like, for kinds that are not learned: rotary angles [context, 2, D] or sinusoids
        [context, width].
        """
        config = self.config
        if config.positions == "rotary":
            return rotary_table(config.context, config.dim, config.rope_theta, device, config.rope_scaling)
        if config.positions == "sinusoidal":
            return sinusoidal_table(config.context, config.width, device)
        return None

    @torch.no_grad()
    def initialise(self) -> None:
        """Matrices N(0, 1 / (3 fan_in)), the two that write to the residual stream smaller by sqrt(2 layers),
        embeddings N(0, 0.02^2), biases 0.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "embed" in name or "lm_head" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                std = (3 * parameter.shape[1]) ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.layers)
                nn.init.normal_(parameter, std=std)

    @property
    def output_weight(self) -> Tensor:
        """[vocab, width]: the embedding itself where it is tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens and positions int64 [...], any leading shape that `attend` understands -> [..., width], after the
        last norm.
        """
        x, table = self.embed(tokens, positions)
        return self.norm(self.through(x, table, attend))

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens and positions int64 [...] -> what enters the first block [..., width], and the positions' rotary
        angles [..., 2, D], where the model has them.
        """
        config = self.config
        x = self.embed_tokens(tokens)
        table = None
        if config.positions == "learned":
            x = x + self.embed_positions(positions)
        elif config.positions == "sinusoidal":
            assert self.positions is not None
            x = x + self.positions[positions].to(x.dtype)
        elif config.positions == "rotary":
            assert self.positions is not None
            table = self.positions[positions]
        return dropout(x, config.dropout, self.training), table

    def through(self, x: Tensor, table: Tensor | None, attend: Attend) -> Tensor:
        """What leaves the last block, [..., width]."""
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, table, attend, use_reentrant=False)
            else:
                x = block(x, table, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]."""
        out = linear(hidden, self.output_weight)
        if self.config.softcap is not None:
            out = self.config.softcap * torch.tanh(out / self.config.softcap)
        return out

    def forward(self, batch: Mapping[str, Tensor], smoothing: float = 0.0) -> Loss:
        """Next-token loss over the targets, with label smoothing where it is asked for.

        batch, for language modelling: tokens int64 [B, T]; targets int64 [B, T], already shifted, lm.loss.IGNORE where
        nothing is asked; documents int [B, T] (optional), to keep attention inside a document. For translation: src
        int64 [B, S], src_mask bool [B, S], tgt_input and tgt_output int64 [B, T], which lm.prefix joins; only targets
        are asked for. Raises ValueError where source and target together are longer than the context.
        """
        attend: Attend
        if "src" in batch:
            tokens, targets, prefix = join(batch, self.config.context)
            if tokens.shape[1] > self.config.context:
                raise ValueError(
                    f"a source and its target have {tokens.shape[1]} tokens; the model's context is "
                    f"{self.config.context}."
                )
            if self.config.prefix:
                attend = PrefixAttend(prefix, tokens.shape[1])
            else:
                attend = CausalAttend(self.config.windows())
        else:
            tokens, targets = batch["tokens"], batch["targets"]
            attend = CausalAttend(self.config.windows(), batch.get("documents"))
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = self.hidden(tokens, positions, attend)
        return head_loss(hidden, self.output_weight, targets, self.config.softcap, smoothing)

    def room(self, source_tokens: int) -> int:
        """How many tokens can be decoded after a prompt of so many. Raises ValueError, one sentence, for a prompt that
        is empty or leaves no room.
        """
        if source_tokens < 1:
            raise ValueError("the prompt is empty; it must hold at least one token.")
        if source_tokens >= self.config.context:
            raise ValueError(
                f"the prompt has {source_tokens} tokens; the model's context of {self.config.context} leaves no room "
                "to continue it."
            )
        return self.config.context - source_tokens

    def start(self, src: Tensor, src_mask: Tensor | None = None, record: AttentionTrace | None = None) -> DecoderState:
        """Read prompts: src int64 [B, T], src_mask bool [B, T] with the True cells of a row first -> a state, ready
        for `step`.

        All but the last token of each row are computed, and see each other all with config.prefix; that one is
        `state.first`, to be given to the first `step`.
        """
        if src_mask is None:
            src_mask = torch.ones_like(src, dtype=torch.bool)
        lengths = src_mask.sum(dim=1)
        if int(lengths.min()) < 1:
            raise ValueError("a prompt is empty; it must hold at least one token.")
        first = src.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
        state = DecoderState.empty(self.config, len(src), first, self.embed_tokens.weight.dtype)
        if src.shape[1] > 1:
            real = torch.arange(src.shape[1] - 1, device=src.device) < (lengths - 1).unsqueeze(1)
            self._advance(src[:, :-1], state, real, lengths - 1 if self.config.prefix else None, record)
        state.lengths = lengths - 1
        return state

    def step(
        self, tokens: Tensor, state: DecoderState, record: AttentionTrace | None = None
    ) -> tuple[Tensor, DecoderState]:
        """The next t tokens of every row, int64 [B, t] -> logits [B, t, vocab] for what follows each, and the state
        after them.
        """
        hidden = self._advance(tokens, state, record=record)
        return self.logits(hidden), state

    def _advance(
        self,
        tokens: Tensor,
        state: DecoderState,
        real: Tensor | None = None,
        prefix: Tensor | None = None,
        record: AttentionTrace | None = None,
    ) -> Tensor:
        state.reserve(tokens.shape[1])
        positions = state.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        attend = CacheAttend(self.config.windows(), state, positions, real, prefix, record)
        hidden = self.hidden(tokens, positions, attend)
        state.lengths = state.lengths + tokens.shape[1]
        return hidden
