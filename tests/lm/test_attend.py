"""Recording over all architectures, and the verb: what is recorded is what decoding did, and decoding never differs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import attend, pretrained
from lm.architectures import make_config, make_model
from lm.beam import BeamParams, beam_search
from lm.params import SamplingParams
from lm.search import stream
from lm.tokenizer import Tokenizer, close_sources, train_translator_bpe
from lm.trace import AttentionTrace, Maps

TEXTS = ("A dog runs over the grass.", "Ein Hund rennt über das Gras.", "Zwei Männer stehen am Herd.")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnnsearch": ("rnnsearch", {"hidden": 16, "embedding": 12, "maxout": 8, "context": 60}),
    "transformer": (
        "transformer",
        {"encoder_layers": 2, "decoder_layers": 3, "width": 16, "heads": 4, "mlp_width": 24, "context": 60},
    ),
    "decoder": ("decoder", {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "context": 90}),
    "prefix": ("decoder", {"layers": 2, "width": 16, "heads": 4, "context": 90, "prefix": True}),
}


@cache
def translator(shape: str) -> tuple[Any, Tokenizer]:
    """A model of random weights, large enough that its attention is no blur, and its tokenizer."""
    architecture, values = SHAPES[shape]
    tokenizer = close_sources(train_translator_bpe(TEXTS, 280), architecture != "decoder")
    if architecture != "decoder":
        values = values | {"start_id": tokenizer.bos_id}
    torch.manual_seed(3)
    model = make_model(make_config(architecture, values | {"vocab_size": tokenizer.vocab_size})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.35 * torch.randn_like(parameter))
    return model, tokenizer


@pytest.fixture(params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


def sources(tokenizer: Tokenizer) -> list[list[int]]:
    """Sentences of unequal lengths, as a model reads them."""
    return [tokenizer.encode(text) for text in (TEXTS[0], "Hund", TEXTS[2][:12])]


def logits(model: Any, source: Sequence[int], target: Sequence[int], record: AttentionTrace | None) -> torch.Tensor:
    """[T, V]: after the first token and each of `target`, given one at a time."""
    given = {} if record is None else {"record": record}
    with torch.inference_mode():
        state = model.start(torch.tensor([source]), **given)
        steps = []
        for token in [int(state.first), *target]:
            out, state = model.step(torch.tensor([[token]]), state, **given)
            steps.append(out[0, -1])
    return torch.stack(steps)


def check_distributions(model: Any, maps: Maps) -> None:
    """Rows sum to 1, nothing later is seen, and energies are what weights are the softmax of."""
    for kind in maps.kinds:
        for weights in maps.of(kind).values():
            assert weights.min() >= 0
            assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
            if kind == "decoder" and not getattr(model.config, "prefix", False):
                assert not weights.triu(1).any()
    for layer, energies in maps.energies.items():
        assert torch.allclose(energies.softmax(-1), maps.cross[layer], atol=1e-6)


def close(first: Maps, second: Maps) -> bool:
    return first.kinds == second.kinds and all(
        a.keys() == b.keys() and all(torch.allclose(a[layer], b[layer], atol=1e-5) for layer in a)
        for a, b in [(first.of(kind), second.of(kind)) for kind in first.kinds] + [(first.energies, second.energies)]
    )


def test_recording_changes_no_output_of_forced_targets(shape: str) -> None:
    model, tokenizer = translator(shape)
    source, target = sources(tokenizer)[0], tokenizer.encode(TEXTS[1], add_special_tokens=False)
    trace = AttentionTrace()
    assert torch.allclose(logits(model, source, target, None), logits(model, source, target, trace), atol=1e-5)
    maps = trace.row(0)
    check_distributions(model, maps)
    rows = {kind: next(iter(maps.of(kind).values())).shape[1:] for kind in maps.kinds}
    n, t = len(source), len(target) + 1
    assert rows == {
        "rnnsearch": {"cross": (t, n)},
        "transformer": {"encoder": (n, n), "decoder": (t, t), "cross": (t, n)},
    }.get(shape, {"decoder": (n - 1 + t, n - 1 + t)})
    assert bool(maps.energies) == (shape == "rnnsearch")


def test_recording_changes_no_output_of_greedy_search(shape: str) -> None:
    model, tokenizer = translator(shape)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    plain = list(stream(model, sources(tokenizer), params, [tokenizer.eos_id]))
    assert list(stream(model, sources(tokenizer), params, [tokenizer.eos_id], record=AttentionTrace())) == plain


@pytest.mark.parametrize("beam", [1, 3])
def test_a_beam_s_record_is_that_of_its_output_given_by_force(shape: str, beam: int) -> None:
    """Whatever was reordered, repeated and dropped on the way, and beside whichever other sentences."""
    model, tokenizer = translator(shape)
    params = BeamParams(beam=beam, n_best=beam, max_tokens=9)
    plain = beam_search(model, sources(tokenizer), params, [tokenizer.eos_id])
    found = beam_search(model, sources(tokenizer), params, [tokenizer.eos_id], record=AttentionTrace())
    for source, hypotheses, without in zip(sources(tokenizer), found, plain, strict=True):
        assert [h.ids for h in hypotheses] == [h.ids for h in without]
        for hypothesis in hypotheses:
            trace = AttentionTrace()
            read = hypothesis.ids if hypothesis.end is not None else hypothesis.ids[:-1]
            logits(model, source, read, trace)
            assert hypothesis.attention is not None
            check_distributions(model, hypothesis.attention)
            assert close(hypothesis.attention, trace.row(0))


def test_only_the_layers_and_heads_asked_for_are_recorded() -> None:
    model, tokenizer = translator("transformer")
    whole, part = AttentionTrace(), AttentionTrace(kinds=["cross"], layers=[1], heads=[2])
    for trace in (whole, part):
        logits(model, sources(tokenizer)[0], [5, 6], trace)
    assert (part.row(0).kinds, list(part.cross)) == (["cross"], [1])
    assert torch.allclose(part.cross[1][:, 0], whole.cross[1][:, 2], atol=1e-5)  # the other layers ran fused


def test_the_axes_name_what_was_read_and_written(shape: str) -> None:
    model, tokenizer = translator(shape)
    maps, output = attend.attention(
        model, tokenizer, "Hund rennt", [tokenizer.eos_id], AttentionTrace(), target="dog runs"
    )
    assert output == "dog runs"
    written = "".join(label.removeprefix("\u203f") for label in (maps.outputs or maps.inputs))
    assert "dogruns" in written
    if model.encoder_decoder:
        assert maps.outputs[-1] == "</s>" == maps.source[-1]
        assert maps.inputs == ["<s>", *maps.outputs[:-1]]
        assert maps.axes("cross") == (maps.outputs, maps.source)
    else:
        assert maps.inputs.count("<s>") == 1
        assert maps.axes("decoder") == (maps.inputs, maps.inputs)


def test_what_is_searched_is_named_too(shape: str) -> None:
    model, tokenizer = translator(shape)
    maps, output = attend.attention(
        model, tokenizer, "Hund", [tokenizer.eos_id], AttentionTrace(), beam=2, max_tokens=6
    )
    assert output is not None
    for kind in maps.kinds:
        queries, keys = maps.axes(kind)
        for weights in maps.of(kind).values():
            assert weights.shape[1:] == (len(queries), len(keys))
        assert queries[:2] != ["0", "1"]


# ---------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(shape) -> a model folder of it."""

    def make(shape: str) -> Path:
        model, tokenizer = translator(shape)
        where = tmp_path_factory.mktemp(shape) / "model"
        pretrained.save(model, where, tokenizer=tokenizer)
        return where

    return cache(make)


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = attend.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_architecture_is_drawn(
    shape: str, folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (folder(shape), "Ein Hund", "--target", "A dog")
    for name, options in {
        "whole.png": (),
        "lines.svg": ("--lines",),
        "word.png": ("--word", 1),
        "page.html": (),
        "numbers.json": (),
        "record.safetensors": (),
    }.items():
        assert run(capsys, *common, *options, "--out", tmp_path / name) == (0, "A dog\n", "")
        assert (tmp_path / name).stat().st_size > 0
    assert min(png_size(tmp_path / "whole.png")) > 100
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    kind = "cross" if shape in ("rnnsearch", "transformer") else "decoder"
    assert sum(numbers[kind]["weights"]["0"]["0"][0]) == pytest.approx(1, abs=1e-4)
    assert ("energies" in numbers[kind]) == (shape == "rnnsearch")
    again = tmp_path / "again.json"
    assert run(capsys, tmp_path / "record.safetensors", "--out", again)[0] == 0
    assert json.loads(again.read_text())[kind] == numbers[kind]


def test_searching_prints_the_output(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(
        capsys, folder("rnnsearch"), "Ein Hund", "--beam", 2, "--max-tokens", 4, "--out", tmp_path / "a.json"
    )
    assert (status, err) == (0, "")
    assert out == json.loads((tmp_path / "a.json").read_text())["output"] + "\n"


def test_a_language_model_reads_a_sentence_as_it_stands(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, tiny_folder, "hear me speak", "--out", tmp_path / "a.json") == (0, "", "")
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert [key for key in numbers if key in ("encoder", "decoder", "cross")] == ["decoder"]
    assert numbers["decoder"]["queries"][0].startswith("h")
    assert numbers["output"] is None
    status, out, _ = run(capsys, tiny_folder, "hear me", "--max-tokens", 3, "--out", tmp_path / "b.json")
    assert (status, bool(out)) == (0, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "a.gif"], "--out is a.gif; its name must end in one of .png, .svg, .html, .json, .safetensors."),
        (["--out", "nowhere/a.png"], "--out is nowhere/a.png; the folder nowhere does not exist."),
        (["--layer", "7"], "--layer is 7; this model's layers are 0 to 2."),
        (["--layer", "-1"], "--layer is -1; layers are counted from 0."),
        (["--head", "4"], "head 4 is asked for; encoder layer 0 has heads 0 to 3, counted from 0."),
        (["--word", "cat"], "--word is cat; the tokens are "),
        (["--energies"], "--energies is given; this model has none"),
        (["--beam", "0"], "beam must be at least 1, got 0."),
        (["--target", "dog " * 99], "the target has "),
        (["--target", "dog", "--beam", "2"], "--beam searches for an output; it cannot be given with --target"),
        (["--energies", "--lines"], "--energies is for a matrix in a picture;"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: list[str],
    sentence: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in options else ["--out", "a.png"]
    limit = [] if {"--beam", "--target"} & set(options) else ["--target", "a dog"]
    status, _, error = run(capsys, folder("transformer"), "Ein Hund", *limit, *options, *out)
    assert status == 2
    assert error.startswith(sentence)
    assert error.count("\n") == 1
    assert list(tmp_path.glob("a.*")) == []


@pytest.mark.parametrize(
    ("sentence", "message"), [("", "the sentence is empty"), (" \n", "the sentence is empty"), ("Hund " * 99, "tokens")]
)
def test_a_sentence_that_cannot_be_read(
    sentence: str,
    message: str,
    shape: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, error = run(capsys, folder(shape), sentence, "--out", tmp_path / "a.png")
    assert (status, error.count("\n")) == (2, 1)
    assert message in error


def test_no_folder_no_kind_no_alignment(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "a.png")
    status, _, error = run(capsys, tmp_path / "none", "Hund", *out)
    assert (status, "is not a folder" in error) == (2, True)
    status, _, error = run(capsys, folder("rnnsearch"), "Hund", "--kind", "encoder", *out)
    assert (status, error) == (2, "--kind is encoder; this model has cross attention alone.\n")
    assert run(capsys, folder("rnnsearch"), *out)[0] == 2


def test_a_fixed_context_has_no_attention_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer = translator("rnnsearch")
    values = SHAPES["rnnsearch"][1] | {"vocab_size": tokenizer.vocab_size, "start_id": tokenizer.bos_id}
    pretrained.save(
        make_model(make_config("rnnsearch", values | {"fixed_context": True})), tmp_path / "m", tokenizer=tokenizer
    )
    status, _, error = run(capsys, tmp_path / "m", "Hund", "--target", "dog", "--out", tmp_path / "a.png")
    assert (status, error) == (2, "this model attends to nothing: its context is one fixed state.\n")
