"""What is computed in the next step.

There is no prefill phase and no decode phase. A request has tokens that are known and tokens that are computed; each
step spends a budget of tokens on letting the second catch up with the first:

1. running requests first, in the order of their rank. Those who decode (one token is to be computed, and perhaps a
   draft that is proposed to follow it) have theirs reserved, so that nobody who is being answered waits for a prompt;
   prompts get what is left, as far as the pace of the others allows (pace.py). Each brings a part; the first has its
   own, and what the others bring goes to the one that lacks least, and on: so a crowd has its first tokens one after
   the other, not all at its end, a short prompt does not wait for a long one, and nobody for ever;
2. then those who wait, lowest rank first, while budget and seats are left and the whole of what they know fits the
   cache. What the cache holds of their beginning already (prefix.py) counts as computed. One whose beginning is just
   being computed for somebody else may let others pass until that is done.

The rank is the order of arrival, or the priority and then that. A long prompt is thus computed in chunks beside the
others' single tokens. When a running request finds no free block, the running one of the highest rank loses all of its
blocks and waits (preemption): it is recomputed, as far as its blocks are not found again. In a step that preempted,
nobody is admitted. The request of the lowest rank is never preempted for another's sake and, since no request may need
more than the whole cache or budget, always ends: so every request does.

Some requests come as more than one sequence of tokens does. A source (`whole`) is not computed in chunks: it waits
until the budget has room for all of it, and nobody overtakes it. A beam (`width`) takes the seats and the budget of
its sequences, and `reserve` of the cache at once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

from serve.engine.blocks import BlockManager
from serve.engine.pace import Pace
from serve.engine.prefix import Prefixes
from serve.engine.requests import Request, Status

LEAST_BUDGET = 64  # tokens of a step that a lack of memory does not make smaller
CALM = 1000  # steps that go well before more is tried again


class Share(NamedTuple):
    """Of `request`, tokens[start : start + length] are computed in this step."""

    request: Request
    start: int
    length: int

    @property
    def catches_up(self) -> bool:
        """All known tokens are computed after this step: it yields the logits of the next one, and of those after
        each token of the draft that it covers.
        """
        return self.start + self.length >= self.request.known


class Scheduler:
    """Owns the queue, the seats and, through the block manager, the cache; knows nothing of tensors, text or clocks.

    `policy` is "fcfs" or "priority". `waiting` and `running` are in the order of rank. The engine tells `pace` what
    steps take.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "fcfs",
        prefix_caching: bool = True,
    ) -> None:
        self.blocks = blocks
        self.prefixes = Prefixes(blocks, enabled=prefix_caching)
        self.pace = Pace()
        self.seats = max_num_seqs
        self.budget = max_num_batched_tokens
        self.policy = policy
        self._full = (max_num_seqs, max_num_batched_tokens)
        self._calm = 0  # steps since the last that ran out of memory
        self._spent = 0  # of the budget, in the last step
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._arrived = 0

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self._arrived += 1
        request.rank = (request.priority if self.policy == "priority" else 0, self._arrived)
        self._wait(request)

    def schedule(self) -> list[Share]:
        """The shares of the next step, their blocks allotted; within the budget; empty only where there is no work.

        A share of a running request goes on into its `draft` as far as budget and free blocks allow; the draft is cut
        to what the share covers.
        """
        self._recover()
        step = _Step(self.budget, self.pace, self.running, len(self.waiting))
        preemptions = self.preemptions
        index = 0
        while index < len(self.running):
            request = self.running[index]
            count = step.affordable(request, request.computed)
            if count and self._allot(request, count):
                count = min(count, request.known + len(request.draft) - request.computed)
                step.take(request, count)
            index += 1
        if self.preemptions == preemptions:
            self._admit(step)
        self._spent = self.budget - step.left
        return step.shares

    def computed(self, share: Share, kept: int | None = None) -> None:
        """The step has run: what was scheduled is in the cache. Of the share's tokens the first `kept` hold (None: all
        of them); the rest were a draft that came otherwise. The draft is gone after this. To be called before or after
        the tokens that were drawn are added to the output.
        """
        request, start, length = share
        request.computed = start + (length if kept is None else kept)
        self.prefixes.computed(request, start)
        request.draft.clear()

    def finish(self, request: Request) -> None:
        """Ends a request wherever it stands; its blocks are free at once."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        self.blocks.release(request.table)
        request.follows = None
        request.status = Status.FINISHED

    def distrust(self, request: Request) -> list[int]:
        """What was computed of a request is no good: nobody will find its blocks. To be called before it is ended.
        Returns the blocks that nobody else reads, which may be cleared.
        """
        return self.blocks.distrust(request.table)

    def shrink(self) -> bool:
        """The step that was scheduled last ran out of memory, and nothing of it was computed. Half as many requests,
        and half as many tokens, may be in a step from now on, until CALM steps have gone well, and then twice as many
        again. All who ran wait, so that nothing is kept that was half done. False, and nothing changed, where it was a
        step as small as can be: its requests have to be ended.
        """
        running = sum(request.width for request in self.running)
        seats = min(self.seats, max([running // 2, *(request.width for request in self)]))
        least = max([LEAST_BUDGET, *(max(request.whole, request.width) for request in self)])
        budget = min(self.budget, max(self._spent // 2, least))
        if seats >= running and budget >= self._spent:
            return False
        self.seats, self.budget, self._calm = seats, budget, 0
        for request in reversed(self.running.copy()):
            self._preempt(request)
        return True

    def _recover(self) -> None:
        self._calm += 1
        if self._calm % CALM == 0:
            seats, budget = self._full
            self.seats, self.budget = min(seats, 2 * self.seats), min(budget, 2 * self.budget)

    def _allot(self, request: Request, count: int) -> bool:
        """Blocks for the next `count` tokens of a running request. A draft is given up where blocks are lacking; for
        known tokens others are preempted, and at last the request itself: False.
        """
        needed = max(request.computed + count, request.reserve)
        if request.draft and self.blocks.missing(request.table, needed) > self.blocks.free:
            request.draft.clear()
            needed = request.known
        while not self.blocks.grow(request.table, needed):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, step: _Step) -> None:
        seated = sum(request.width for request in self.running)
        index = 0
        while index < len(self.waiting) and step.spare > 0:
            request = self.waiting[index]
            if seated + request.width > self.seats:
                break
            if self.prefixes.held(request):
                index += 1
                continue
            found = self.prefixes.find(request)
            if self.prefixes.follow(request, len(found), self.running):
                index += 1
                continue
            start = len(found) * self.blocks.size
            count = step.affordable(request, start)
            if count == 0 or not self.blocks.fits(found, max(request.known, request.reserve)):
                break
            del self.waiting[index]
            request.table = self.blocks.share(found)
            request.computed = start
            self.blocks.grow(request.table, max(start + count, request.reserve))
            self.prefixes.admitted(request, len(found))
            request.status = Status.RUNNING
            insort(self.running, request, key=_rank)
            seated += request.width
            step.take(request, count)

    def _wait(self, request: Request) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=_rank)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.table)
        request.computed = 0
        request.draft.clear()
        request.preemptions += 1
        self.preemptions += 1
        self._wait(request)


class _Step:
    """The budget of a step, and what it is spent on: `left` of all of it, `spare` of what is not reserved for those who
    decode.
    """

    def __init__(self, budget: int, pace: Pace, running: list[Request], waiting: int) -> None:
        """running: in the order of rank; waiting: how many others there are."""
        decoding = [request for request in running if _decodes(request)]
        reading = [request for request in running if not _decodes(request) and not request.whole]
        single = sum(request.width for request in decoding)
        self.shares: list[Share] = []
        self.left = budget
        self.spare = budget - single
        self._decoding = set(decoding)
        self._part = pace.part(single)
        parts = len(reading)  # for those who run already,
        self._more = waiting  # and for those who are admitted
        if not decoding:
            if len(reading) + waiting <= 1:
                self._part = None  # nobody else would notice
            parts = min(parts, 1 if waiting else 2)
            self._more = 2 - parts
        self._left_over = 0
        self._own = self._divided(reading, parts)

    def affordable(self, request: Request, start: int) -> int:
        """How many of its tokens from `start` can be computed in this step. To be asked once for each request."""
        lacking = request.known - start
        if request in self._decoding:
            return 1 + min(len(request.draft), max(self.spare, 0)) if request.width <= self.left else 0
        if request.whole:
            return lacking if start + lacking >= request.whole and lacking <= self.spare else 0
        if self._part is None:
            return max(0, min(lacking, self.spare))
        if request in self._own:
            return max(0, min(self._own[request], self.spare))
        if self._more > 0:
            self._more -= 1
            self._left_over += self._part
        return max(0, min(lacking, self.spare, self._left_over))

    def take(self, request: Request, count: int) -> None:
        start = request.computed
        del request.draft[max(0, start + count - request.known) :]
        self.shares.append(Share(request, start, count))
        if request in self._decoding:
            self.left -= request.width * count
            self.spare -= count - 1
        else:
            self.left -= count
            self.spare -= count
            if request not in self._own:
                self._left_over = max(0, self._left_over - count)

    def _divided(self, reading: list[Request], parts: int) -> dict[Request, int]:
        """Tokens of this step for each of them; what none of them needs is left over for those who are admitted."""
        if self._part is None or not reading:
            return {}
        lacking = {request: request.known - request.computed for request in reading}
        pool = self._part * parts
        first = reading[0]
        own = {first: min(lacking[first], self._part)}
        pool -= own[first]
        for request in sorted(reading, key=lambda request: (lacking[request], request.rank)):
            more = min(lacking[request] - own.get(request, 0), pool)
            own[request] = own.get(request, 0) + more
            pool -= more
        self._left_over = pool
        return own


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _decodes(request: Request) -> bool:
    """Whether its next token is all that it lacks."""
    return request.status is Status.RUNNING and request.known - request.computed == 1
