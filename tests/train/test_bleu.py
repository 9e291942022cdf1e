"""Scores with their signatures."""

from __future__ import annotations

import pytest

from train import bleu


def test_the_signature_says_what_was_done() -> None:
    found = bleu.score(["a b c d e"], ["A b c d e"], tokenize="none", lowercase=True)
    assert (found.bleu, found.chrf) == (pytest.approx(100), pytest.approx(100))
    assert found.signature.startswith("nrefs:1|case:lc|eff:no|tok:none|smooth:exp|version:2.")
    assert "case:lc" in found.chrf_signature
    assert bleu.score(["a b c d e"], ["A b c d e"]).bleu < 100
    assert "tok:13a" in bleu.score(["a"], ["a"]).signature


def test_it_is_the_corpus_score() -> None:
    """Brevity: 8 words for 10; every n-gram is in the reference."""
    found = bleu.score(["a b c d", "e f g h"], ["a b c d", "e f g h i j"], tokenize="none")
    assert found.bleu == pytest.approx(100 * 2.718281828 ** (1 - 10 / 8), rel=1e-6)


def test_exact_and_refusal() -> None:
    assert bleu.exact(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75
    with pytest.raises(ValueError, match="1 translations and 2 references"):
        bleu.score(["a"], ["a", "b"])
