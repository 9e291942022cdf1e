"""Scores of given pairs: they are what the model gives, in any batch, and what search found is worth what it said."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import score as module
from lm.__main__ import main
from lm.beam import BeamParams, beam_search
from lm.score import score

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [([5, 6, 7, 2], [8, 9, 2]), ([3, 2], [2]), ([4] * 20, [10] * 30), ([9, 8, 7, 6, 5, 2], [1, 2, 3, 4])]


@torch.no_grad()
def by_hand(model: Any, source: list[int], target: list[int]) -> list[float]:
    """Token by token."""
    state = model.start(torch.tensor([source]))
    token, logprobs = state.first, []
    for following in target:
        logits, state = model.step(token.unsqueeze(1), state)
        logprobs.append(float(logits[0, -1].log_softmax(-1)[following]))
        token = torch.tensor([following])
    return logprobs


@pytest.mark.parametrize("budget", [1, 60, 1000])
def test_a_score_is_the_sum_of_what_each_token_is_given(translator_model: Any, budget: int) -> None:
    """Also where a long source and a long target stand in one batch that has no room for both in one row."""
    pairs = [*PAIRS, ([7] * 45, [3, 2]), ([7, 2], [3] * 55)]
    for (source, target), found in zip(pairs, score(translator_model, pairs, budget), strict=True):
        expected = by_hand(translator_model, source, target)
        assert found.logprobs == pytest.approx(expected, rel=1e-3, abs=1e-3)  # the weights are large
        assert found.tokens == len(target)
        assert found.logprob == pytest.approx(sum(found.logprobs))
        assert found.perplexity == pytest.approx(math.exp(-found.logprob / len(target)))


def test_what_search_finds_has_the_score_that_it_says(translator_model: Any) -> None:
    sources = [source for source, _ in PAIRS]
    params = BeamParams(beam=3, n_best=3, max_tokens=8)
    for source, hypotheses in zip(sources, beam_search(translator_model, sources, params, [2, 15, 20]), strict=True):
        steps = [h.ids + ([] if h.end is None else [h.end]) for h in hypotheses]
        for h, found in zip(hypotheses, score(translator_model, [(source, tokens) for tokens in steps]), strict=True):
            assert found.logprobs == pytest.approx(h.logprobs, abs=2e-4)


def test_what_cannot_be_scored_is_named(translator_model: Any) -> None:
    room = translator_model.room(2)
    for pair, sentence in (
        (([1, 2], []), "pair 1: the target is empty; it must hold at least one token."),
        (
            ([1, 2], [3] * (room + 1)),
            f"pair 1: the target has {room + 1} tokens; after this source the model has room for {room}.",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            score(translator_model, [PAIRS[0], pair])
        assert str(refused.value) == sentence
    with pytest.raises(ValueError, match=r"^pair 0: the .* has 61 tokens"):
        score(translator_model, [([3] * 61, [2])])
    assert score(translator_model, []) == []


# ---------------------------------------------------------------- the command


def run(*arguments: str | Path, text: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lm", "score", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, timeout=120)


def test_pairs_of_lines(translator_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from lm.translate import Translator

    folder = translator_folder("transformer")
    sources, targets = ["to be", "", "🦄 naïve"], ["être", "rien", ""]
    (tmp_path / "source").write_text("\n".join(sources) + "\n", encoding="utf-8")
    (tmp_path / "target").write_text("\r\n".join(targets) + "\r\n", encoding="utf-8")
    done = run(folder, "--source", tmp_path / "source", "--target", tmp_path / "target", "--threads", 1)
    assert done.returncode == 0, done.stderr.decode()
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    translator = Translator.load(folder)
    end = next(iter(translator.stop_ids))
    expected = module.score_texts(translator.model, translator.tokenizer, list(zip(sources, targets, strict=True)), end)
    assert [float(row[0]) for row in rows] == pytest.approx([one.logprob for one in expected], abs=1e-3)
    assert [int(row[1]) for row in rows] == [one.tokens for one in expected]
    assert expected[2].tokens == 1  # the end alone
    assert done.stderr.decode().startswith(f"3 pairs, {sum(one.tokens for one in expected)} target tokens: ")
    again = run(folder, text="".join(f"{s}\t{t}\n" for s, t in zip(sources, targets, strict=True)).encode())
    assert (again.returncode, again.stdout) == (0, done.stdout)


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        (b"a\nb\n", b"a\n", "SOURCE has 2 lines and TARGET 1; each source must have one target."),
        (b"a\n\xff\n", b"a\nb\n", "SOURCE, line 2 is not UTF-8; it must be text."),
        (b"a\n", b"a" * 70, "line 1: the target has 71 tokens; after this source the model has room for 60."),
        (b"a\n" + b"b" * 70, b"a\nb", "line 2: the source has 71 tokens; it may have 60 at most."),
        (b"a\n", None, "TARGET cannot be read: No such file or directory."),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_2(
    source: bytes,
    target: bytes | None,
    sentence: str,
    translator_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    files = tmp_path / "source", tmp_path / "target"
    for file, data in zip(files, (source, target), strict=True):
        if data is not None:
            file.write_bytes(data)
    folder = translator_folder("transformer")
    assert main(["score", str(folder), "--source", str(files[0]), "--target", str(files[1])]) == 2
    said = capsys.readouterr()
    expected = sentence.replace("SOURCE", str(files[0])).replace("TARGET", str(files[1]))
    assert (said.out, said.err) == ("", expected + "\n")


def test_half_of_the_options(translator_folder: Callable[[str], Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["score", str(translator_folder("transformer")), "--source", "x"]) == 2
    assert "--source and --target go together" in capsys.readouterr().err
