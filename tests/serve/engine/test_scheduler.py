"""Who is computed when, what is found again, who is preempted: cases small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lm.params import SamplingParams
from serve.engine.blocks import BlockManager
from serve.engine.messages import BeamSearchParams
from serve.engine.requests import BeamRequest, Request, Status
from serve.engine.scheduler import Scheduler

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


def run(scheduler: Scheduler, more: int = 1) -> list[tuple[str, int, int]]:
    """A step in which whoever catches up gets a token; (id, start, length) of its shares."""
    shares = scheduler.schedule()
    for share in shares:
        caught_up = share.catches_up
        scheduler.computed(share)
        if caught_up:
            share.request.output += [0] * more
    return [(share.request.id, share.start, share.length) for share in shares]


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
