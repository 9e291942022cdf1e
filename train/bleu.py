"""BLEU and chrF of translations, by sacrebleu, with the signatures that make them comparable.

A BLEU without its signature means nothing: the same output differs by points between tokenisations. `13a` is what
published sacreBLEU figures use, on raw text; on text that is tokenised already, `none` keeps it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Corpus scores, from 0 to 100, and sacrebleu's signatures."""

    bleu: float
    chrf: float
    signature: str
    chrf_signature: str


def score(
    outputs: Sequence[str], references: Sequence[str], *, tokenize: str = "13a", lowercase: bool = False
) -> Scores:
    """The scores of `outputs` against one reference each. Raises ValueError where the two differ in number."""
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"{len(outputs)} translations and {len(references)} references cannot be compared.")
    from sacrebleu.metrics import BLEU, CHRF

    # force: a text that looks tokenised is the user's choice, which the signature tells; no warning in a training log
    bleu, chrf = BLEU(tokenize=tokenize, lowercase=lowercase, force=True), CHRF(lowercase=lowercase)
    of_bleu = bleu.corpus_score(list(outputs), [list(references)])
    of_chrf = chrf.corpus_score(list(outputs), [list(references)])
    return Scores(of_bleu.score, of_chrf.score, str(bleu.get_signature()), str(chrf.get_signature()))


def exact(outputs: Sequence[str], references: Sequence[str]) -> float:
    """The share of outputs that are their reference, character by character."""
    return sum(output == reference for output, reference in zip(outputs, references, strict=True)) / len(outputs)
