"""Our server beside real vLLM: the same requests over the same weights, the same answers. `make test-vllm` runs it."""

from __future__ import annotations

import pytest

from tests.conformance.asking import Outcome
from tests.conformance.cases import CASES
from tests.conformance.differences import DIFFERENCES

NEAR_TIES = 0.02  # of the requests, at most


def test_the_same_answer(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    if outcome.failures:
        pytest.fail(str(outcome), pytrace=False)


def test_few_end_in_a_near_tie(outcomes: dict[str, Outcome]) -> None:
    tied = [name for name, outcome in outcomes.items() if outcome.near_tie]
    assert len(tied) <= max(1, NEAR_TIES * len(outcomes)), tied


def test_each_agreed_difference_is_there(outcomes: dict[str, Outcome]) -> None:
    if len(outcomes) < len(CASES):
        pytest.skip("only some cases were asked")
    seen = set().union(*(outcome.agreed for outcome in outcomes.values()))
    gone = [entry.what for entry in DIFFERENCES if entry not in seen]
    assert not gone, f"These no longer differ; take them out of differences.py: {gone}"


def test_the_suite_is_as_large_as_promised() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 300
    assert len(set(names)) == len(names)
