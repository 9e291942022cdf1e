"""Which block of the KV cache belongs to whom. Plain Python: the tensors are in pages.py.

The cache is cut into blocks of `size` tokens. A sequence has a table: its token at position p lies in the block
table[p // size], at offset p % size. Tables only grow at their end and are given back whole. References to blocks are
counted, so that one block can stand in several tables; one that stands in more than one is full and never written.

A full block may bear the hash of all that it was computed from (prefix.py makes them). It keeps it when nobody needs
the block any more, and can be found by it until the block is taken for something else: those without a hash are taken
first, then the one that has been of no use the longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL = 0  # belongs to nobody and is never written: what the padding of a batch of tables points to


class BlockManager:
    """Hands out blocks 1 .. count-1 of `size` tokens each.

    Invariants: references[b] is the number of tables that block b stands in, and b is free exactly when that is 0. A
    hash leads to one block, which bears it; a block bears one hash or none.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 2 or size < 1:
            raise ValueError(f"a cache needs two blocks or more, of one token or more each; got {count} of {size}")
        self.count = count
        self.size = size
        self.references = [0] * count
        self._hashes: list[bytes | None] = [None] * count
        self._blocks: dict[bytes, int] = {}  # by hash
        # In the order in which they will be taken; one can be removed from the middle, in constant time.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))

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

    def fits(self, found: Sequence[int], tokens: int) -> bool:
        """Whether a new table that begins with the blocks `found` could grow to hold `tokens` tokens now."""
        revived = sum(self.references[block] == 0 for block in found)
        return revived + self.missing(found, tokens) <= len(self._free)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extends `table` until it holds `tokens` tokens.

        False, and nothing changed, where the free blocks do not suffice.
        """
        missing = self.missing(table, tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._unname(block)
            self.references[block] = 1
            table.append(block)
        return True

    def share(self, blocks: Iterable[int]) -> list[int]:
        """A new table of these blocks, which must be full: in use, when from now on both read them and none writes
        them, or free with a hash that they were found by.
        """
        shared = list(blocks)
        for block in shared:
            if self.references[block] < 1 and self._hashes[block] is None:
                raise ValueError(f"block {block} belongs to nobody and cannot be shared")
        for block in shared:
            if self.references[block] == 0:
                del self._free[block]
            self.references[block] += 1
        return shared

    def release(self, table: list[int]) -> None:
        """Takes the whole table back; it is empty afterwards. The end of a sequence is reused before its beginning."""
        for block in reversed(table):
            if self.references[block] < 1:
                raise ValueError(f"block {block} was given back twice")
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
        table.clear()

    def find(self, hash: bytes) -> int | None:
        """The block that bears this hash."""
        return self._blocks.get(hash)

    def name(self, block: int, hash: bytes) -> None:
        """Gives a full block in use its hash. Where another block bears it already, that one goes on being found."""
        if self._hashes[block] is None and hash not in self._blocks:
            self._hashes[block] = hash
            self._blocks[hash] = block

    def distrust(self, table: Iterable[int]) -> list[int]:
        """Takes their hashes from the blocks, so that nobody will find them. Returns those of one table alone."""
        blocks = list(table)
        for block in blocks:
            self._unname(block)
        return [block for block in blocks if self.references[block] == 1]

    def _unname(self, block: int) -> None:
        hash = self._hashes[block]
        if hash is not None:
            self._hashes[block] = None
            del self._blocks[hash]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the invariants hold for these tables, which must be all that there are."""
        counted = [0] * self.count
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self.references, "references are not the number of tables that a block stands in"
        free = {block for block in range(1, self.count) if counted[block] == 0}
        assert set(self._free) == free, "free blocks are not those in no table"
        assert counted[NULL] == 0, "the null block was handed out"
        named = {hash: block for block, hash in enumerate(self._hashes) if hash is not None}
        assert named == self._blocks, "a hash does not lead to the one block that bears it"
        assert len(named) == sum(hash is not None for hash in self._hashes), "two blocks bear one hash"
        assert self._hashes[NULL] is None, "the null block bears a hash"
