"""Scheduler and blocks under anything that can arrive: no block leaks, nobody starves, the budget holds, and what a
request reads of the cache is what it would have written.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        for share in scheduler.schedule():
            caught_up = share.catches_up
            scheduler.computed(share)
            if caught_up:
                share.request.output.append(0)
        for r in list(scheduler.running):
            if len(r.output) >= 4:
                scheduler.finish(r)
        assert third is not None
        if third.status is Status.FINISHED:
            return
        assert step <= 10 + 4 * work
