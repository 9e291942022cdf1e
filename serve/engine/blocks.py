"""Which block of the KV cache belongs to whom. Plain Python: the tensors are in pages.py.

The cache is cut into blocks of `size` tokens. A sequence has a table: its token at position p lies in the block
table[p // size], at offset p % size. Tables only grow at their end and are given back whole. References to blocks are
counted, so that one block can stand in several tables; one that stands in more than one is full and never written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

NULL = 0  # belongs to nobody and is never written: what the padding of a batch of tables points to


class BlockManager:
    """Hands out blocks 1 .. count-1 of `size` tokens each.

    Invariant: references[b] is the number of tables that block b stands in, and b is free exactly when that is 0.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 2 or size < 1:
            raise ValueError(f"a cache needs two blocks or more, of one token or more each; got {count} of {size}")
        self.count = count
        self.size = size
        self.references = [0] * count
        # First in, first out: the block that has been free the longest is taken first, which keeps what was used last.
        self._free: deque[int] = deque(range(1, count))

    @property
    def capacity(self) -> int:
        """Tokens that an empty cache can hold."""
        return (self.count - 1) * self.size

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        return 1.0 - len(self._free) / (self.count - 1)

    def missing(self, table: Sequence[int], tokens: int) -> int:
        """Blocks that `table` lacks to hold `tokens` tokens."""
        return max(0, -(-tokens // self.size) - len(table))

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extends `table` until it holds `tokens` tokens.

        False, and nothing changed, where the free blocks do not suffice.
        """
        missing = self.missing(table, tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.popleft()
            self.references[block] = 1
            table.append(block)
        return True

    def share(self, blocks: Iterable[int]) -> list[int]:
        """A new table of these blocks, which must be full: from now on both read them and none writes them."""
        shared = list(blocks)
        for block in shared:
            if self.references[block] < 1:
                raise ValueError(f"block {block} belongs to nobody and cannot be shared")
        for block in shared:
            self.references[block] += 1
        return shared

    def release(self, table: list[int]) -> None:
        """Takes the whole table back; it is empty afterwards. The end of a sequence is reused before its beginning."""
        for block in reversed(table):
            if self.references[block] < 1:
                raise ValueError(f"block {block} was given back twice")
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free.append(block)
        table.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the invariant holds for these tables, which must be all that there are."""
        counted = [0] * self.count
        for table in tables:
            for block in table:
                counted[block] += 1
        free = set(self._free)
        assert counted == self.references, "references are not the number of tables that a block stands in"
        assert len(free) == len(self._free), "a block is free twice"
        assert free == {b for b in range(1, self.count) if counted[b] == 0}, "free blocks are not those in no table"
        assert counted[NULL] == 0, "the null block was handed out"
