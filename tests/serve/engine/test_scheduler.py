"""Scheduler and blocks together, under anything that can arrive: no block leaks, nobody starves, the budget holds."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lm.params import SamplingParams
from serve.engine.blocks import NULL, BlockManager
from serve.engine.messages import BeamSearchParams
from serve.engine.requests import BeamRequest, Request, Status
from serve.engine.scheduler import Scheduler

PARAMS = SamplingParams()


def request(id: str, prompt: int) -> Request:
    return Request(id=id, prompt=list(range(prompt)), params=PARAMS)


def source(id: str, prompt: int) -> Request:
    """Computed whole or not at all."""
    return Request(id=id, prompt=list(range(prompt)), params=PARAMS, whole=prompt)


def beam(id: str, prompt: int, width: int, reserve: int) -> BeamRequest:
    searched = BeamSearchParams(beam_width=width, max_tokens=1)
    common = {"id": id, "prompt": list(range(prompt)), "params": PARAMS, "ids": [], "beam": searched}
    return BeamRequest(**common, whole=prompt, width=width, reserve=reserve)


class Machine(RuleBasedStateMachine):
    """Plays the engine: adds, aborts and steps; after a step every request that has caught up knows one token more."""

    @initialize(blocks=st.integers(3, 24), size=st.integers(1, 8), seats=st.integers(1, 6), budget=st.integers(1, 40))
    def begin(self, blocks: int, size: int, seats: int, budget: int) -> None:
        self.blocks = BlockManager(blocks, size)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=seats, max_num_batched_tokens=budget)
        self.goals: dict[Request, int] = {}  # how many tokens each wants to know
        self.arrivals: list[Request] = []
        self.made = 0

    @rule(prompt=st.integers(1, 60), more=st.integers(1, 30))
    def add(self, prompt: int, more: int) -> None:
        total = min(prompt + more, self.blocks.capacity)
        new = request(str(self.made), min(prompt, total - 1) or 1)
        self.made += 1
        self.goals[new] = max(total, new.known + 1)
        if self.goals[new] - 1 > self.blocks.capacity:  # its last token is never computed
            del self.goals[new]
            return
        self.arrivals.append(new)
        self.scheduler.add(new)

    @rule(prompt=st.integers(1, 40), more=st.integers(1, 20), width=st.integers(0, 4))
    def add_whole(self, prompt: int, more: int, width: int) -> None:
        """A source, or (width > 0) a beam; each as large as a request may be that can be carried out alone."""
        width = min(width, self.scheduler.seats, self.scheduler.budget)
        prompt = min(prompt, self.scheduler.budget, self.blocks.capacity // max(width, 1))
        total = min(prompt + more, self.blocks.capacity // max(width, 1))
        if prompt < 1:
            return
        name = str(self.made)
        self.made += 1
        new = beam(name, prompt, width, width * total) if width else source(name, prompt)
        self.goals[new] = max(total, prompt + 1)
        self.arrivals.append(new)
        self.scheduler.add(new)

    @rule()
    def step(self) -> None:
        had_work = self.scheduler.has_work
        before = {r: r.computed for r in self.scheduler}
        shares = self.scheduler.schedule()
        assert bool(shares) == had_work, "work was there and nothing was done"
        cost = [share.length * (share.request.width if share.start else 1) for share in shares]
        assert sum(cost) <= self.scheduler.budget
        assert sum(r.width for r in self.scheduler.running) <= self.scheduler.seats
        assert len({share.request for share in shares}) == len(shares)
        written: set[tuple[int, int]] = set()
        for share in shares:
            r = share.request
            assert r.status is Status.RUNNING
            assert share.start == r.computed
            assert share.length >= 1
            assert share.start + share.length <= r.known
            assert r.computed in (before[r], 0)
            assert share.start + share.length >= r.whole, "a source was cut"
            assert len(r.table) * self.blocks.size >= r.reserve
            for position in range(share.start, share.start + share.length):
                block = r.table[position // self.blocks.size]
                assert block != NULL
                assert self.blocks.references[block] == 1, "a block is written that somebody else reads"
                cell = (block, position % self.blocks.size)
                assert cell not in written
                written.add(cell)
        for share in shares:
            caught_up = share.catches_up
            self.scheduler.computed(share)
            if caught_up:
                share.request.output.append(0)
                if share.request.known >= self.goals[share.request]:
                    self.scheduler.finish(share.request)
                    self._forget(share.request)

    @precondition(lambda self: self.arrivals)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.arrivals))
        self.scheduler.finish(victim)
        assert victim.table == []
        self._forget(victim)

    @rule()
    def run_out(self) -> None:
        """Everything that is known ends in a bounded number of steps, and leaves nothing behind."""
        tokens = sum(self.goals[r] for r in self.arrivals)
        for _ in range(10 * tokens * (1 + len(self.arrivals)) + 10):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.arrivals
        assert self.blocks.free == self.blocks.count - 1

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "blocks"):
            return
        tables = [r.table for r in self.scheduler]
        self.blocks.check(tables)
        for r in self.scheduler:
            assert len(r.table) >= -(-r.computed // self.blocks.size)
        waiting = list(self.scheduler.waiting)
        assert all(r.status is Status.WAITING and r.table == [] and r.computed == 0 for r in waiting)
        assert set(self.scheduler) == set(self.arrivals)

    def _forget(self, r: Request) -> None:
        del self.goals[r]
        self.arrivals.remove(r)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase


def test_running_before_waiting_and_a_long_prompt_in_chunks() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=10)
    first, long = request("first", 3), request("long", 25)
    scheduler.add(first)
    scheduler.add(long)
    lengths = []
    for _ in range(4):
        shares = scheduler.schedule()
        lengths.append([(share.request.id, share.length) for share in shares])
        for share in shares:
            scheduler.computed(share)
            if share.request.computed == share.request.known:
                share.request.output.append(0)
    assert lengths == [
        [("first", 3), ("long", 7)],
        [("first", 1), ("long", 9)],
        [("first", 1), ("long", 9)],
        [("first", 1), ("long", 1)],
    ]


def test_the_one_admitted_last_is_preempted_and_waits_in_front() -> None:
    scheduler = Scheduler(BlockManager(6, 4), max_num_seqs=8, max_num_batched_tokens=100)
    one, two, three = request("one", 8), request("two", 12), request("three", 4)
    for r in (one, two, three):
        scheduler.add(r)
    for share in scheduler.schedule():  # one takes two blocks, two takes three; three waits
        scheduler.computed(share)
        share.request.output.append(0)
    shares = scheduler.schedule()
    assert [share.request.id for share in shares] == ["one"]
    assert [r.id for r in scheduler.waiting] == ["two", "three"]
    assert (two.computed, two.table, two.preemptions, scheduler.preemptions) == (0, [], 1, 1)


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    scheduler = Scheduler(BlockManager(5, 4), max_num_seqs=8, max_num_batched_tokens=100)
    running, big, small = request("running", 8), request("big", 12), request("small", 1)
    scheduler.add(running)
    for share in scheduler.schedule():
        scheduler.computed(share)
    running.output.append(0)
    scheduler.add(big)
    scheduler.add(small)
    assert [share.request.id for share in scheduler.schedule()] == ["running"]


def test_shared_blocks_live_until_the_last_reader_is_gone() -> None:
    blocks = BlockManager(5, 4)
    first: list[int] = []
    assert blocks.grow(first, 8)
    second = blocks.share(first)
    blocks.check([first, second])
    assert blocks.grow(second, 12)
    blocks.release(first)
    blocks.check([second])
    assert blocks.free == 1
    assert not blocks.grow(first, 8)
    assert first == []
    blocks.release(second)
    assert blocks.free == 4


def test_blocks_refuse_what_would_break_them() -> None:
    with pytest.raises(ValueError, match="needs two blocks"):
        BlockManager(1, 4)
    blocks = BlockManager(3, 4)
    with pytest.raises(ValueError, match="belongs to nobody"):
        blocks.share([1])
    with pytest.raises(ValueError, match="given back twice"):
        blocks.release([1])


def test_a_source_waits_for_room_in_the_budget_and_is_not_overtaken() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=10)
    first, long, short = source("first", 4), source("long", 8), source("short", 1)
    for r in (first, long, short):
        scheduler.add(r)

    def step() -> list[tuple[str, int]]:
        shares = scheduler.schedule()
        for share in shares:
            scheduler.computed(share)
            share.request.output.append(0)
        return [(share.request.id, share.length) for share in shares]

    assert step() == [("first", 4)]
    assert step() == [("first", 1), ("long", 8), ("short", 1)]


def test_a_beam_takes_the_seats_the_budget_and_the_cache_of_its_sequences() -> None:
    scheduler = Scheduler(BlockManager(20, 4), max_num_seqs=5, max_num_batched_tokens=6)
    wide, plain, late = beam("wide", 6, 3, reserve=60), request("plain", 4), request("late", 3)
    for r in (wide, plain, late):
        scheduler.add(r)

    def step() -> list[tuple[str, int]]:
        shares = scheduler.schedule()
        for share in shares:
            scheduler.computed(share)
            share.request.output.append(0)
        return [(share.request.id, share.length) for share in shares]

    assert step() == [("wide", 6)]
    assert len(wide.table) == 15
    assert step() == [("wide", 1), ("plain", 3)]  # three tokens for its sequences, and what is left
    scheduler.seats = 4
    plain.output.clear()
    assert step() == [("wide", 1), ("plain", 1)]
    assert [r.id for r in scheduler.waiting] == ["late"]  # four seats, and all are taken
