"""RNNsearch is what arXiv 1409.0473 prints, and what trains is the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lm.additive import AdditiveAttention
from lm.gated import GatedUnit
from lm.loss import IGNORE
from lm.rnnsearch import RNNSearch
from lm.rnnsearch_config import RNNSearchConfig
from lm.trace import AttentionTrace

SIZES: dict[str, Any] = {"vocab_size": 40, "context": 20, "start_id": 1, "hidden": 18, "embedding": 12, "maxout": 10}
KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "current": {"readout": "current", "alignment": 7},
    "fixed": {"fixed_context": True},
    "printed": {"bias": False, "target_vocab_size": 33},
    "shared": {"share_embeddings": True, "fixed_context": True, "readout": "current"},
}
LENGTHS = [7, 3, 1, 5, 6]


def build(kind: str = "paper", std: float = 0.4, **options: Any) -> RNNSearch:
    """A model whose weights are large enough for every nonlinearity to matter, biases and v_a among them."""
    torch.manual_seed(0)
    model = RNNSearch(RNNSearchConfig(**SIZES | KINDS[kind] | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def make_batch(targets: int = 6, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor((LENGTHS * (rows // 5 + 1))[:rows])

    def tokens(count: int) -> Tensor:
        return torch.randint(3, 33, (rows, count), generator=generator)

    batch = {"src": tokens(7), "tgt_input": tokens(targets), "tgt_output": tokens(targets)}
    batch["src_mask"] = torch.arange(7) < lengths.unsqueeze(1)
    batch["tgt_output"][1, 3:] = IGNORE
    return batch


def near(ours: Tensor, expected: Tensor, scale: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=scale * max(1.0, float(expected.detach().abs().max())), rtol=0)


# What the paper prints


def test_the_papers_initial_weights() -> None:
    """Appendix B.1; the deviations are standard deviations."""
    torch.manual_seed(0)
    model = RNNSearch(RNNSearchConfig(**SIZES | {"hidden": 64, "embedding": 50, "maxout": 40, "vocab_size": 400}))
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("U", "U_z", "U_r"):
            near(parameter @ parameter.t(), torch.eye(64))
        elif leaf in ("v_a", "bias", "b", "b_z", "b_r", "b_a", "b_o"):
            assert not parameter.any(), name
        else:
            std = 0.001 if leaf in ("W_a", "U_a") else 0.01
            assert 0.94 * std < float(parameter.detach().std()) < 1.06 * std, name
            assert abs(float(parameter.detach().mean())) < 5 * std * parameter.numel() ** -0.5, name
    orthogonal = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("U", "U_z", "U_r")]
    assert len(orthogonal) == 9  # three units, three matrices each


def test_scaled_weights_follow_their_inputs() -> None:
    torch.manual_seed(0)
    model = RNNSearch(RNNSearchConfig(**SIZES | {"hidden": 64, "embedding": 50, "initialisation": "scaled"}))
    assert 0.9 < float(model.src_embed.weight.detach().std()) * 10 < 1.1
    for weight in (model.attention.W_a, model.decoder_unit.C_z, model.forward_unit.W, model.readout.V_o):
        assert 0.9 < float(weight.detach().std()) * (3 * weight.shape[1]) ** 0.5 < 1.1
    near(model.backward_unit.U @ model.backward_unit.U.t(), torch.eye(64))
    assert model.attention.v_a.any()
    assert not model.decoder_unit.b.any()


def test_an_open_update_gate_takes_the_candidate_and_a_closed_one_keeps_the_state() -> None:
    torch.manual_seed(0)
    unit = GatedUnit(4, 3)
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    y, s = torch.randn(2, 4), torch.randn(2, 3)
    with torch.no_grad():
        unit.b_z.fill_(-1e4)
        assert torch.equal(unit(y, s), s)
        unit.b_z.fill_(1e4)
        r = torch.sigmoid(y @ unit.W_r.t() + s @ unit.U_r.t() + unit.b_r)
        near(unit(y, s), torch.tanh(y @ unit.W.t() + (r * s) @ unit.U.t() + unit.b))


def test_the_reset_gate_stands_before_the_product() -> None:
    """torch's GRU, given the same weights, resets after it: another number, unless the gate does not differ by row."""
    torch.manual_seed(0)
    unit, gru = GatedUnit(4, 3), torch.nn.GRUCell(4, 3)
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        gru.weight_ih.copy_(torch.cat((unit.W_r, -unit.W_z, unit.W)))  # its z is our 1 - z
        gru.weight_hh.copy_(torch.cat((unit.U_r, -unit.U_z, unit.U)))
        gru.bias_ih.copy_(torch.cat((unit.b_r, -unit.b_z, unit.b)))
        gru.bias_hh.zero_()
        y, s = torch.randn(2, 4), torch.randn(2, 3)
        assert (unit(y, s) - gru(y, s)).abs().max() > 0.01
        for both in (unit.W_r, unit.U_r):
            both.zero_()
        unit.b_r.fill_(0.3)
        gru.weight_ih[:3], gru.weight_hh[:3], gru.bias_ih[:3] = 0, 0, 0.3
        near(unit(y, s), gru(y, s))


@torch.no_grad()
def test_annotations_and_the_first_state() -> None:
    """h_j = [forward_j ; backward_j]; s_0 = tanh(W_s backward_1), where backward_1 has read the first word last."""
    model, batch = build(), make_batch()
    annotations, s = model.encode(batch["src"], batch["src_mask"])
    for row, length in enumerate(LENGTHS):
        words = model.src_embed(batch["src"][row, :length])
        h = torch.zeros(1, 18)
        for j in range(length):
            h = model.forward_unit(words[j : j + 1], h)
            near(annotations[row, j, :18], h[0])
        h = torch.zeros(1, 18)
        for j in reversed(range(length)):
            h = model.backward_unit(words[j : j + 1], h)
            near(annotations[row, j, 18:], h[0])
        near(s[row], torch.tanh(model.initial(h))[0])
        assert not annotations[row, length:].any()


@torch.no_grad()
def test_the_alignment_asks_the_state_before() -> None:
    """e_ij is made of s_{i-1}: the first row of a fresh state depends on s_0 alone, whatever the token is."""
    model, batch = build(), make_batch()
    state = model.start(batch["src"], batch["src_mask"])
    maps = []
    for token in (5, 6):
        record = AttentionTrace()
        model.step(torch.full((5, 1), token), state, record)
        maps.append((record.cross[0], record.energies[0]))
    assert torch.equal(maps[0][0], maps[1][0])
    attention: AdditiveAttention = model.attention
    context, weights, energies = attention(state.s, state.projected, state.annotations, state.mask)
    near(maps[0][0][:, 0, 0], weights)
    near(maps[0][1][:, 0, 0][state.mask], energies[state.mask])
    near(context, torch.einsum("bs,bsn->bn", weights, state.annotations))
    assert torch.isneginf(maps[0][1][:, 0, 0][~state.mask]).all()


@torch.no_grad()
def test_the_fixed_context_is_the_last_forward_state() -> None:
    model, batch = build("fixed"), make_batch()
    memory, _ = model.encode(batch["src"], batch["src_mask"])
    aligned = RNNSearch(RNNSearchConfig(**SIZES))
    aligned.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("src", "forw", "back", "init"))}, strict=False
    )
    annotations, _ = aligned.encode(batch["src"], batch["src_mask"])
    assert memory.shape == (5, 1, 18)
    for row, length in enumerate(LENGTHS):
        near(memory[row, 0], annotations[row, length - 1, :18])
    assert not any(name.startswith("attention") for name, _ in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["paper", "current"])
def test_which_state_the_output_reads(kind: str) -> None:
    """With U_o alone, the first output is made of s_0 as the appendix prints it, of s_1 as equation 4 has it."""
    model, batch = build(kind), make_batch(targets=1)
    for part in (model.readout.V_o, model.readout.C_o, model.readout.b_o):
        part.zero_()
    state = model.start(batch["src"], batch["src_mask"])
    logits, after = model.step(batch["tgt_input"], state)
    pairs = ((state.s if kind == "paper" else after.s) @ model.readout.U_o.t()).unflatten(-1, (10, 2))
    near(logits[:, 0], pairs.amax(dim=-1) @ model.lm_head.weight.t())  # rows 2j - 1 and 2j are a pair


# What runs is what is printed


@pytest.mark.parametrize("rows", [5, 20])  # from 16 rows on, products go another way
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_fast_path_has_the_printed_value_and_gradients(kind: str, rows: int) -> None:
    model, batch = build(kind), make_batch(rows=rows)
    loss = model(batch)
    loss.total.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.printed(batch["src"], batch["src_mask"], batch["tgt_input"])
    printed = F.cross_entropy(logits.flatten(0, 1), batch["tgt_output"].flatten(), ignore_index=IGNORE, reduction="sum")
    printed.backward()
    assert int(loss.targets) == 6 * rows - 3
    near(loss.total, printed)
    assert torch.equal(loss.nll, loss.total.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        near(ours[name], parameter.grad, 2e-5)


def test_label_smoothing_moves_the_objective_and_not_the_likelihood() -> None:
    model, batch = build(), make_batch()
    plain, smooth = model(batch), model(batch, smoothing=0.1)
    near(smooth.nll, plain.nll)
    assert float(smooth.total) != float(plain.total)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_steps_are_what_is_printed(kind: str) -> None:
    model, batch = build(kind), make_batch()
    printed = model.printed(batch["src"], batch["src_mask"], batch["tgt_input"])
    state = model.start(batch["src"], batch["src_mask"])
    assert state.first.tolist() == [1] * 5
    whole, _ = model.step(batch["tgt_input"], state)
    near(whole, printed)
    for i in range(6):
        logits, state = model.step(batch["tgt_input"][:, i : i + 1], state)
        near(logits[:, 0], printed[:, i])


def test_bfloat16_is_near_and_its_backward_may_stand_inside_autocast() -> None:
    model, batch = build(std=0.1), make_batch(rows=20)
    model(batch).total.backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = model(batch).total
            if inside:
                total.backward()
        if not inside:
            total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            near(parameter.grad, exact[name], 0.1)


def test_dropout_is_for_training() -> None:
    model, batch = build(dropout=0.5), make_batch()
    assert torch.equal(model(batch).total, model(batch).total)
    model.train()
    torch.manual_seed(3)
    assert not torch.equal(model(batch).total, model(batch).total)


# The interface


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, batch = build(), make_batch()
    together = model.printed(batch["src"], batch["src_mask"], batch["tgt_input"])
    state = model.start(batch["src"], batch["src_mask"])
    forced, _ = model.step(batch["tgt_input"], state)
    for row, length in enumerate(LENGTHS):
        alone = model.start(batch["src"][row : row + 1, :length])
        near(model.step(batch["tgt_input"][row : row + 1], alone)[0][0], forced[row])
        near(together[row], forced[row])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["paper", "fixed"])
def test_rows_are_selected_and_joined(kind: str) -> None:
    model, batch = build(kind), make_batch()
    whole = model.start(batch["src"], batch["src_mask"])
    logits, whole = model.step(batch["tgt_input"][:, :2], whole)
    parts = []
    for row, length in enumerate(LENGTHS):
        state = model.start(batch["src"][row : row + 1, :length])
        parts.append(model.step(batch["tgt_input"][row : row + 1, :2], state)[1])
    index = torch.tensor([4, 0, 0, 2, 3])
    joined = type(whole).join(parts).select(index)
    expected, _ = model.step(batch["tgt_input"][index, 2:3], whole.select(index))
    near(model.step(batch["tgt_input"][index, 2:3], joined)[0], expected)
    assert logits.shape == (5, 2, 40)
    assert joined.read.tolist() == [2] * 5


@torch.no_grad()
def test_recording_changes_nothing_and_keeps_distributions() -> None:
    model, batch = build(), make_batch()
    state = model.start(batch["src"], batch["src_mask"])
    plain, _ = model.step(batch["tgt_input"], state)
    record = AttentionTrace()
    recorded, _ = model.step(batch["tgt_input"], model.start(batch["src"], batch["src_mask"], record), record)
    assert torch.equal(plain, recorded)
    weights, energies = record.cross[0], record.energies[0]
    assert weights.shape == energies.shape == (5, 1, 6, 7)
    near(weights.sum(dim=-1), torch.ones(5, 1, 6))
    near(energies.softmax(dim=-1), weights)
    assert not weights[:, 0].transpose(1, 2)[~batch["src_mask"]].any()


@torch.no_grad()
def test_what_does_not_fit_is_said() -> None:
    model = build()
    assert model.room(20) == 20
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=rf"the source has {wrong} tokens; this model reads 1 to 20\."):
            model.room(wrong)
    with pytest.raises(ValueError, match="the source has 0 tokens"):
        model.start(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True, True, True], [False, False, False]]))
    state = model.start(torch.full((1, 3), 5))
    _, state = model.step(torch.full((1, 20), 5), state)
    with pytest.raises(ValueError, match="a target would have 21 tokens; the model's context is 20"):
        model.step(torch.full((1, 1), 5), state)


@torch.no_grad()
def test_a_state_may_have_no_rows_left() -> None:
    model, batch = build(), make_batch()
    state = model.start(batch["src"], batch["src_mask"]).select(torch.zeros(0, dtype=torch.int64))
    logits, state = model.step(torch.zeros(0, 1, dtype=torch.int64), state)
    assert logits.shape == (0, 1, 40)
    assert len(state.s) == 0


@pytest.mark.parametrize("targets", [4, 9])  # fewer and more than source tokens: contexts or annotations are mapped
def test_evaluation_has_the_loss_of_training(targets: int) -> None:
    model, batch = build(), make_batch(targets)
    with torch.no_grad():
        evaluated = model(batch)
    trained = model(batch)
    near(evaluated.total, trained.total.detach())
    assert int(evaluated.targets) == int(trained.targets)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["paper", "fixed"])
def test_a_folder_may_be_served_in_bfloat16(kind: str) -> None:
    model, batch = build(kind, std=0.1), make_batch()
    expected, _ = model.step(batch["tgt_input"][:, :1], model.start(batch["src"], batch["src_mask"]))
    model = model.to(torch.bfloat16)
    logits, state = model.step(batch["tgt_input"][:, :1], model.start(batch["src"], batch["src_mask"]))
    near(logits.float(), expected, 0.05)
    assert torch.isfinite(model.step(batch["tgt_input"][:, 1:], state)[0]).all()
    assert torch.isfinite(model(batch).total)
