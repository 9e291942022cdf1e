"""The attention record: what is kept, how rows are selected, how a sentence is cut out of it, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.trace import AttentionTrace, Maps


def weights(rows: int, heads: int, q: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, heads, q, k, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_queries_are_appended_and_earlier_rows_padded_on_the_right() -> None:
    trace = AttentionTrace()
    steps = [weights(2, 3, 1, width, seed=width) for width in (1, 2, 3)]
    for step in steps:
        trace.add("decoder", 0, step)
    whole = trace.decoder[0]
    assert whole.shape == (2, 3, 3, 3)
    for i, step in enumerate(steps):
        assert torch.equal(whole[:, :, i, : i + 1], step[:, :, 0])
        assert not whole[:, :, i, i + 1 :].any()


@given(st.data())
def test_selecting_the_record_is_selecting_what_was_and_will_be_recorded(data: st.DataObject) -> None:
    """Whatever is selected between steps, the record is the one whose every chunk had been indexed by hand."""
    rows = data.draw(st.integers(1, 3))
    trace = AttentionTrace()
    encoder = weights(rows, 2, 4, 4)
    trace.add("encoder", 1, encoder)
    steps: list[torch.Tensor] = []
    for number in range(data.draw(st.integers(1, 4))):
        steps.append(weights(rows, 2, 1, 4, seed=number))
        trace.add("cross", 1, steps[-1], energies=steps[-1].log())
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        trace.select(index)
        encoder, steps, rows = encoder[index], [step[index] for step in steps], len(index)
    assert torch.equal(trace.encoder[1], encoder)
    assert torch.equal(trace.cross[1], torch.cat(steps, dim=2))
    assert torch.allclose(trace.energies[1].softmax(-1), trace.cross[1])
    assert torch.equal(trace.row(rows - 1).cross[1], trace.cross[1][rows - 1])


def test_a_row_is_cut_to_its_own_queries_and_keys() -> None:
    """Prompts of 3 and 1 tokens in one batch, then a step: padding is in neither sentence."""
    trace = AttentionTrace()
    real = torch.tensor([[True, True, True], [True, False, False]])
    prompt = weights(2, 1, 3, 3)
    trace.add("decoder", 0, prompt, queries=real, keys=real)
    step = weights(2, 1, 1, 4)
    trace.add("decoder", 0, step, keys=torch.tensor([[True] * 4, [True, True, False, False]]))
    first, second = trace.row(0).decoder[0], trace.row(1).decoder[0]
    assert first.shape == (1, 4, 4)
    assert second.shape == (1, 2, 2)
    assert second[0, 0].tolist() == [prompt[1, 0, 0, 0].item(), prompt[1, 0, 0, 1].item()]
    assert torch.equal(second[0, 1], step[1, 0, 0, :2])


def test_what_is_recorded_is_a_copy_without_a_graph() -> None:
    trace = AttentionTrace()
    given = torch.rand(1, 1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    trace.add("cross", 0, given)
    with torch.no_grad():
        before = given.float().clone()
        given.zero_()
    kept = trace.cross[0]
    assert torch.equal(kept, before)
    assert (kept.dtype, kept.requires_grad, trace.energies) == (torch.float32, False, {})


def test_only_what_is_wanted_is_kept() -> None:
    trace = AttentionTrace(kinds=["cross"], layers=[1], heads=[2, 0])
    assert trace.wants("cross", 1)
    assert not trace.wants("cross", 0)
    assert not trace.wants("encoder", 1)
    full = weights(1, 3, 2, 2)
    for kind in ("encoder", "cross"):
        for layer in (0, 1):
            trace.add(kind, layer, full)
    assert (trace.encoder, list(trace.cross)) == ({}, [1])
    assert torch.equal(trace.cross[1], full[:, [0, 2]])
    assert trace.offered == {"encoder": {0, 1}, "cross": {0, 1}}
    assert trace.row(0).head_numbers("cross") == [0, 2]


def test_the_bounds_are_sentences() -> None:
    with pytest.raises(ValueError, match=r"more than 7 weights; record fewer layers or heads"):
        AttentionTrace(cells=7).add("cross", 0, weights(1, 2, 2, 2))
    with pytest.raises(ValueError, match="head 5 is asked for; cross layer 0 has heads 0 to 1, counted from 0"):
        AttentionTrace(heads=[5]).add("cross", 0, weights(1, 2, 2, 2))
    with pytest.raises(ValueError, match="head 1 is asked for; cross layer 0 has one head, 0"):
        AttentionTrace(heads=[1]).add("cross", 0, weights(1, 1, 2, 2))
    with pytest.raises(ValueError, match="'self' is not a kind of attention; the kinds are encoder, decoder, cross"):
        AttentionTrace(kinds=["self"])
    trace = AttentionTrace()
    trace.add("cross", 0, weights(2, 1, 1, 2))
    with pytest.raises(ValueError, match="cross layer 0 has 3 rows; the record has 2"):
        trace.add("cross", 0, weights(3, 1, 1, 2))


def test_a_record_is_read_as_it_was_saved(tmp_path: Path) -> None:
    maps = Maps(
        encoder={layer: weights(1, 2, 3, 3, layer)[0] for layer in (0, 10, 2)},
        cross={0: weights(1, 2, 2, 3)[0]},
        energies={0: weights(1, 2, 2, 3)[0]},
        source=["der", "‿Hund", "</s>"],
        inputs=["<s>", "dog"],
        outputs=["dog", "</s>"],
        heads=(1, 3),
    )
    maps.save(tmp_path / "record.safetensors")
    read = Maps.load(tmp_path / "record.safetensors")
    assert list(read.encoder) == [0, 2, 10]
    assert torch.equal(read.encoder[10], maps.encoder[10])
    assert torch.equal(read.energies[0], maps.energies[0])
    assert (read.source, read.inputs, read.outputs, read.heads) == (
        maps.source,
        maps.inputs,
        maps.outputs,
        (1, 3),
    )
    assert read.kinds == ["encoder", "cross"]
    assert read.axes("cross") == (["dog", "</s>"], ["der", "‿Hund", "</s>"])
    (tmp_path / "other.safetensors").write_bytes(b"no record")
    with pytest.raises(ValueError, match="is not an attention record"):
        Maps.load(tmp_path / "other.safetensors")


def test_axes_without_tokens_are_numbered() -> None:
    assert Maps(cross={0: weights(1, 1, 2, 3)[0]}).axes("cross") == (["0", "1"], ["0", "1", "2"])
