"""The beginning that sequences have in common is computed once.

A full block is known by the SHA-256 of its token ids and of the hash of the block before it, so that equal hashes mean
equal sequences from the first token on; before the first block comes the salt, which keeps apart those who must not
find each other's (cryptographic, since whoever could make two sequences collide would read the other's answer:
CVE-2025-25183). Blocks are found by their hash when a request is admitted, also by the one that lost them to
preemption. Sources and beams are no sequences of blocks, and have no part in this.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from time import perf_counter

from serve.engine.blocks import BlockManager
from serve.engine.requests import Request, Status

NO_SALT = bytes(32)


def root(salt: str | None) -> bytes:
    """What stands for the block before the first."""
    return NO_SALT if salt is None else hashlib.sha256(salt.encode()).digest()


def block_hash(before: bytes, tokens: Iterable[int]) -> bytes:
    """Of a block with these tokens, after a block with that hash."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class Prefixes:
    """Names blocks as they fill and finds them again. `queries` and `hits` count tokens of admitted requests (each
    request once, however often it is preempted); `seconds` is what all of this has taken.
    """

    def __init__(self, blocks: BlockManager, *, enabled: bool = True) -> None:
        self.blocks = blocks
        self.enabled = enabled
        self.queries = 0
        self.hits = 0
        self.seconds = 0.0

    def find(self, request: Request) -> list[int]:
        """The blocks of the cache that the waiting request's known tokens begin with, for a new table of its own.

        At least the last token is left to be computed: its logits are needed. A request that asks for its prompt's
        probabilities finds nothing: it needs the logits of every token.
        """
        if not self._reads(request):
            return []
        begin = perf_counter()
        found: list[int] = []
        for hash in self._hashes(request, (request.known - 1) // self.blocks.size):
            block = self.blocks.find(hash)
            if block is None:
                break
            found.append(block)
        self.seconds += perf_counter() - begin
        return found

    def held(self, request: Request) -> bool:
        """Whether a request still waits for the one that it follows."""
        if request.follows is None:
            return False
        leader, tokens = request.follows
        if leader.status is Status.RUNNING and leader.computed < tokens:
            return True
        request.follows = None
        return False

    def follow(self, request: Request, found: int, running: Iterable[Request]) -> bool:
        """Whether a request, of whose blocks the first `found` are there, had better wait until one that is running
        has computed more of them: at least half of what it lacks. From then on it is `held` as long as that one runs
        and is not so far; once in its life, so that it does not wait for ever.
        """
        size = self.blocks.size
        last = (request.known - 1) // size
        if request.followed or found >= last or not self._reads(request):
            return False
        begin = perf_counter()
        hashes = self._hashes(request, last)
        for leader in running:
            common = found
            if leader.computed < (found + 1) * size <= leader.known:
                while common < min(last, len(leader.hashes)) and hashes[common] == leader.hashes[common]:
                    common += 1
            if 2 * (common - found) * size >= request.known - found * size:
                request.follows, request.followed = (leader, common * size), True
                break
        self.seconds += perf_counter() - begin
        return request.follows is not None

    def admitted(self, request: Request, found: int) -> None:
        """Counts a request that begins with `found` blocks of the cache."""
        if not request.preemptions and self._reads(request):
            request.cached = found * self.blocks.size
            self.queries += request.known
            self.hits += request.cached

    def computed(self, request: Request, before: int) -> None:
        """Names the blocks that are full since `before` tokens of the request had been computed."""
        full = request.computed // self.blocks.size
        if full > before // self.blocks.size and self._takes_part(request):
            begin = perf_counter()
            hashes = self._hashes(request, full)
            for index in range(before // self.blocks.size, full):
                self.blocks.name(request.table[index], hashes[index])
            self.seconds += perf_counter() - begin

    def _reads(self, request: Request) -> bool:
        return self._takes_part(request) and request.prompt_logprobs is None

    def _takes_part(self, request: Request) -> bool:
        return self.enabled and not request.whole

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Of the first `count` blocks, all of whose tokens are settled; each is computed once and kept."""
        hashes, size = request.hashes, self.blocks.size
        if len(hashes) < count:
            start = len(hashes) * size
            tokens = request.tokens(start, count * size - start)
            before = hashes[-1] if hashes else root(request.cache_salt)
            for first in range(0, len(tokens), size):
                before = block_hash(before, tokens[first : first + size])
                hashes.append(before)
        return hashes[:count] if len(hashes) > count else hashes
