"""Which blocks belong to whom: allocation, sharing of equal prefixes, and what a window no longer reaches.

A full block is named by the digest of its tokens and of the block before it, so equal names mean equal tokens from the
start of the sequence on, and therefore equal keys and values. A block that nobody holds keeps its content and its name
until it is needed for something else, the one that lay unused for longest first.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b

from crosslayer.engine.request import Sequence
from crosslayer.model.paged import BlockTable

# Standard deviation of what a running sequence holds, over its mean. Where it grows evenly from a prompt that is p of
# its final length, that is (1 - p) / sqrt(3) / (1 + p): 0.19 with prompts as long as answers. Lengths differ, too.
SPREAD = 0.3


class BlockPool:
    """The blocks of one span. `references[b]` counts the sequences that hold block b."""

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be used first
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self.most_used = 0

    @property
    def size(self) -> int:
        return len(self.references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free block, which loses its name and content."""
        block = next(iter(self._free))
        if block in self._names:
            del self._named[self._names.pop(block)]
        self.hold(block)
        return block

    def find(self, name: bytes) -> int | None:
        return self._named.get(name)

    def hold(self, block: int) -> None:
        """Count one more sequence that has the block."""
        if not self.references[block]:
            del self._free[block]
            self.most_used = max(self.most_used, self.size - self.num_free)
        self.references[block] += 1

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if not self.references[block]:
            self._free[block] = None
            if block not in self._names:
                self._free.move_to_end(block, last=False)  # there is nothing in it to keep

    def name(self, block: int, name: bytes) -> None:
        """Let the block be found, unless another one with the same content is found already."""
        if name not in self._named:
            self._named[name], self._names[block] = block, name

    def forget_all(self) -> None:
        self._named.clear()
        self._names.clear()


class BlockManager:
    """The pools of all spans, and the tables of sequences in them.

    `num_blocks` maps each span (see `PagedCache`) to its number of blocks; spans shorter than `max_length` are windows.
    A sequence that is alone always fits, if it has at most `max_tokens` tokens and gains at most `max_new` at a time.
    """

    def __init__(
        self, num_blocks: Mapping[int, int], block_size: int, max_length: int, *, prefix_caching: bool = True
    ) -> None:
        self.block_size, self.max_length, self.prefix_caching = block_size, max_length, prefix_caching
        self.pools = {span: BlockPool(count) for span, count in num_blocks.items()}
        self._whole = self.pools.get(max_length)  # None where every layer has a window
        self._windows = {span: pool for span, pool in self.pools.items() if span < max_length}
        # New tokens that fit beside a whole window, wherever in a block it starts.
        room = {span: (pool.size - 1) * block_size - span + 2 for span, pool in self._windows.items()}
        self.max_new = min((tokens for tokens in room.values() if tokens >= 1), default=max_length)
        held_whole = [pool for span, pool in self.pools.items() if room.get(span, 0) < 1]
        self.max_tokens = min([max_length, *(pool.size * block_size for pool in held_whole)])

    def attach_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that hold the beginning of its tokens already, all but the last one."""
        count = self._count_cached(sequence) if self.prefix_caching else 0
        sequence.num_cached = count * self.block_size
        for span, pool in self.pools.items():
            first = self._first_needed(span, sequence.num_cached)
            blocks = [pool.find(name) for name in sequence.digests[first:count]]
            held = [block for block in blocks if block is not None]
            for block in held:
                pool.hold(block)
            sequence.tables[span] = BlockTable(first, held)
        sequence.room = sequence.num_cached
        sequence.trim_at = self._next_trim(sequence)

    def has_room(self, sequence: Sequence, num_running: int) -> bool:
        """Whether all tokens of the sequence would fit, now, with enough left over for those that run to grow.

        What each of them holds grows until it ends, and what n of them hold goes up and down by 1/sqrt(n) of what one
        does, by share. Windows are left out: their old blocks come free.
        """
        pool = self._whole
        if pool is None:
            return True
        spare = SPREAD * (pool.size - pool.num_free) / math.sqrt(num_running) if num_running else 0
        return self._missing(sequence, len(sequence.tokens)) + spare <= pool.num_free

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Take the blocks for the first `length` tokens of a sequence that has `room` for fewer; False, and nothing
        taken, if they are not there.

        This is also when full blocks get their names, those that the coming step fills among them: it stores before it
        reads. A block that ends with a token still pending waits for the next time.
        """
        missing = self._missing(sequence, length)
        if any(missing > pool.num_free for pool in self.pools.values()):
            return False
        named = max(sequence.num_cached - 1, 0) // self.block_size  # those before this one are
        full = min(length, len(sequence.tokens)) // self.block_size if self.prefix_caching else 0
        self._name_blocks(sequence, full)
        for span, pool in self.pools.items():
            table = sequence.tables[span]
            table.blocks += [pool.take() for _ in range(missing)]
            for number in range(max(named, table.first), full):
                pool.name(table.blocks[number - table.first], sequence.digests[number])
        sequence.room += missing * self.block_size
        return True

    def trim(self, sequence: Sequence) -> None:
        """Release the blocks that no window reaches from the next token on; due at `trim_at`."""
        for span, pool in self._windows.items():
            table = sequence.tables[span]
            behind = self._first_needed(span, sequence.num_cached) - table.first
            for block in table.blocks[:behind]:
                pool.release(block)
            del table.blocks[:behind]
            table.first += behind
        sequence.trim_at = self._next_trim(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence, which must be computed anew if it is to go on."""
        for span, table in sequence.tables.items():
            for block in reversed(table.blocks):  # a prefix is of use without its end, but not the other way round
                self.pools[span].release(block)
        sequence.tables, sequence.num_cached, sequence.room = {}, 0, 0

    def forget_contents(self) -> None:
        """After a failed step, nobody knows what its blocks hold."""
        for pool in self.pools.values():
            pool.forget_all()

    def _missing(self, sequence: Sequence, length: int) -> int:
        """Blocks of each span that a sequence lacks for its first `length` tokens; its tables all end alike."""
        return (length - sequence.room + self.block_size - 1) // self.block_size

    def _next_trim(self, sequence: Sequence) -> int:
        """At how many tokens in the cache the next block is behind a window; beyond any number without windows."""
        size = self.block_size
        return min(
            ((sequence.tables[span].first + 1) * size + span - 1 for span in self._windows), default=self.max_length + 1
        )

    def _first_needed(self, span: int, position: int) -> int:
        """The number of the block with the oldest token that one at `position` looks at."""
        return max(0, position - span + 1) // self.block_size if span < self.max_length else 0

    def _count_cached(self, sequence: Sequence) -> int:
        """How many leading blocks a sequence need not compute; its last token always must be, for its logits."""
        count = (len(sequence.tokens) - 1) // self.block_size
        self._name_blocks(sequence, count)
        names = sequence.digests

        whole = self._whole
        if whole is not None:
            count = next((number for number in range(count) if whole.find(names[number]) is None), count)

        def has_windows(count: int) -> bool:
            return all(
                pool.find(names[number]) is not None
                for span, pool in self._windows.items()
                for number in reversed(range(self._first_needed(span, count * self.block_size), count))
            )

        # Of a window only its last tokens must still be there.
        while count and not has_windows(count):
            count -= 1
        return count

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        """Work out the names of the first `count` blocks, as far as they are not known yet."""
        for number in range(len(sequence.digests), count):
            start = number * self.block_size
            before = sequence.digests[-1] if number else b""
            tokens = array("q", sequence.tokens[start : start + self.block_size]).tobytes()
            sequence.digests.append(blake2b(before + tokens, digest_size=16).digest())
