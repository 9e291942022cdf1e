"""The Transformer is the one that arXiv 1706.03762 prints: sizes, order of the residual, positions, what is shared."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lm.transformer
from lm.config import ConfigError
from lm.linear import Packed, onednn_is_usable
from lm.loss import IGNORE
from lm.transformer import Residual, Transformer
from lm.transformer_config import TransformerConfig

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "context": 24,
    "start_id": 1,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "width": 16,
    "heads": 4,
    "mlp_width": 24,
}
PAPER: dict[str, Any] = {"vocab_size": 37_000, "context": 512, "start_id": 1}
BIG: dict[str, Any] = {"width": 1024, "mlp_width": 4096, "heads": 16, "dropout": 0.3}
TABLE_3: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    *((f"A heads {h}", {"heads": h}) for h in (1, 4, 16, 32)),
    ("B d_k 16", {"key_dim": 16}),
    ("B d_k 32", {"key_dim": 32}),
    *((f"C layers {n}", {"encoder_layers": n, "decoder_layers": n}) for n in (2, 4, 8)),
    ("C width 256", {"width": 256, "key_dim": 32, "value_dim": 32}),
    ("C width 1024", {"width": 1024, "key_dim": 128, "value_dim": 128}),
    *((f"C mlp {d}", {"mlp_width": d}) for d in (1024, 4096)),
    *((f"D dropout {p}", {"dropout": p}) for p in (0.0, 0.2)),
    ("E learned", {"positions": "learned"}),
    ("big", BIG),
]
# Parameters in millions that table 3 prints, where it prints any, and how far its rounding and its vocabulary (37,000
# "about", section 5.1) may lie from ours.
PRINTED = {"base": 65, "B d_k 16": 58, "B d_k 32": 60, "C layers 2": 36, "C layers 4": 50, "C layers 8": 80}
PRINTED |= {"C width 256": 28, "C width 1024": 168, "C mlp 1024": 53, "C mlp 4096": 90, "big": 213}


def make(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**(SMALL | options)))


def shaken(**options: Any) -> Transformer:
    """In eval mode, and no norm or bias is 1 or 0."""
    model = make(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------ sizes


def test_the_base_model_has_44138496_parameters_beside_its_embedding() -> None:
    counts = TransformerConfig(**PAPER).parameters()
    assert counts["layers"] == 44_138_496
    assert counts["total"] == 44_138_496 + 37_000 * 512
    # d_model 512: an attention has four maps 512 x 512 with biases, the MLP 512 x 2048 twice, a norm 2 x 512.
    attention, mlp, norm = 4 * (512 * 512 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    assert counts["layers"] == 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)


def test_the_big_model_has_176357376_parameters_beside_its_embedding() -> None:
    counts = TransformerConfig(**PAPER, **BIG).parameters()
    assert counts["layers"] == 176_357_376
    assert counts["total"] == 214_245_376


@pytest.mark.parametrize(("name", "options"), TABLE_3, ids=[name for name, _ in TABLE_3])
def test_table_3_can_be_said_and_counts_by_arithmetic(name: str, options: dict[str, Any]) -> None:
    config = TransformerConfig(**(PAPER | options))
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()["total"]
    if name in PRINTED:
        # C of width 256 is 28 in the table; 8 heads of 32 make 26.1 with these biases.
        assert config.parameters()["total"] / 1e6 == pytest.approx(PRINTED[name], rel=0.08)


# ------------------------------------------------------------ the residual, as printed


def test_a_sub_layer_is_normed_after_the_sum() -> None:
    """Section 3.1: LayerNorm(x + Sublayer(x))."""
    residual = Residual(TransformerConfig(**SMALL))
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    residual.eval()
    assert torch.equal(residual.enter(x), x)
    torch.testing.assert_close(residual.leave(x, y), F.layer_norm(x + y, (16,)))
    before = Residual(TransformerConfig(**SMALL, norm="pre")).eval()
    torch.testing.assert_close(before.enter(x), F.layer_norm(x, (16,)))
    assert torch.equal(before.leave(x, y), x + y)


def test_the_whole_model_is_the_paper_written_out() -> None:
    """Every equation of section 3, in fp64, with nothing fused."""
    model = shaken().double()
    model.positions = None  # added by hand below
    config, weights = model.config, {name: p.detach() for name, p in model.named_parameters()}

    def attention(name: str, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        def project(letter: str, x: Tensor) -> Tensor:
            flat = x @ weights[f"{name}.{letter}_proj.weight"].T + weights[f"{name}.{letter}_proj.bias"]
            return flat.view(*x.shape[:2], config.heads, -1).transpose(1, 2)

        q, k, v = project("q", queries), project("k", keys), project("v", keys)
        scores = (q @ k.transpose(2, 3) / math.sqrt(config.key)).masked_fill(~mask, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return mixed @ weights[f"{name}.o_proj.weight"].T + weights[f"{name}.o_proj.bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        inner = (x @ weights[f"{name}.up_proj.weight"].T + weights[f"{name}.up_proj.bias"]).clamp(min=0)
        return inner @ weights[f"{name}.down_proj.weight"].T + weights[f"{name}.down_proj.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + config.norm_eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def embed(tokens: Tensor) -> Tensor:
        position, i = torch.meshgrid(torch.arange(tokens.shape[1]), torch.arange(config.width), indexing="ij")
        angle = position.double() / 10_000 ** (2 * (i // 2).double() / config.width)
        sinusoid = torch.where(i % 2 == 0, angle.sin(), angle.cos())
        return math.sqrt(config.width) * weights["embed_tokens.weight"][tokens] + sinusoid

    src, tgt = torch.randint(2, 30, (3, 6)), torch.randint(2, 30, (3, 5))
    lengths = torch.tensor([6, 4, 1])
    seen = (torch.arange(6) < lengths[:, None])[:, None, None]
    x = embed(src)
    for layer in range(2):
        at = f"encoder.layers.{layer}"
        x = norm(f"{at}.self_attn_norm", x + attention(f"{at}.self_attn", x, x, seen))
        x = norm(f"{at}.mlp_norm", x + mlp(f"{at}.mlp", x))
    memory, y = x, embed(tgt)
    for layer in range(2):
        at = f"decoder.layers.{layer}"
        y = norm(f"{at}.self_attn_norm", y + attention(f"{at}.self_attn", y, y, torch.ones(5, 5).tril().bool()))
        y = norm(f"{at}.cross_attn_norm", y + attention(f"{at}.cross_attn", y, memory, seen))
        y = norm(f"{at}.mlp_norm", y + mlp(f"{at}.mlp", y))
    logits = y @ weights["embed_tokens.weight"].T

    model.positions = model.position_table().double()
    with torch.no_grad():
        found, _ = model.step(tgt, model.start(src, seen[:, 0, 0]))
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)  # the table of sinusoids is fp32
    wanted = F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), reduction="sum")
    with torch.no_grad():
        loss = model({"src": src, "src_mask": seen[:, 0, 0], "tgt_input": tgt, "tgt_output": tgt})
    torch.testing.assert_close(loss.total.double(), wanted, rtol=1e-5, atol=1e-4)


def test_dropout_is_where_section_5_4_puts_it() -> None:
    """On each sub-layer's output, and on embedding plus position of both stacks: nowhere else."""
    model = make(dropout=0.5).train()
    calls: list[tuple[int, ...]] = []
    plain = lm.transformer.dropout

    def counted(x: Tensor, p: float, training: bool) -> Tensor:
        calls.append(tuple(x.shape))
        assert (p, training) == (0.5, True)
        return plain(x, p, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.transformer, "dropout", counted)
        model(batch())
    assert sorted(calls) == sorted([(2, 5, 16)] * (1 + 2 * 2) + [(2, 4, 16)] * (1 + 2 * 3))


def test_attention_dropout_acts_in_training_alone() -> None:
    model = make(dropout=0.0, attention_dropout=0.5)
    plain = make(dropout=0.0)
    assert torch.equal(model.eval()(batch()).total, plain.eval()(batch()).total)
    assert not torch.equal(model.train()(batch()).total, plain.train()(batch()).total)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "src": torch.randint(2, 30, (2, 5), generator=generator),
        "src_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "tgt_input": torch.randint(2, 30, (2, 4), generator=generator),
        "tgt_output": torch.tensor([[3, 4, 5, 2], [9, 2, IGNORE, IGNORE]]),
    }


# ------------------------------------------------------------ embeddings and positions


def test_three_matrices_are_one() -> None:
    """Section 3.4: source, target and pre-softmax share one matrix; a gradient from any of them lands in it."""
    model = make()
    tables = [name for name, p in model.named_parameters() if p.shape[0] == 30]
    assert tables == ["embed_tokens.weight"] == [name for name in model.state_dict() if "embed" in name]
    assert model.output_weight is model.embed_tokens.weight
    half = make(tie_embeddings="target")
    assert half.output_weight is half.embed_tokens.weight is not half.embed_source.weight
    none = make(tie_embeddings="none")
    assert len({id(p) for p in (none.embed_tokens.weight, none.embed_source.weight, none.output_weight)}) == 3


def test_embeddings_are_scaled_by_the_root_of_the_width() -> None:
    model = make(positions="none").eval()
    tokens = torch.tensor([[3, 7]])
    torch.testing.assert_close(model.embed_src(tokens), 4 * model.embed_tokens.weight[tokens])
    torch.testing.assert_close(model.embed_tgt(tokens, torch.arange(2)), 4 * model.embed_tokens.weight[tokens])


def test_positions_are_section_3_5s() -> None:
    model = make(width=8, heads=2).eval()
    added = model.embed_src(torch.full((1, 24), 3)).detach()[0] - math.sqrt(8) * model.embed_tokens.weight[3]
    for position in (0, 1, 23):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert float(added[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(added[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


def test_learned_positions_are_the_stacks_own() -> None:
    model = make(positions="learned").eval()
    tokens, places = torch.tensor([[3, 3]]), torch.tensor([[4, 9]])
    plain = 4 * model.embed_tokens.weight[tokens]
    torch.testing.assert_close(model.embed_src(tokens) - plain, model.embed_source_positions.weight[None, :2])
    torch.testing.assert_close(model.embed_tgt(tokens, places) - plain, model.embed_positions.weight[places])


# ------------------------------------------------------------ initial weights


def test_initial_statistics() -> None:
    model = Transformer(TransformerConfig(**(SMALL | {"width": 128, "mlp_width": 512, "vocab_size": 2000})))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert bool((p == 1).all()), name
        elif "embed" in name:
            assert float(p.std()) == pytest.approx(128**-0.5, rel=0.02)
        else:  # Xavier: uniform within sqrt(6 / (fan_in + fan_out))
            bound = math.sqrt(6 / sum(p.shape))
            assert float(p.abs().max()) <= bound, name
            assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03), name


def test_an_untrained_model_guesses() -> None:
    """Scaled embeddings and logits both begin near unit variance: the first loss is near ln(vocabulary) + 1/2."""
    model = Transformer(TransformerConfig(**(SMALL | {"width": 128, "vocab_size": 1000}))).eval()
    embedded = model.embed_src(torch.randint(1000, (8, 20))) - model.positions[:20]
    assert float(embedded.std()) == pytest.approx(1, rel=0.05)
    tokens = torch.randint(1000, (64, 20))
    with torch.no_grad():
        loss = model({"src": tokens, "src_mask": tokens >= 0, "tgt_input": tokens, "tgt_output": tokens.flip(1)})
    assert math.log(1000) < float(loss.total / loss.targets) < math.log(1000) + 1.5


# ------------------------------------------------------------ training


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = make(dropout=0.2).train()
        model.recompute = recompute
        torch.manual_seed(3)
        model(batch()).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_every_parameter_learns() -> None:
    for options in ({}, {"norm": "pre", "tie_embeddings": "none", "positions": "learned"}):
        model = make(**options)
        model(batch(), smoothing=0.1).total.backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not [name for name in still if not name.endswith("k_proj.bias")]  # it moves all scores of a query alike


def test_it_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(SMALL | {"width": 32, "mlp_width": 64, "dropout": 0.0})))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        tokens = torch.randint(3, 30, (32, 6), generator=generator)
        begin = torch.cat((torch.ones(32, 1, dtype=torch.int64), tokens[:, :-1]), dim=1)
        loss = model({"src": tokens, "src_mask": tokens > 0, "tgt_input": begin, "tgt_output": tokens})
        optimizer.zero_grad()
        (loss.total / loss.targets).backward()
        optimizer.step()
    assert float(loss.nll / loss.targets) < 1.5  # a guess is 3.3


def test_autocast_trains_on_the_same_loss_within_its_precision() -> None:
    model = shaken()
    exact = model(batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch())
    loss.total.backward()
    assert float((loss.total - exact.total).abs() / exact.targets) < 0.1
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("side", "name"), [("src", "source"), ("tgt_input", "target")])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "none"])
def test_what_is_beyond_the_context_is_refused_in_a_sentence(positions: str, side: str, name: str) -> None:
    long = torch.full((2, 25), 5)
    changed = batch() | {side: long} | ({"src_mask": long > 0} if side == "src" else {"tgt_output": long})
    with pytest.raises(ValueError, match=rf"^a {name} has 25 tokens; the model's context is 24\.$"):
        make(positions=positions)(changed)


# ------------------------------------------------------------ the state of decoding


@torch.no_grad()
def test_beams_share_their_sources_memory() -> None:
    model = shaken()
    state = model.start(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[True] * 3, [True, True, False]]))
    beams = state.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert beams.memory is state.memory
    _, beams = model.step(torch.tensor([3, 4, 5, 6, 7, 8]).unsqueeze(1), beams)
    beams = beams.select(torch.tensor([2, 0, 0, 5, 3, 4]))
    assert beams.memory is state.memory
    one = beams.select(torch.tensor([3, 4, 5]))  # the first source is done: its memory goes
    assert one.memory.keys[0].shape[0] == 1
    uneven = beams.select(torch.tensor([0, 3, 4]))  # two hypotheses of one beam and one of another: a copy each
    assert uneven.memory.keys[0].shape[0] == 3


@torch.no_grad()
def test_a_cache_grows_and_is_cut_at_the_context() -> None:
    model = shaken()
    state = model.start(torch.tensor([[5, 6, 7]]))
    cells = []
    for _ in range(24):
        _, state = model.step(torch.tensor([[4]]), state)
        cells.append(state.cache.cells)
    assert sorted(set(cells)) == [16, 24]
    with pytest.raises(ValueError, match=r"^a target would have 25 tokens; the model's context is 24\.$"):
        model.step(torch.tensor([[4]]), state)


def test_sources_are_refused_with_a_sentence() -> None:
    model = shaken()
    with pytest.raises(ValueError, match=r"^the source is empty; it must hold at least one token\.$"):
        model.start(torch.tensor([[5], [6]]), torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match=r"^the source has 25 tokens; it may have 24 at most\.$"):
        model.start(torch.full((1, 25), 5))


def decoded(model: Transformer) -> Tensor:
    with torch.no_grad():
        state = model.start(torch.tensor([[5, 6, 7]]))
        return model.step(torch.tensor([[4]]), state)[0]


def test_decoding_sees_every_change_of_the_weights() -> None:
    """What is laid out for decoding is laid out again after an update, a load, and in a copy."""
    model = shaken()
    before = decoded(model)
    copied = copy.deepcopy(model)
    assert torch.equal(decoded(copied), before)
    saved = {name: p.clone() for name, p in model.state_dict().items()}
    for change in (
        lambda: model.load_state_dict({name: 1.5 * p for name, p in saved.items()}),
        lambda: [p.detach().mul_(1.1) for p in model.parameters()],
        lambda: model.load_state_dict({name: p.clone() for name, p in saved.items()}, assign=True),
    ):
        change()
        fresh = shaken()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(decoded(model), decoded(fresh))
    torch.testing.assert_close(decoded(model), before)
    assert torch.equal(decoded(copied), before)


@pytest.mark.skipif(not onednn_is_usable(), reason="torch has no oneDNN linear here")
def test_training_gives_back_what_decoding_laid_out() -> None:
    model = shaken()
    decoded(model)
    packs = [held for m in model.modules() for held in vars(m).values() if isinstance(held, Packed)]
    assert any(pack.weight is not None for pack in packs)
    model.train()
    assert all(pack.weight is None for pack in packs)
    assert not any("packed" in name for name in model.state_dict())


# ------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"encoder_layers": 0}, "encoder_layers is 0; it must be at least 1."),
        ({"heads": 3}, "heads is 3; it must divide width 16, or key_dim and value_dim must be given."),
        ({"key_dim": 0}, "key_dim is 0; it must be at least 1, or left out."),
        ({"width": 17, "heads": 1}, "width is 17; sinusoidal positions need an even width."),
        ({"norm": "rms"}, "norm is 'rms'; it must be one of post, pre."),
        ({"activation": "swiglu"}, "activation is 'swiglu'; it must be one of relu, gelu, gelu_tanh."),
        ({"positions": "rotary"}, "positions is 'rotary'; it must be one of sinusoidal, learned, none."),
        ({"tie_embeddings": True}, "tie_embeddings is True; it must be str."),
        ({"tie_embeddings": "both"}, "tie_embeddings is 'both'; it must be one of all, target, none."),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1."),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1; it must be at least 0 and below 1."),
        ({"start_id": 30}, "start_id is 30; it must be a token of 30, from 0."),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must lie between 0 and 1."),
        ({"context": 1 << 30}, "context is 1073741824; it must be at most 16777216."),
        ({"bias": 1}, "bias is 1; it must be bool."),
    ],
)
def test_a_shape_that_cannot_be_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TransformerConfig(**(SMALL | options))
    assert caught.value.problems == [sentence]


def test_defaults_are_the_papers_base_model() -> None:
    config = TransformerConfig(**PAPER)
    assert (config.encoder_layers, config.decoder_layers, config.width, config.heads) == (6, 6, 512, 8)
    assert (config.key, config.value, config.mlp_width, config.dropout) == (64, 64, 2048, 0.1)
    assert (config.norm, config.positions, config.tie_embeddings, config.activation) == (
        "post",
        "sinusoidal",
        "all",
        "relu",
    )
    assert config.attention_dropout == 0


def test_flops_of_the_base_model_by_hand() -> None:
    config = TransformerConfig(**PAPER)
    w, d, s, t = 512, 2048, 30, 20
    encoder = 6 * (4 * w * w + 2 * w * d) + 6 * 2 * w * w  # and the decoder's keys and values of the source
    decoder = 6 * (6 * w * w + 2 * w * d) + 37_000 * w
    meeting = 12 * w * (6 * s * s + 6 * t * (t + 1) / 2 + 6 * t * s)
    assert config.flops_per_token(s, t) == int((6 * (encoder * s + decoder * t) + meeting) / t)


def test_linear_maps_are_no_nn_transformer() -> None:
    """torch's own modules hide what this one is written to show."""
    assert not any(isinstance(m, (nn.Transformer, nn.MultiheadAttention)) for m in make().modules())
