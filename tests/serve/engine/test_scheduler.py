"""Scheduler and blocks under anything that can arrive: no block leaks, nobody starves, the budget holds, and what a
request reads of the cache is what it would have written.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lm.params import SamplingParams
from serve.engine.blocks import NULL, BlockManager
from serve.engine.messages import BeamSearchParams
from serve.engine.requests import BeamRequest, Request, Status
from serve.engine.scheduler import LEAST_BUDGET, Scheduler, Share

PARAMS = SamplingParams()


def request(id: str, prompt: int | Sequence[int], **more: object) -> Request:
    tokens = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    return Request(id=id, prompt=tokens, params=PARAMS, **more)  # type: ignore[arg-type]


def source(id: str, prompt: int) -> Request:
    """Computed whole or not at all."""
    return request(id, prompt, whole=prompt)


def beam(id: str, prompt: int, width: int, reserve: int) -> BeamRequest:
    searched = BeamSearchParams(beam_width=width, max_tokens=1)
    common = {"id": id, "prompt": list(range(prompt)), "params": PARAMS, "ids": [], "beam": searched}
    return BeamRequest(**common, whole=prompt, width=width, reserve=reserve)


def contents(r: Request, count: int) -> list[int]:
    """What a cache holds of a sequence's first tokens: for each cell a number that stands for all tokens up to it."""
    made, value = [], hash(r.cache_salt)
    for token in r.tokens(0, count):
        value = hash((value, token))
        made.append(value)
    return made


class Machine(RuleBasedStateMachine):
    """Plays the engine, with a cache of its own: adds, proposes, aborts and steps; after a step every request that has
    caught up knows one token more, and as many as were accepted of its draft.
    """

    @initialize(
        blocks=st.integers(3, 24),
        size=st.integers(1, 6),
        seats=st.integers(1, 6),
        budget=st.integers(1, 40),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.booleans(),
    )
    def begin(self, blocks: int, size: int, seats: int, budget: int, policy: str, caching: bool) -> None:
        self.blocks = BlockManager(blocks, size)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            policy=policy,
            prefix_caching=caching,
        )
        self.cells: dict[tuple[int, int], int] = {}
        self.goals: dict[Request, int] = {}  # how many tokens each wants to know
        self.made = 0

    @property
    def alive(self) -> list[Request]:
        return list(self.goals)

    def _add(self, new: Request, goal: int) -> None:
        self.made += 1
        self.goals[new] = goal
        self.scheduler.add(new)

    @rule(
        same=st.integers(0, 40),
        other=st.integers(0, 12),
        more=st.integers(1, 12),
        salt=st.sampled_from([None, None, "s"]),
        priority=st.integers(-1, 1),
        asks=st.integers(0, 5),
    )
    def add(self, same: int, other: int, more: int, salt: str | None, priority: int, asks: int) -> None:
        """Prompts that begin alike: so many tokens that all have, so many of its own."""
        prompt = ([7] * same + [100 + self.made] * other)[: self.blocks.capacity] or [7]
        new = request(str(self.made), prompt, cache_salt=salt, priority=priority)
        new.prompt_logprobs = [None] if asks == 0 else None
        self._add(new, min(len(prompt) + more, self.blocks.capacity + 1))  # its last token is never computed

    @rule(prompt=st.integers(1, 30), more=st.integers(1, 12), width=st.integers(0, 4))
    def add_whole(self, prompt: int, more: int, width: int) -> None:
        """A source, or (width > 0) a beam; each as large as a request may be that can be carried out alone."""
        width = min(width, self.scheduler.seats, self.scheduler.budget)
        prompt = min(prompt, self.scheduler.budget, self.blocks.capacity // max(width, 1))
        total = min(prompt + more, self.blocks.capacity // max(width, 1))
        if prompt >= 1:
            name = str(self.made)
            new = beam(name, prompt, width, width * total) if width else source(name, prompt)
            self._add(new, max(total, prompt + 1))

    @precondition(lambda self: any(_may_propose(r) for r in self.alive))
    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        r = data.draw(st.sampled_from([r for r in self.alive if _may_propose(r)]))
        r.draft = [7] * data.draw(st.integers(1, 5))

    @rule(accepted=st.integers(0, 5), early=st.booleans(), seconds=st.floats(0.0, 10.0))
    def step(self, accepted: int = 0, early: bool = True, seconds: float = 1.0) -> None:
        for share in (shares := self._schedule()):
            self._write(share)
        self.scheduler.pace.observe(shares, seconds)
        for share in shares:
            r = share.request
            covered = max(0, share.start + share.length - r.known)
            kept = min(accepted, covered)
            added = [*r.draft[:kept], 7] if share.catches_up else []
            if early:
                self.scheduler.computed(share, share.length - covered + kept)
                r.output += added
            else:
                r.output += added
                self.scheduler.computed(share, share.length - covered + kept)
            if added and r.known >= self.goals[r]:
                self._end(r)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def step_that_fails(self, data: st.DataObject) -> None:
        """Its requests are ended; what was written of them is anything."""
        for share in self._schedule():
            self._write(share, junk=data.draw(st.booleans()))
            self._end(share.request)

    @precondition(lambda self: self.alive)
    @rule()
    def step_that_runs_out_of_memory(self) -> None:
        seats, budget = self.scheduler.seats, self.scheduler.budget
        for share in (shares := self._schedule()):
            self._write(share, junk=True)
        if self.scheduler.shrink():
            assert self.scheduler.running == []
            assert (self.scheduler.seats, self.scheduler.budget) != (seats, budget)
        else:
            assert len(self.scheduler.running) <= 1 or self.scheduler.budget <= LEAST_BUDGET
            for share in shares:
                self._end(share.request)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def unsound(self, data: st.DataObject) -> None:
        r = data.draw(st.sampled_from(self.scheduler.running))
        table = list(r.table)
        alone = self.scheduler.distrust(r)
        assert alone == [block for block in table if self.blocks.references[block] == 1]
        for cell in [cell for cell in self.cells if cell[0] in alone]:
            del self.cells[cell]
        self._end(r)
        assert not any(self.blocks.find(hash) in table for hash in r.hashes)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.alive)))

    @rule()
    def run_out(self) -> None:
        """Everything that is known ends in a bounded number of steps, and leaves nothing behind."""
        tokens = sum(self.goals.values())
        for _ in range(4 * tokens * (1 + len(self.goals)) + 10):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.goals
        assert self.blocks.free == self.blocks.count - 1

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check([r.table for r in self.scheduler])
        for r in self.scheduler:
            assert len(r.table) >= -(-r.computed // self.blocks.size)
            assert r.computed < r.known
        waiting, running = self.scheduler.waiting, self.scheduler.running
        for queue in (waiting, running):
            assert [r.rank for r in queue] == sorted(r.rank for r in queue)
        assert all(r.status is Status.WAITING and r.table == [] and r.computed == 0 for r in waiting)
        assert all(r.status is Status.RUNNING for r in running)
        assert set(self.scheduler) == set(self.goals)

    def _schedule(self) -> list[Share]:
        """The shares of a step, looked at from all sides."""
        had_work, waited = self.scheduler.has_work, set(self.scheduler.waiting)
        shares = self.scheduler.schedule()
        assert bool(shares) == had_work, "work was there and nothing was done"
        cost = [s.length * (s.request.width if s.start else 1) for s in shares]
        assert sum(cost) <= self.scheduler.budget
        assert sum(r.width for r in self.scheduler.running) <= self.scheduler.seats
        assert len({share.request for share in shares}) == len(shares)
        written: set[int] = set()
        for r, start, length in shares:
            assert r.status is Status.RUNNING
            assert start == r.computed
            assert length >= 1
            assert start + length <= r.known + len(r.draft)
            assert not r.draft or start + length == r.known + len(r.draft), "a draft is cut to what is computed of it"
            assert start + length >= r.whole, "a source was cut"
            assert len(r.table) * self.blocks.size >= r.reserve
            touched = r.table[start // self.blocks.size : -(-(start + length) // self.blocks.size)]
            assert NULL not in touched
            assert all(self.blocks.references[block] == 1 for block in touched), "somebody else reads what is written"
            assert written.isdisjoint(touched)
            written.update(touched)
        admitted = [share.request for share in shares if share.request in waited]
        for r in self.scheduler.waiting:
            assert r.follows or not any(r.rank < other.rank for other in admitted), "somebody was overtaken"
        return shares

    def _write(self, share: Share, *, junk: bool = False) -> None:
        """Reads what was computed before, and writes what is computed now."""
        r, start, length = share
        if not r.whole:
            expected = contents(r, start + length)
            for position in range(start + length):
                cell = (r.table[position // self.blocks.size], position % self.blocks.size)
                if position < start:
                    assert self.cells[cell] == expected[position], "not what it would have written"
                else:
                    self.cells[cell] = 0 if junk else expected[position]

    def _end(self, r: Request) -> None:
        self.scheduler.finish(r)
        assert r.table == []
        del self.goals[r]


def _may_propose(r: Request) -> bool:
    return r.status is Status.RUNNING and not r.whole and r.computed == r.known - 1


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
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
    running, big, small = request("running", 8), request("big", [9] * 12), request("small", 1)
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


def run(scheduler: Scheduler, more: int = 1) -> list[tuple[str, int, int]]:
    """A step in which whoever catches up gets a token; (id, start, length) of its shares."""
    shares = scheduler.schedule()
    for share in shares:
        caught_up = share.catches_up
        scheduler.computed(share)
        if caught_up:
            share.request.output += [0] * more
    return [(share.request.id, share.start, share.length) for share in shares]


def test_a_prompt_is_found_but_for_its_last_token_and_only_under_its_salt() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    scheduler.add(request("first", 12))
    assert run(scheduler) == [("first", 0, 12)]
    scheduler.add(request("same", 12))
    scheduler.add(request("longer", 14))
    scheduler.add(request("salted", 12, cache_salt="s"))
    scheduler.add(request("other", [5, *range(1, 12)]))
    scheduler.add(request("asks", 12, prompt_logprobs=[None]))
    assert run(scheduler)[1:] == [
        ("same", 8, 4),
        ("longer", 12, 2),
        ("salted", 0, 12),
        ("other", 0, 12),
        ("asks", 0, 12),
    ]
    scheduler.add(request("salted too", 10, cache_salt="s"))
    assert run(scheduler)[-1] == ("salted too", 8, 2)
    assert (scheduler.prefixes.queries, scheduler.prefixes.hits) == (12 + 12 + 14 + 12 + 12 + 10, 8 + 12 + 8)
    assert [r.cached for r in scheduler] == [0, 8, 12, 0, 0, 0, 8]
    assert scheduler.prefixes.seconds > 0


def test_what_was_generated_is_found_too_and_the_preempted_find_their_own_again() -> None:
    scheduler = Scheduler(BlockManager(8, 4), max_num_seqs=8, max_num_batched_tokens=100)
    one, two = request("one", 8), request("two", [9] * 12)
    scheduler.add(one)
    scheduler.add(two)
    run(scheduler)
    for _ in range(8):
        if two.preemptions:
            break
        run(scheduler)
    assert two.status is Status.WAITING
    known = two.known
    scheduler.finish(one)
    assert run(scheduler) == [("two", 12, known - 12)]
    scheduler.finish(two)
    scheduler.add(request("again", [*two.prompt, *two.output][:17]))
    assert run(scheduler) == [("again", 16, 1)]


def test_blocks_without_a_hash_go_first_then_the_least_recently_used_the_end_before_the_beginning() -> None:
    blocks = BlockManager(6, 4)
    first: list[int] = []
    second: list[int] = []
    assert blocks.grow(first, 8)
    assert blocks.grow(second, 12)
    for table, name in ((first, b"a"), (second, b"b")):
        for index in range(2):
            blocks.name(table[index], name + bytes([index]))
    held = {hash: blocks.find(hash) for hash in (b"a\0", b"a\1", b"b\0", b"b\1")}
    tail = second[2]
    blocks.release(first)
    blocks.release(second)
    taken: list[int] = []
    assert blocks.grow(taken, 4)
    assert taken == [tail]
    again = blocks.share([held[b"a\0"]])  # out of the middle
    for lost in (b"a\1", b"b\1", b"b\0"):
        assert blocks.find(lost) == held[lost]
        assert blocks.grow(taken, 4 * (len(taken) + 1))
        assert taken[-1] == held[lost]
        assert blocks.find(lost) is None
    assert blocks.find(b"a\0") == again[0]
    assert not blocks.grow(taken, 4 * (len(taken) + 1))
    blocks.check([taken, again])


def test_a_burst_of_equal_prompts_is_computed_once_and_lets_others_pass() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 21))
    scheduler.add(request("other", [9] * 6))
    assert run(scheduler) == [("a", 0, 21), ("other", 0, 6)]
    assert run(scheduler) == [("a", 21, 1), ("other", 6, 1), ("b", 20, 1), ("c", 20, 1)]


def test_who_waits_for_another_goes_on_when_that_one_is_gone() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=100)
    leader, follower = request("leader", 21), request("follower", 21)
    scheduler.add(leader)
    scheduler.add(follower)
    assert len(scheduler.schedule()) == 1
    assert follower.follows == (leader, 20)
    scheduler.finish(leader)
    assert run(scheduler) == [("follower", 0, 21)]
    assert follower.follows is None


def test_who_has_little_in_common_does_not_wait() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=30)
    scheduler.add(request("one", 12))
    scheduler.add(request("two", [*range(4), *[9] * 8]))
    assert run(scheduler) == [("one", 0, 12), ("two", 0, 12)]


def test_the_lower_priority_number_goes_first_and_the_highest_is_preempted() -> None:
    def scheduler(policy: str) -> Scheduler:
        made = Scheduler(BlockManager(8, 4), max_num_seqs=2, max_num_batched_tokens=100, policy=policy)
        for name, priority in (("late", 3), ("first", 0), ("urgent", -5), ("second", 0)):
            made.add(request(name, [ord(name[0])] * 4, priority=priority))
        return made

    assert [id for id, _, _ in run(scheduler("fcfs"))] == ["late", "first"]
    by_priority = scheduler("priority")
    assert [id for id, _, _ in run(by_priority)] == ["urgent", "first"]
    by_priority.seats = 4
    assert [id for id, _, _ in run(by_priority)] == ["urgent", "first", "second", "late"]
    assert not by_priority.preemptions
    assert [id for id, _, _ in run(by_priority)] == ["urgent", "first", "second"]
    assert [r.id for r in by_priority.waiting] == ["late"]


def test_those_who_decode_come_before_a_prompt_and_a_draft_takes_what_is_left() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=8, max_num_batched_tokens=6)
    long, one, two = request("long", 20), request("one", [8]), request("two", [9])
    for r in (one, two, long):
        scheduler.add(r)
    assert run(scheduler) == [("one", 0, 1), ("two", 0, 1), ("long", 0, 4)]
    one.draft, two.draft = [1, 2, 3], [4, 5, 6]
    shares = scheduler.schedule()
    assert [(s.request.id, s.start, s.length) for s in shares] == [("one", 1, 4), ("two", 1, 2)]
    assert (one.draft, two.draft) == ([1, 2, 3], [4])
    for share in shares:
        scheduler.computed(share, 1)
        share.request.output.append(0)
    assert run(scheduler) == [("one", 2, 1), ("two", 2, 1), ("long", 4, 4)]


def test_a_draft_that_fails_is_forgotten_and_one_that_finds_no_block_preempts_nobody() -> None:
    scheduler = Scheduler(BlockManager(4, 4), max_num_seqs=8, max_num_batched_tokens=100)
    one, two = request("one", [8] * 3), request("two", [9] * 7)
    scheduler.add(one)
    scheduler.add(two)
    run(scheduler)
    two.draft = [1, 2]  # would need a block, and there is none
    one.draft = [3]
    shares = scheduler.schedule()
    assert [(s.request.id, s.start, s.length) for s in shares] == [("one", 3, 1), ("two", 7, 1)]
    assert (one.draft, two.draft, scheduler.preemptions) == ([], [], 0)
    scheduler.finish(two)
    scheduler.computed(shares[0])
    one.output.append(0)
    one.draft = [3, 4, 5, 6]
    (share,) = scheduler.schedule()
    assert (share.start, share.length, share.catches_up) == (4, 5, True)
    scheduler.computed(share, 3)  # the known token and two of the four
    assert (one.computed, one.draft) == (7, [])
    assert scheduler.blocks.find(one.hashes[0]) == one.table[0]
    assert len(one.hashes) == 1


def test_after_a_lack_of_memory_steps_are_half_as_large_until_it_has_gone_well_for_long() -> None:
    scheduler = Scheduler(BlockManager(1000, 4), max_num_seqs=8, max_num_batched_tokens=1000)
    for index in range(6):
        scheduler.add(request(str(index), [index] * 150))
    assert sum(share.length for share in scheduler.schedule()) == 900
    assert scheduler.shrink()
    assert (scheduler.seats, scheduler.budget, scheduler.running) == (3, 450, [])
    assert [r.id for r in scheduler.waiting] == ["0", "1", "2", "3", "4", "5"]
    assert scheduler.blocks.usage == 0
    assert len(run(scheduler)) == 3
    for r in list(scheduler)[1:]:
        scheduler.finish(r)
    run(scheduler)
    assert not scheduler.shrink(), "one token of one request"
    for _ in range(1000):
        run(scheduler)
    assert (scheduler.seats, scheduler.budget) == (6, 900)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10)), min_size=30, max_size=60), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_nobody_starves_while_others_keep_coming(arrivals: list[tuple[int, int]], budget: int) -> None:
    """One request arrives with each step, with a beginning that all have; the third ends before long."""
    scheduler = Scheduler(BlockManager(16, 4), max_num_seqs=3, max_num_batched_tokens=budget)
    third: Request | None = None
    work = 0
    for step, (same, other) in enumerate([*arrivals, *arrivals, *arrivals]):
        new = request(str(step), [7] * same + [step + 100] * other)
        scheduler.add(new)
        if step <= 2:
            third = new
            work += new.known + 4
        run(scheduler)
        for r in list(scheduler.running):
            if len(r.output) >= 4:
                scheduler.finish(r)
        assert third is not None
        if third.status is Status.FINISHED:
            return
        assert step <= 10 + 4 * work
