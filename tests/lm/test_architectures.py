"""What all three architectures must have in common: the decoding interface, and what it promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm.architectures import ARCHITECTURES, make_config, make_model
from lm.config import ConfigError
from lm.convert import main as convert
from lm.loss import IGNORE
from lm.pretrained import FolderError, load, read_config, save
from lm.search import pad
from lm.trace import AttentionTrace

VOCABULARY, CONTEXT = 40, 48
BOS, EOS = 1, 2
SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "context": CONTEXT}
SMALL: dict[str, Any] = {"width": 32, "heads": 4}
STACKS: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "mlp_width": 48, "start_id": BOS}
RECURRENT: dict[str, Any] = {"hidden": 24, "embedding": 20, "maxout": 12, "start_id": BOS}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder", {"layers": 2, **SMALL}),
    "decoder-windows": ("decoder", {"layers": 2, **SMALL, "window": 4, "window_pattern": "SL", "kv_heads": 2}),
    "decoder-prefix": ("decoder", {"layers": 2, **SMALL, "prefix": True}),
    "decoder-prefix-learned": (
        "decoder",
        {"layers": 2, **SMALL, "prefix": True, "positions": "learned", "norm": "layer", "activation": "gelu"},
    ),
    "transformer": ("transformer", {**SMALL, **STACKS}),
    "transformer-pre": (
        "transformer",
        {**SMALL, **STACKS, "norm": "pre", "positions": "learned", "tie_embeddings": "none", "activation": "gelu"},
    ),
    "transformer-odd": (
        "transformer",
        {**SMALL, **STACKS, "positions": "none", "tie_embeddings": "target", "key_dim": 6, "value_dim": 10}
        | {"bias": False, "encoder_layers": 1, "decoder_layers": 3},
    ),
    "rnnsearch": ("rnnsearch", RECURRENT),
    "rnnencdec": ("rnnsearch", {**RECURRENT, "fixed_context": True}),
}
PAIRS = [([5, 6, 7, 8, 9], [10, 11, 12]), ([13, 14], [15, 16, 17, 18, 19, 20, 21]), ([22], [23]), ([4, 4, 5], [30, 31])]


def build(shape: str, seed: int = 0) -> Any:
    """A model in eval mode whose norms and biases are no ones and zeros, so that leaving one out would show."""
    architecture, options = SHAPES[shape]
    torch.manual_seed(seed)
    model = make_model(make_config(architecture, SHARED | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=sorted(SHAPES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def source(model: Any, ids: Sequence[int]) -> list[int]:
    """What the tokenizer makes of a sentence for this architecture."""
    return [*ids, EOS] if model.encoder_decoder else [*ids, BOS]


def sources(model: Any, pairs: Sequence[tuple[list[int], list[int]]] = PAIRS) -> tuple[Tensor, Tensor]:
    return pad([source(model, src) for src, _ in pairs])


def batch_of(model: Any, pairs: Sequence[tuple[list[int], list[int]]] = PAIRS) -> dict[str, Tensor]:
    src, src_mask = sources(model, pairs)
    tgt_input = pad([[BOS, *tgt] for _, tgt in pairs])[0]
    tgt_output, real = pad([[*tgt, EOS] for _, tgt in pairs])
    return {
        "src": src,
        "src_mask": src_mask,
        "tgt_input": tgt_input,
        "tgt_output": tgt_output.masked_fill(~real, IGNORE),
    }


def stepwise(model: Any, state: Any, tokens: Tensor, record: AttentionTrace | None = None) -> Tensor:
    """Logits [B, T, V] of forced tokens int64 [B, T], one at a time."""
    logits = []
    for t in range(tokens.shape[1]):
        out, state = model.step(tokens[:, t : t + 1], state, record=record)
        logits.append(out)
    return torch.cat(logits, dim=1)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over each row, [B]."""
    picked = -logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return picked.masked_fill(targets == IGNORE, 0).sum(dim=1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------ causality, and one sentence, however it is computed


@torch.no_grad()
def test_a_changed_target_token_leaves_earlier_outputs_the_same_to_the_bit(model: Any) -> None:
    src, mask = sources(model)
    tokens = torch.randint(3, VOCABULARY, (len(src), 9), generator=torch.Generator().manual_seed(2))
    before, _ = model.step(tokens, model.start(src, mask))
    for place in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        after, _ = model.step(changed, model.start(src, mask))
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place], after[:, place])


@torch.no_grad()
def test_teacher_forcing_is_decoding_step_by_step(model: Any) -> None:
    batch = batch_of(model)
    state = model.start(batch["src"], batch["src_mask"])
    assert state.first.tolist() == [BOS] * len(PAIRS)
    logits = stepwise(model, state, batch["tgt_input"])
    loss = model(batch)
    assert int(loss.targets) == sum(len(tgt) + 1 for _, tgt in PAIRS)
    close(loss.total, nll(logits, batch["tgt_output"]).sum())
    assert torch.equal(loss.nll, loss.total)
    # Several tokens at once are the same as well.
    close(model.step(batch["tgt_input"], model.start(batch["src"], batch["src_mask"]))[0], logits)


@torch.no_grad()
def test_label_smoothing_mixes_in_an_even_target(model: Any) -> None:
    batch = batch_of(model)
    logits = stepwise(model, model.start(batch["src"], batch["src_mask"]), batch["tgt_input"])
    asked = batch["tgt_output"] != IGNORE
    even = -logits.log_softmax(dim=-1).mean(dim=-1)[asked].sum()
    plain = nll(logits, batch["tgt_output"]).sum()
    loss = model(batch, smoothing=0.1)
    close(loss.total, 0.9 * plain + 0.1 * even)
    close(loss.nll, plain)


@torch.no_grad()
def test_a_sentence_alone_is_the_same_beside_others(model: Any) -> None:
    batch = batch_of(model)
    together = stepwise(model, model.start(batch["src"], batch["src_mask"]), batch["tgt_input"])
    total = model(batch).total
    alone = []
    for row, pair in enumerate(PAIRS):
        one = batch_of(model, [pair])
        alone.append(model(one).total)
        length = len(pair[1]) + 1
        logits = stepwise(model, model.start(one["src"], one["src_mask"]), one["tgt_input"])
        close(logits[0], together[row, :length])
    close(sum(alone), total)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model: Any) -> None:
    batch = batch_of(model)
    other = dict(batch)
    other["src"] = batch["src"].masked_fill(~batch["src_mask"], 33)
    other["tgt_input"] = torch.where(batch["tgt_output"] == IGNORE, 34, batch["tgt_input"])
    assert torch.equal(model(batch).total, model(other).total)
    first, second = (model.start(b["src"], b["src_mask"]) for b in (batch, other))
    tokens = batch["tgt_input"][:, :3]
    close(stepwise(model, first, tokens), stepwise(model, second, tokens))


def test_gradients_do_not_depend_on_how_sentences_are_batched(model: Any) -> None:
    model(batch_of(model)).total.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for pair in PAIRS:
        model(batch_of(model, [pair])).total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(together)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, together[name], rtol=1e-3, atol=1e-4, msg=name)


# ------------------------------------------------------------ states: rows that are selected and joined


MODEL = cache(build)  # none of the tests that use it changes it


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_rows_go_where_they_are_told(shape: str, data: st.DataObject) -> None:
    """Every tensor of a state obeys select and join: forced tokens after any of it score as they do alone."""
    model = MODEL(shape)
    source_ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=6)
    tokens = st.integers(3, VOCABULARY - 1)
    rows: list[tuple[list[int], list[int]]] = []  # what each row has read
    state = None
    with torch.no_grad():
        for _ in range(data.draw(st.integers(1, 4), label="turns")):
            if state is None or data.draw(st.booleans(), label="join"):
                new = data.draw(st.lists(source_ids, min_size=1, max_size=3), label="sources")
                begun = model.start(*pad([source(model, ids) for ids in new]))
                state = begun if state is None else type(state).join([state, begun])
                rows += [(ids, []) for ids in new]
            if data.draw(st.booleans(), label="step"):
                written = data.draw(st.lists(tokens, min_size=len(rows), max_size=len(rows)), label="tokens")
                _, state = model.step(torch.tensor(written).unsqueeze(1), state)
                rows = [(ids, [*before, token]) for (ids, before), token in zip(rows, written, strict=True)]
            index = data.draw(
                st.one_of(
                    st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6),
                    st.sampled_from([[r for r in range(len(rows)) for _ in range(k)] for k in (1, 2, 3)]),
                ),
                label="index",
            )
            state = state.select(torch.tensor(index, dtype=torch.int64))
            rows = [rows[r] for r in index]
        last = torch.full((len(rows), 1), 7)
        found, _ = model.step(last, state)
        for row, (ids, before) in enumerate(rows):
            alone = model.start(*pad([source(model, ids)]))
            wanted = stepwise(model, alone, torch.tensor([[*before, 7]]))
            close(found[row, -1], wanted[0, -1])


def test_a_state_of_no_rows_can_be_made(model: Any) -> None:
    with torch.no_grad():
        state = model.start(*sources(model))
        assert len(state.select(torch.zeros(0, dtype=torch.int64)).first) == 0


@torch.no_grad()
def test_a_state_that_was_selected_is_independent(model: Any) -> None:
    """Two continuations of one state do not write into each other."""
    state = model.start(*sources(model))
    _, state = model.step(state.first.unsqueeze(1), state)
    every = torch.arange(len(PAIRS))
    one, other = state.select(every), state.select(every)
    tokens = torch.full((len(PAIRS), 1), 9)
    wanted, one = model.step(tokens, one)
    model.step(tokens + 1, other)
    follow = torch.full((len(PAIRS), 1), 11)
    first, _ = model.step(follow, one)
    again = model.start(*sources(model))
    exact = stepwise(model, again, torch.cat((torch.full((len(PAIRS), 1), BOS), tokens, follow), dim=1))
    close(wanted[:, 0], exact[:, 1])
    close(first[:, 0], exact[:, 2])


# ------------------------------------------------------------ the record


@torch.no_grad()
def test_recording_changes_nothing_and_holds_distributions(model: Any) -> None:
    batch = batch_of(model)
    plain = stepwise(model, model.start(batch["src"], batch["src_mask"]), batch["tgt_input"])
    record = AttentionTrace()
    state = model.start(batch["src"], batch["src_mask"], record=record)
    recorded = stepwise(model, state, batch["tgt_input"], record)
    close(recorded, plain)
    assert bool((recorded.argmax(-1) == plain.argmax(-1)).all())
    if getattr(model.config, "fixed_context", False):
        return  # nothing is aligned
    steps = batch["tgt_input"].shape[1]
    for row, (src, _) in enumerate(PAIRS):
        maps = record.row(row)
        read = len(source(model, src))
        assert maps.kinds, "something is recorded"
        for kind in maps.kinds:
            for weights in maps.of(kind).values():
                torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
                queries, keys = weights.shape[-2:]
                wanted = {
                    "encoder": (read, read),
                    "cross": (steps, read),
                    "decoder": (steps, steps) if model.encoder_decoder else (read - 1 + steps, read - 1 + steps),
                }[kind]
                assert (queries, keys) == wanted
                if kind == "decoder":
                    prefix = read - 1 if getattr(model.config, "prefix", False) else 0
                    later = torch.ones(queries, keys).triu(1).bool()
                    later[:, :prefix] = False
                    assert float(weights[:, later].abs().sum()) == 0
                    if prefix > 1:
                        assert float(weights[:, 0, 1:prefix].min()) > 0


@torch.no_grad()
def test_the_record_follows_the_rows(model: Any) -> None:
    if getattr(model.config, "fixed_context", False):
        return
    record = AttentionTrace()
    state = model.start(*sources(model), record=record)
    _, state = model.step(state.first.unsqueeze(1), state, record=record)
    before = [record.row(row) for row in range(len(PAIRS))]
    index = torch.tensor([2, 0, 0, 3, 3])
    state = state.select(index)
    record.select(index)
    model.step(torch.full((5, 1), 8), state, record=record)
    for row, was in enumerate(index.tolist()):
        now = record.row(row)
        for kind in now.kinds:
            for layer, weights in now.of(kind).items():
                old = before[was].of(kind)[layer]
                assert torch.equal(weights[:, : old.shape[1], : old.shape[2]], old)


@torch.no_grad()
def test_only_the_layers_that_are_wanted_leave_the_fused_path(model: Any) -> None:
    record = AttentionTrace(layers=[])
    state = model.start(*sources(model), record=record)
    _, state = model.step(state.first.unsqueeze(1), state, record=record)
    assert record.used == 0


# ------------------------------------------------------------ room


def test_room_is_what_can_be_decoded(model: Any) -> None:
    longest = CONTEXT if model.encoder_decoder else CONTEXT - 1
    for length in (1, 5, longest):
        room = model.room(length)
        assert room == (CONTEXT if model.encoder_decoder else CONTEXT - length)
        with torch.no_grad():
            state = model.start(torch.full((1, length), 5))
            _, state = model.step(torch.full((1, room), 6), state)
            with pytest.raises(ValueError, match=rf"the model's context is {CONTEXT}\."):
                model.step(torch.full((1, 2), 6), state)
    for length in (0, longest + 1):
        with pytest.raises(ValueError, match=r"^[^\n]+\.$"):
            model.room(length)


# ------------------------------------------------------------ folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_folder_gives_the_same_model_to_the_bit(model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    save(model, tmp_path / "m", dtype=dtype)
    again = load(tmp_path / "m")
    assert again.config == model.config == read_config(tmp_path / "m")
    assert not again.training
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert theirs.dtype == dtype
        assert torch.equal(ours.to(dtype), theirs)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    if dtype == torch.float32:
        batch = batch_of(model)
        with torch.no_grad():
            assert torch.equal(model(batch).total, again(batch).total)


def test_a_folder_says_what_it_is(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    kind = ARCHITECTURES[model.config.architecture]
    if model.encoder_decoder or model.config.prefix:
        assert (raw["architectures"], raw["model_type"]) == ([kind.folder], kind.model_type)
    if model.encoder_decoder:
        assert raw["decoder_start_token_id"] == BOS
        assert raw["is_encoder_decoder"] is True
    else:
        assert raw.get("prefix", False) == model.config.prefix


ENCODER_DECODERS = sorted(name for name, (kind, _) in SHAPES.items() if kind != "decoder")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1."),
    ({"dropout": 2}, "dropout is 2; it must be at least 0 and below 1."),
    ({"dropout": "much"}, "dropout is 'much'; it must be float."),
    ({"decoder_start_token_id": 99}, "start_id is 99; it must be a t"),
    ({"decoder_start_token_id": None}, "start_id is None; it must be int."),
    ({"is_encoder_decoder": False}, "is_encoder_decoder is False; of a Heed"),
    ({"context": 12}, "max_position_embeddings is 48 and context 12; they must be the same."),
    ({"vocab_size": 41}, "the config asks for (41, "),
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16."),
]


@pytest.mark.parametrize(
    ("change", "sentence"), WRONG, ids=[next(iter(change)) + str(i) for i, (change, _) in enumerate(WRONG)]
)
@pytest.mark.parametrize("shape", ["transformer", "rnnsearch"])
def test_a_broken_folder_is_one_sentence(shape: str, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save(build(shape), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FolderError) as caught:
        load(tmp_path / "m")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "context", "decoder_start_token_id"])
@pytest.mark.parametrize("shape", ["transformer", "rnnsearch"])
def test_a_missing_key_is_named(shape: str, key: str, tmp_path: Path) -> None:
    save(build(shape), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    raw = json.loads(file.read_text())
    del raw[key]
    if key == "context":
        del raw["max_position_embeddings"]
    file.write_text(json.dumps(raw))
    with pytest.raises(FolderError, match=f"the key {key} is missing; a Heed"):
        load(tmp_path / "m")


def test_a_huge_shape_costs_nothing(tmp_path: Path) -> None:
    for shape, change in (("transformer", {"mlp_width": 2**40}), ("rnnsearch", {"hidden": 2**30, "alignment": 2**30})):
        save(build(shape), tmp_path / shape)
        file = tmp_path / shape / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(FolderError, match="the config asks for"):
            load(tmp_path / shape)


@pytest.mark.parametrize("shape", ["decoder-prefix", "rnnsearch", "transformer"])
def test_gguf_holds_none_of_ours(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(build(shape), tmp_path / "m")
    assert convert([str(tmp_path / "m"), str(tmp_path / "m.gguf")]) == 2
    said = capsys.readouterr().err
    folder = ARCHITECTURES[SHAPES[shape][0]].folder
    assert said.startswith(f"The model is a {folder}; what can be written as GGUF are LlamaForCausalLM, ")
    assert said.count("\n") == 1
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("shape", ["decoder-prefix", "rnnsearch", "transformer"])
def test_a_folder_is_converted_to_another_dtype(shape: str, tmp_path: Path) -> None:
    model = build(shape)
    save(model, tmp_path / "m")
    assert convert([str(tmp_path / "m"), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    assert load(tmp_path / "half").config == model.config


def test_a_caller_can_insist_on_an_architecture(tmp_path: Path) -> None:
    for shape in ("decoder", "rnnsearch", "transformer"):
        save(build(shape), tmp_path / shape)
    for read in (load, read_config):
        read(tmp_path / "decoder", only="decoder")
        for shape, title in (("rnnsearch", "a recurrent encoder-decoder"), ("transformer", "an encoder-decoder")):
            folder = ARCHITECTURES[shape].folder
            with pytest.raises(FolderError) as caught:
                read(tmp_path / shape, only="decoder")
            sentence = f"{tmp_path / shape} is a {folder}, {title}; it must be a decoder-only model."
            assert str(caught.value) == sentence
        with pytest.raises(FolderError, match=r"a decoder-only model; it must be an encoder-decoder\.$"):
            read(tmp_path / "decoder", only="transformer")


# ------------------------------------------------------------ configs


def test_parameters_by_arithmetic_are_the_models(model: Any) -> None:
    assert model.config.parameters()["total"] == sum(p.numel() for p in model.parameters())


def test_more_of_anything_costs_more(model: Any) -> None:
    config = model.config
    if model.encoder_decoder:
        assert 0 < config.flops_per_token(10, 10) < config.flops_per_token(20, 10)
        assert config.flops_per_token() == config.flops_per_token(CONTEXT, CONTEXT)
    else:
        assert 0 < config.flops_per_token(10) <= config.flops_per_token(20)
    assert config.parameters()["total"] > 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_config_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(architecture, {"vocab_size": 10, "widht": 3})
    problems = caught.value.problems
    assert problems[0].startswith(f"widht is not a key of a {architecture}; the keys are ")
    assert f"context is missing; a {architecture} needs it." in problems
    with pytest.raises(ConfigError, match="architecture is 'perceptron'; it must be one of decoder, transformer, rnn"):
        make_config("perceptron", {})


def test_a_config_goes_through_its_dictionary(model: Any) -> None:
    assert make_config(model.config.architecture, asdict(model.config)) == model.config
