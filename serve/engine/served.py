"""The decoder as it is served: lm's, with the matrices of its blocks fused, in floats or int8, and few calls a layer.

    norm, qkv | rotate | attend | o + residual | norm, gate and up, silu(gate) * up | down + residual

On a CPU with kernels each of these is one call, and over pages all of them are one together (layers.py); what a token
gets does not depend on who else is in the batch (`ServedLM.invariant`). Without kernels torch computes the fused
products and lm what stands between. lm's own `hidden`, `start` and `step` drive it, under any `attend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lm.attention import Attend
from lm.config import DecoderConfig
from lm.decoder import Block, DecoderLM
from serve.engine import kernels as compiled
from serve.engine.elementwise import Activation, Norm, Rotation, kernels_for, softcap
from serve.engine.kernels import Kernels
from serve.engine.layers import Layers
from serve.engine.linears import FusedLinear, PlainLinear, Scratch
from serve.engine.paged import PagedAttend
from serve.engine.quantize import Int8Linear

Into = Callable[[Tensor], Tensor]  # x [N, width] -> [N, n]
Onto = Callable[[Tensor, Tensor], Tensor]  # [N, n], residual [N, width] -> [N, width]


class ServedBlock(nn.Module):
    """One layer of lm's: the same forward, made of four maps with what stands around them."""

    def __init__(self, block: Block, config: DecoderConfig, kernels: Kernels | None, scratch: Scratch, int8: bool):
        super().__init__()
        self.layer = block.layer
        self.parts = [config.heads, config.kv, config.kv]
        self.dim = config.dim
        self.rotate = Rotation(block.self_attn, config.heads, config.kv, block.rotates, kernels)
        self.qkv: Into
        self.o: Onto
        self.inner: Into
        self.down: Onto
        self.qkv, self.o, self.inner, self.down = (
            _plain_maps(block, config) if kernels is None else _fused_maps(block, config, kernels, scratch, int8)
        )
        # With kernels silu(gate) * up is part of the product, and there is no activation after it.
        within = kernels is not None and config.activation == "swiglu"
        self.activation = None if within else Activation(config.activation, config.inner, kernels)

    def forward(self, x: Tensor, table: Tensor | None, attend: Attend) -> Tensor:
        """As lm.decoder.Block: x [..., width], contiguous; table [..., 2, D] or None."""
        shape = x.shape
        x = x.view(-1, shape[-1])
        qkv = self.qkv(x)
        self.rotate(qkv, table)
        q, k, v = qkv.view(*shape[:-1], sum(self.parts), self.dim).split(self.parts, dim=-2)
        x = self.o(attend(self.layer, q, k, v).reshape(len(x), -1), x)
        inner = self.inner(x)
        if self.activation is not None:
            inner = self.activation(inner)
        return self.down(inner, x).view(shape)


def _plain_maps(block: Block, config: DecoderConfig) -> tuple[Into, Onto, Into, Onto]:
    before, after = block.input_layernorm, block.post_attention_layernorm
    qkv, o, up, down = (PlainLinear(*_tensors(maps)) for maps in _maps(block, config))
    return lambda x: qkv(before(x)), o, lambda x: up(after(x)), down


def _fused_maps(
    block: Block, config: DecoderConfig, kernels: Kernels, scratch: Scratch, int8: bool
) -> list[FusedLinear | Int8Linear]:
    def made(maps: list[nn.Linear], norm: nn.Module | None = None, *, gated: bool = False) -> FusedLinear | Int8Linear:
        weights, biases = _tensors(maps)
        if int8:
            return Int8Linear(weights, biases, kernels, scratch, norm=norm, gated=gated)
        return FusedLinear(weights, biases, kernels, scratch, norm=norm, gated=gated)

    qkv, o, up, down = _maps(block, config)
    before, after = block.input_layernorm, block.post_attention_layernorm
    return [made(qkv, before), made(o), made(up, after, gated=config.activation == "swiglu"), made(down)]


def _maps(block: Block, config: DecoderConfig) -> tuple[list[nn.Linear], ...]:
    """The maps that are made one: those of qkv, o, gate and up, down."""
    attention, mlp = block.self_attn, block.mlp
    qkv: list[nn.Linear] = [attention.q_proj, attention.k_proj, attention.v_proj]
    up: list[nn.Linear] = [mlp.gate_proj, mlp.up_proj] if config.activation == "swiglu" else [mlp.up_proj]
    return qkv, [attention.o_proj], up, [mlp.down_proj]


def _tensors(maps: list[nn.Linear]) -> tuple[list[Tensor], list[Tensor | None]]:
    return [map.weight for map in maps], [map.bias for map in maps]


class ServedLM(DecoderLM):
    """A DecoderLM for inference alone, made of another, which is taken apart on the way: no weight is held twice but
    the embedding, where it is the head too.
    """

    def __init__(self, model: DecoderLM, quantization: str | None = None):
        """quantization: None or "int8", where serve.engine.quantize.refusal has nothing against it."""
        nn.Module.__init__(self)
        config, weight = model.config, model.embed_tokens.weight
        self.config, self.recompute = config, False
        self.kernels = kernels_for(weight.dtype, weight.device, compiled.current())
        scratch, int8 = Scratch(), quantization == "int8"
        self.embed_tokens = model.embed_tokens
        if config.positions == "learned":
            self.embed_positions = model.embed_positions
        self.register_buffer("positions", model.positions, persistent=False)
        head = [model.output_weight]
        if not config.tie_embeddings:
            del model.lm_head
        self.head: Into
        if self.kernels is None:
            self.head = PlainLinear(head)
        elif int8:
            self.head = Int8Linear(head, (), self.kernels, scratch, out=torch.float32)
        else:
            self.head = FusedLinear(head, (), self.kernels, scratch, out=torch.float32)
        self.norm = Norm(model.norm, self.kernels)
        blocks, model.layers = list(model.layers), nn.ModuleList()
        served: list[ServedBlock] = []
        while blocks:
            block = blocks.pop(0)
            assert isinstance(block, Block)
            served.append(ServedBlock(block, config, self.kernels, scratch, int8))
        self.layers = nn.ModuleList(served)
        self._layers = Layers(served, config, self.kernels, scratch, weight.dtype) if self.kernels else None
        self.eval()

    def through(self, x: Tensor, table: Tensor | None, attend: Attend) -> Tensor:
        """As lm.decoder.DecoderLM; x [N, width] may be overwritten."""
        if self._layers is None or not isinstance(attend, PagedAttend):
            return super().through(x, table, attend)
        return self._layers(x, table, attend)[0]

    def hidden_of(self, wanted: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """`hidden` of the rows wanted, int64 [M], as [M, width], and of every row a float32, [N], that is not finite
        where something in the row is not. What follows the attention of the last block is computed for the rows wanted
        alone, where it can be.
        """
        if self._layers is None or not isinstance(attend, PagedAttend):
            hidden = self.hidden(tokens, positions, attend)
            return hidden.index_select(0, wanted), hidden.sum(dim=-1, dtype=torch.float32)
        x, table = self.embed(tokens, positions)
        last, mixed = self._layers(x, table, attend, wanted)
        hidden = self.norm(last)
        x.index_copy_(0, wanted, hidden)
        return hidden, x.sum(dim=-1, dtype=torch.float32) + mixed.sum(dim=-1, dtype=torch.float32)

    @property
    def invariant(self) -> bool:
        """Whether what a token gets has the same bits whoever else is in the batch."""
        return self.kernels is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]; fp32, or the weights' dtype."""
        out = self.head(hidden.reshape(-1, hidden.shape[-1]))
        if self.config.softcap is not None:
            out = softcap(out, self.config.softcap, self.kernels)
        return out.view(*hidden.shape[:-1], out.shape[-1])  # which may be no rows at all


@torch.no_grad()
def serve_model(model: DecoderLM, quantization: str | None = None) -> ServedLM:
    """The model as it is served; `model` itself is empty after this."""
    return ServedLM(model, quantization)
