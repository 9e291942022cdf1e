"""A prompt is read beside others as fast as leaves their gaps short: on machines that exist in arithmetic only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lm.params import SamplingParams
from serve.engine.blocks import BlockManager
from serve.engine.pace import LEAST, SHORT, STRETCH, Pace
from serve.engine.requests import Request
from serve.engine.scheduler import Scheduler, Share

PARAMS = SamplingParams()


class Machine:
    """Seconds of a step: a fixed part, one for each single token, one for each of a prompt, more for a late one."""

    def __init__(self, *, fixed: float, single: float, token: float, later: float = 0.0) -> None:
        self.fixed, self.single, self.token, self.later = fixed, single, token, later

    def __call__(self, shares: list[Share]) -> float:
        prompts = [share for share in shares if share.start < len(share.request.prompt)]
        reading = sum(share.length * (self.token + self.later * share.start) for share in prompts)
        return self.fixed + self.single * (len(shares) - len(prompts)) + reading


def served(machine: Callable[[list[Share]], float], streams: int) -> Scheduler:
    """A scheduler with so many streams that have decoded for a while."""
    scheduler = Scheduler(BlockManager(4096, 16), max_num_seqs=64, max_num_batched_tokens=2048)
    for index in range(streams):
        scheduler.add(Request(id=str(index), prompt=[index] * 128, params=PARAMS))
    for _ in range(20):
        step(scheduler, machine)
    return scheduler


def step(scheduler: Scheduler, machine: Callable[[list[Share]], float]) -> float:
    shares = scheduler.schedule()
    seconds = machine(shares)
    scheduler.pace.observe(shares, seconds)
    for share in shares:
        caught_up = share.catches_up
        scheduler.computed(share)
        if caught_up:
            share.request.output.append(0)
    return seconds


@pytest.mark.parametrize(
    "machine",
    [
        Machine(fixed=0.011, single=0.0006, token=0.0004),
        Machine(fixed=0.011, single=0.0006, token=0.0004, later=1e-7),
        Machine(fixed=0.001, single=0.0001, token=0.00002, later=5e-9),
    ],
)
@pytest.mark.parametrize("streams", [1, 16])
def test_one_long_prompt_at_most_doubles_the_gaps_of_others(machine: Machine, streams: int) -> None:
    scheduler = served(machine, streams)
    quiet = step(scheduler, machine)
    long = Request(id="long", prompt=[99] * 8000, params=PARAMS)
    scheduler.add(long)
    gaps = []
    while not long.output:
        gaps.append(step(scheduler, machine))
        assert len(gaps) < 8000 / LEAST
    assert max(gaps[1:]) <= 2 * quiet
    assert sum(gaps) < 4 * sum(machine.token + machine.later * position for position in range(8000))


def test_alone_a_prompt_takes_the_whole_budget() -> None:
    machine = Machine(fixed=0.01, single=0.001, token=0.001)
    scheduler = served(machine, 1)
    for request in list(scheduler):
        scheduler.finish(request)
    scheduler.add(Request(id="long", prompt=[99] * 3000, params=PARAMS))
    assert [share.length for share in scheduler.schedule()] == [2048]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    machine = Machine(fixed=0.011, single=0.0006, token=0.0004)
    scheduler = served(machine, 16)
    long, short = (Request(id=id, prompt=[99 + n] * n, params=PARAMS) for id, n in (("long", 8000), ("short", 60)))
    scheduler.add(long)
    step(scheduler, machine)
    scheduler.add(short)
    for _ in range(4):
        step(scheduler, machine)
    assert short.output
    assert not long.output


@pytest.mark.parametrize("streams", [0, 3])
def test_a_crowd_has_its_first_tokens_one_after_the_other(streams: int) -> None:
    machine = Machine(fixed=0.011, single=0.0006, token=0.0004)
    scheduler = served(machine, max(streams, 1))
    for request in list(scheduler)[streams:]:
        scheduler.finish(request)
    crowd = [Request(id=f"new {index}", prompt=[100 + index] * 128, params=PARAMS) for index in range(16)]
    for request in crowd:
        scheduler.add(request)
    now, first = 0.0, {}
    while len(first) < len(crowd):
        now += step(scheduler, machine)
        for request in crowd:
            if request.output:
                first.setdefault(request.id, now)
    assert list(first) == [request.id for request in crowd]  # alike: as they came
    times = sorted(first.values())
    assert times[7] < 0.65 * times[-1]
    assert times[-1] < 3 * machine.token * 16 * 128  # they also had more tokens meanwhile


def test_a_short_one_of_a_crowd_passes_the_long_and_the_long_goes_on() -> None:
    machine = Machine(fixed=0.011, single=0.0006, token=0.0004)
    scheduler = served(machine, 1)
    for request in list(scheduler):
        scheduler.finish(request)
    long = [Request(id=f"long {index}", prompt=[90 + index] * 4000, params=PARAMS) for index in range(3)]
    for request in long:
        scheduler.add(request)
    step(scheduler, machine)
    short = Request(id="short", prompt=[99] * 100, params=PARAMS)
    scheduler.add(short)
    steps = 0
    while not short.output:
        step(scheduler, machine)
        steps += 1
    assert steps <= 6
    before = long[0].computed
    step(scheduler, machine)
    assert long[0].computed > before


def test_the_pace_follows_a_machine_that_changes() -> None:
    pace = Pace()
    assert pace.part(8) is None
    pace.learn(0, 1, 5.0)  # tells nothing: the first token of a cold engine
    assert pace.part(8) is None
    pace.learn(0, 128, 0.06)
    for _ in range(50):
        pace.learn(8, 0, 0.02)
    for token in (0.0005, 0.00005, 0.0005):
        expected = (STRETCH - 1) * 0.02 / token
        for _ in range(60):
            pace.learn(8, part := pace.part(8) or 0, 0.02 + part * token)
        assert pace.part(8) == pytest.approx(expected, rel=0.1)
    pace.learn(8, 0, 100.0)  # one slow step is not believed
    assert pace.part(8) == pytest.approx(1.3 * expected, rel=0.1)
    assert pace.part(0) == pytest.approx(SHORT / token, rel=0.1)  # whoever else waits has a token soon


def test_no_measurement_breaks_it() -> None:
    pace = Pace()
    for seconds in (0.0, 1e-9, 1e9, 0.0):
        for single, prompt in ((0, 0), (1, 0), (0, 100), (3, 7), (64, 2048)):
            pace.learn(single, prompt, seconds)
            part = pace.part(3)
            assert part is None or part >= LEAST
