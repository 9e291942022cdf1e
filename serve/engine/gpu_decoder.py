"""A decoder's forward pass on a GPU: lm.decoder's mathematics in few kernels, over pages. `unverified`: tested on a
CPU, with the operations written out (gpu_explicit.py) and with Triton's interpreter.

At batch 1 a step reads every weight once and hardly computes; what else costs time is the number of kernels. A Llama
layer has ten: norm, q k v, place (norms and rotation of heads, keys and values to their pages), attend (two, where the
keys are read in parts), o, norm, gate and up, swiglu, down. The residual is added inside the products. Layers with
LayerNorm, other activations or biases run those parts through the model's own modules.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.decoder import Block, DecoderLM
from lm.layers import RMSNorm
from serve.engine.gpu_batch import Inputs
from serve.engine.pages import Pages

LANES = 64  # of a tile of a chunk: its tokens times the query heads that share a KV head


class Operations(Protocol):
    """gpu_kernels, or gpu_explicit, whose functions these are."""

    def attend_pages(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        tiles: Tensor,
        out: Tensor,
        *,
        window: int | None,
        tokens: int,
        splits: int = 1,
    ) -> None: ...

    def place(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        slots: Tensor,
        *,
        heads: int,
        angles: Tensor | None,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def swiglu(self, both: Tensor) -> Tensor: ...


class GpuDecoder:
    """`hidden(inputs)`: rows of many sequences -> [rows, width], after the last norm.

    The model's weights for q, k and v, and for gate and up, become views of one matrix each: no memory is taken twice.
    `processors`: how many groups of threads the device runs at once.
    """

    def __init__(self, model: DecoderLM, pages: Pages, operations: Operations, processors: int) -> None:
        self.model, self.pages, self._operations, self._processors = model, pages, operations, processors
        config = model.config
        self._windows = config.windows()
        group = 1 << (config.heads // config.kv - 1).bit_length()  # as the kernel pads it
        self.tokens_per_tile = max(1, LANES // group)
        self._layers = [_Layer(cast(Block, block), pages, n, operations) for n, block in enumerate(model.layers)]

    def hidden(self, inputs: Inputs) -> Tensor:
        model = self.model
        config = model.config
        x = model.embed_tokens(inputs.tokens)
        if config.positions == "learned":
            x = x + model.embed_positions(inputs.positions)
        elif config.positions == "sinusoidal":
            assert model.positions is not None
            x = x + model.positions[inputs.positions.long()].to(x.dtype)
        angles = model.positions if config.positions == "rotary" else None
        for n, layer in enumerate(self._layers):
            q = layer.before(x, inputs, angles)
            x = layer.after(x, self._attend(n, q, inputs))
        return _norm(model.norm, x, self._operations)

    def _attend(self, layer: int, q: Tensor, inputs: Inputs) -> Tensor:
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        window, singles = self._windows[layer], inputs.singles
        attend, out = self._operations.attend_pages, torch.empty_like(q)
        if singles:
            tiles = inputs.tiles[:singles]
            splits = self._splits(singles)
            attend(q, keys, values, inputs.tables, tiles, out, window=window, tokens=1, splits=splits)
        if len(inputs.tiles) > singles:
            tiles = inputs.tiles[singles:]
            attend(q, keys, values, inputs.tables, tiles, out, window=window, tokens=self.tokens_per_tile)
        return out

    def _splits(self, singles: int) -> int:
        """Into how many parts the keys of each are cut, so that twice as many groups of threads run as there can."""
        wanted = 2 * self._processors // (singles * self.pages.kv_heads)
        return max(1, min(16, wanted))


class _Layer:
    """One block: what is fused of it, and the modules of what is not."""

    def __init__(self, block: Block, pages: Pages, layer: int, operations: Operations) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._block, self._operations = block, operations
        self._keys, self._values = pages.keys[layer], pages.values[layer]
        self._heads = pages.heads
        self._norms: tuple[Tensor, Tensor, float] | None = None
        if attention.qk_norm:
            self._norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
        self._qkv = _join([attention.q_proj, attention.k_proj, attention.v_proj])
        gated = mlp.activation == "swiglu" and mlp.up_proj.bias is None and mlp.down_proj.bias is None
        self._both = _join([mlp.gate_proj, mlp.up_proj])[0] if gated else None

    def before(self, x: Tensor, inputs: Inputs, angles: Tensor | None) -> Tensor:
        """x [N, width] -> q [N, H, D]; keys and values are in their pages."""
        qkv = F.linear(_norm(self._block.input_layernorm, x, self._operations), *self._qkv)
        return self._operations.place(
            qkv,
            self._keys,
            self._values,
            inputs.positions,
            inputs.slots,
            heads=self._heads,
            angles=angles if self._block.rotates else None,
            norms=self._norms,
        )

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x [N, width], mixed [N, H, D] -> x [N, width], which may be the same memory."""
        block = self._block
        x = _add_product(x, mixed.flatten(1), block.self_attn.o_proj)
        normed = _norm(block.post_attention_layernorm, x, self._operations)
        if self._both is None:
            return x + block.mlp(normed)
        return _add_product(x, self._operations.swiglu(F.linear(normed, self._both)), block.mlp.down_proj)


def _norm(module: nn.Module, x: Tensor, operations: Operations) -> Tensor:
    return operations.rms_norm(x, module.weight, module.eps) if isinstance(module, RMSNorm) else module(x)


def _add_product(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y), in place of x where there is no bias: one kernel."""
    return x.addmm_(y, linear.weight.t()) if linear.bias is None else x + linear(y)


@torch.no_grad()
def _join(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of maps of the same x, one below the other; the maps keep views of them."""
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        own = [getattr(linear, name) for linear in linears]
        if own[0] is None:
            joined.append(None)
            continue
        whole = torch.cat(own)
        for linear, part in zip(linears, whole.split([len(x) for x in own]), strict=True):
            setattr(linear, name, nn.Parameter(part, requires_grad=False))
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return weight, bias
