"""The fuzzer's requests: the same seed makes the same ones, of every route, and each can be sent and told."""

from __future__ import annotations

import random

from bench.fuzz_requests import SMALL, Maker


def test_a_seed_makes_the_same_calls_of_every_route() -> None:
    first, second = Maker(random.Random(5)), Maker(random.Random(5))
    calls = [first.call() for _ in range(2000)]
    assert calls == [second.call() for _ in range(2000)]
    assert calls != [Maker(random.Random(6)).call() for _ in range(2000)]
    assert {call.path for call in calls} >= set(SMALL)
    assert any(call.leaves for call in calls)
    assert any(call.stream for call in calls)
    for call in calls:
        assert isinstance(call.body, bytes)
        assert all(isinstance(value, bytes) for pair in call.head for value in pair)
        assert call.path in call.told()
