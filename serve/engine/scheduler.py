"""What is computed in the next step.

There is no prefill phase and no decode phase. A request has tokens that are known and tokens that are computed; each
step spends a budget of tokens on letting the second catch up with the first:

1. running requests first, in the order in which they were admitted, so that nobody who is being answered waits for a
   newcomer;
2. then those who wait, first come first served, while budget and seats are left and the whole of what they know fits
   the cache.

A long prompt is thus computed in chunks beside the others' single tokens. When a running request finds no free block,
the one admitted last loses all of its blocks and waits at the front of the queue: nothing of it is kept, it is
recomputed (preemption). In a step that preempted nobody is admitted. The request admitted first is never preempted
for another's sake and, since no request may need more than the whole cache or budget, always advances: so every
request ends.

Some requests come as more than one sequence of tokens does. A source (`whole`) is not computed in chunks: it waits
until the budget has room for all of it, and nobody overtakes it. A beam (`width`) takes the seats and the budget of
its sequences, and `reserve` of the cache at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from serve.engine.blocks import BlockManager
from serve.engine.requests import Request, Status


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
    """Owns the queue, the seats and, through the block manager, the cache; knows nothing of tensors, text or clocks."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.seats = max_num_seqs
        self.budget = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        request.status = Status.WAITING
        self.waiting.append(request)

    def schedule(self) -> list[Share]:
        """The shares of the next step, their blocks allotted; within the budget; empty only where there is no work."""
        left = self.budget
        shares: list[Share] = []
        preempted = False

        index = 0
        while index < len(self.running) and left > 0:
            request = self.running[index]
            count, cost = _affordable(request, left)
            if count == 0:
                index += 1
                continue
            while not self.blocks.grow(request.table, max(request.computed + count, request.reserve)):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                del request.draft[max(0, request.computed + count - request.known) :]
                shares.append(Share(request, request.computed, count))
                left -= cost
                index += 1

        seated = sum(request.width for request in self.running)
        while self.waiting and left > 0 and not preempted:
            request = self.waiting[0]
            count, cost = _affordable(request, left)
            if count == 0 or seated + request.width > self.seats:
                break
            if self.blocks.missing(request.table, max(request.known, request.reserve)) > self.blocks.free:
                break
            self.waiting.popleft()
            self.blocks.grow(request.table, max(request.computed + count, request.reserve))
            request.status = Status.RUNNING
            self.running.append(request)
            shares.append(Share(request, request.computed, count))
            left -= cost
            seated += request.width
        return shares

    def computed(self, share: Share, kept: int | None = None) -> None:
        """The step has run: what was scheduled is in the cache. Of the share's tokens the first `kept` hold (None: all
        of them); the rest were a draft that came otherwise. The draft is gone after this. To be called before or after
        the tokens that were drawn are added to the output.
        """
        request = share.request
        request.computed = share.start + (share.length if kept is None else kept)
        request.draft.clear()

    def finish(self, request: Request) -> None:
        """Ends a request wherever it stands; its blocks are free at once."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        self.blocks.release(request.table)
        request.status = Status.FINISHED

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.table)
        request.computed = 0
        request.draft.clear()
        request.status = Status.WAITING
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)


def _affordable(request: Request, left: int) -> tuple[int, int]:
    """How many of its known tokens can be computed with `left` of the budget, and what of it they take."""
    each = request.width if request.computed else 1  # a beam parts after its prompt
    count = min(request.known + len(request.draft) - request.computed, left // each)
    return (count, count * each) if request.computed + count >= request.whole else (0, 0)
