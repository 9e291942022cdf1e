"""Our own decoder inside vLLM: the mathematics of lm/decoder.py in vLLM's tensor-parallel layers and paged attention.

The names of modules are lm.decoder's, which are Llama's; q, k and v are one product here, and so are gate and up.
Rotary angles come from lm.positions, so that every scaling is ours; windows, norms, activations, biases and the soft
cap are vLLM's layers with our numbers. `serve.on_vllm.checks` refuses beforehand what these cannot do.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul, get_act_fn
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from lm.config import DecoderConfig
from lm.positions import rotary_table, rotate, sinusoidal_table

# lm.config's activations without a gate, under vLLM's names.
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}
QKV = {f".{part}_proj": (".qkv_proj", part) for part in "qkv"}
GATED = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}


def make_norm(config: DecoderConfig) -> nn.Module:
    """The norm over the residual stream that `config` names."""
    if config.norm == "rms":
        return RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.has_bias("norm"))


class Attention(nn.Module):
    """This rank's query heads, and the key and value heads that they read."""

    def __init__(self, config: DecoderConfig, vllm: VllmConfig, prefix: str):
        super().__init__()
        ranks, layer = get_tensor_model_parallel_world_size(), extract_layer_index(prefix)
        self.dim = config.dim
        self.heads = config.heads // ranks
        self.kv_heads = max(1, config.kv // ranks)  # ranks beyond the number of heads hold copies
        self.rotates, self.qk_norm = config.rotates()[layer], config.qk_norm
        quantized = {"quant_config": vllm.quant_config}
        self.qkv_proj = QKVParallelLinear(
            config.width,
            config.dim,
            config.heads,
            config.kv,
            bias=config.has_bias("qkv"),
            prefix=f"{prefix}.qkv_proj",
            **quantized,
        )
        self.o_proj = RowParallelLinear(
            config.heads * config.dim, config.width, bias=config.has_bias("o"), prefix=f"{prefix}.o_proj", **quantized
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = PagedAttention(
            self.heads,
            config.dim,
            config.dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm.cache_config,
            per_layer_sliding_window=config.windows()[layer],  # in both, a token itself counts
            prefix=f"{prefix}.attn",
            **quantized,
        )

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        """x [N, width], rotary angles [N, 2, D] or None -> [N, width]."""
        qkv, _ = self.qkv_proj(x)
        parts = qkv.split([count * self.dim for count in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k = (part.unflatten(-1, (-1, self.dim)) for part in parts[:2])
        if self.qk_norm:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        if self.rotates:
            assert table is not None
            q, k = rotate(q, table), rotate(k, table)
        out, _ = self.o_proj(self.attn(q.flatten(-2), k.flatten(-2), parts[2]))
        return out


class MLP(nn.Module):
    """SwiGLU, or one matrix up, a function, and one down."""

    def __init__(self, config: DecoderConfig, vllm: VllmConfig, prefix: str):
        super().__init__()
        width, inner, bias = config.width, config.inner, config.has_bias("mlp")
        quantized = {"quant_config": vllm.quant_config}
        self.gated = config.activation == "swiglu"
        self.function: nn.Module
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                width, [inner, inner], bias=bias, prefix=f"{prefix}.gate_up_proj", **quantized
            )
            self.function = SiluAndMul()
        else:
            self.up_proj = ColumnParallelLinear(width, inner, bias=bias, prefix=f"{prefix}.up_proj", **quantized)
            self.function = get_act_fn(ACTIVATIONS[config.activation])
        self.down_proj = RowParallelLinear(inner, width, bias=bias, prefix=f"{prefix}.down_proj", **quantized)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] -> [N, width]."""
        inner, _ = self.gate_up_proj(x) if self.gated else self.up_proj(x)
        out, _ = self.down_proj(self.function(inner))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, vllm: VllmConfig, prefix: str):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, vllm, f"{prefix}.self_attn")
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config, vllm, f"{prefix}.mlp")

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table)
        return x + self.mlp(self.post_attention_layernorm(x))


# The sizes that change from call to call: the number of tokens.
@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class Decoder(nn.Module):
    """Embedding, this stage's layers and, on the last stage, the last norm."""

    table: Tensor | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config.shape()
        stage = get_pp_group()
        self.first, self.last = stage.is_first_rank, stage.is_last_rank
        if self.first or (self.last and config.tie_embeddings):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.width, prefix=f"{prefix}.embed_tokens")
        else:
            self.embed_tokens = PPMissingLayer()
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width) if self.first else PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.layers, lambda prefix: Block(config, vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = make_norm(config) if self.last else PPMissingLayer()
        table = None
        if config.positions == "rotary":
            table = rotary_table(config.context, config.dim, config.rope_theta, scaling=config.rope_scaling)
        elif config.positions == "sinusoidal":
            table = sinusoidal_table(config.context, config.width)
        self.register_buffer("table", table, persistent=False)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(["x"], config.width)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[N] -> [N, width]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """input_ids and positions [N] -> [N, width], or what the next stage needs."""
        if self.first:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            x = inputs_embeds
            if self.config.positions == "learned":
                x = x + self.embed_positions(positions)
            elif self.config.positions == "sinusoidal":
                assert self.table is not None
                x = x + self.table[positions].to(x.dtype)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["x"]
        angles = None
        if self.config.positions == "rotary":
            assert self.table is not None
            angles = self.table[positions]
        for block in islice(self.layers, self.start_layer, self.end_layer):
            x = block(x, angles)
        return self.norm(x) if self.last else IntermediateTensors({"x": x})


class HeedForCausalLM(nn.Module, SupportsPP):
    """What vLLM's registry knows by the name in config.json."""

    packed_modules_mapping = {  # noqa: RUF012 - the form in which vLLM reads it
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.model = Decoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        config = self.model.config
        if self.model.last:
            self.lm_head = ParallelLMHead(config.vocab_size, config.width, prefix=maybe_prefix(prefix, "lm_head"))
            if config.tie_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.softcap)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.hf_to_vllm_mapper = WeightsMapper(
            orig_to_new_stacked=QKV | (GATED if config.activation == "swiglu" else {}),
            orig_to_new_prefix={"model.lm_head.": "lm_head."},
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[N] -> [N, width]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """As Decoder.forward."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, width] -> [N, vocab], capped where the model caps; None on ranks that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes the tensors of the folder by their names there; returns the names of what was filled."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
