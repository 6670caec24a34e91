"""The KV cache of one engine, in blocks, as vLLM v1 keeps it.

Three kinds of blocks: in use by running requests; free and without content that could be found
(used first); free but still holding a prefix that a later request may share, least recently freed
out first, and of one request's blocks the last ones first (`BlockPool.free_blocks` of vLLM 0.32).

A prefix is known here by the trace's hash ids: each names a stretch of `segment_tokens` prompt tokens
together with all that comes before it. A stretch is kept as one `Segment` and not block by block,
since traces share whole stretches; it may be cached in part, from its beginning. Keys hold the adapter:
the same text under two adapters shares nothing, as in vLLM.

Two requests that compute one stretch at the same time hold it twice, and the second copy is
forgotten when it is freed, where vLLM could still find it. What a request generates is found again
only by itself, after a preemption: a trace does not say which later prompt repeats it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final


class Segment:
    """A run of blocks that stay together: `blocks` of them, in use by `users` requests."""

    __slots__ = ("blocks", "key", "table", "users")

    def __init__(self, blocks: int, table: "dict[int, Segment] | None", key: int) -> None:
        self.blocks = blocks
        self.users = 0
        self.table = table
        self.key = key


# Prompt tokens that a hash id of a Mooncake trace stands for.
HASH_BLOCK_TOKENS: Final = 512
NONE: Final[list[Segment]] = []  # shared by all who hold no segment, and never changed


class Holding:
    """What one request holds: shared segments, `shared` blocks of them, and `private` blocks.

    `parked` is what it left behind when it was preempted, and may find again; `parked_at` is how many
    blocks came before it.
    """

    __slots__ = ("parked", "parked_at", "private", "segments", "shared")

    def __init__(self) -> None:
        self.segments: list[Segment] = NONE
        self.shared = 0
        self.private = 0
        self.parked: Segment | None = None
        self.parked_at = 0

    @property
    def blocks(self) -> int:
        """All blocks that it holds."""
        return self.shared + self.private


class KVBlocks:
    """`total` blocks of `block_tokens` each. `caching` off frees every block for good."""

    def __init__(
        self, total: int, block_tokens: int, *, caching: bool, segment_tokens: int
    ) -> None:
        self.total: Final = total
        self.block_tokens: Final = block_tokens
        self.segment_tokens: Final = segment_tokens
        self.free = total
        self._caching = caching
        self._blank = total  # free blocks that hold nothing to be found
        self._cached: OrderedDict[Segment, None] = (
            OrderedDict()
        )  # free, the first to go at the front
        self._junk: Segment | None = (
            None  # the last entry, where it holds nothing to be found again
        )
        self._tables: dict[Hashable, dict[int, Segment]] = {}

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // self.block_tokens)

    # Finding.

    def lookup(
        self, holding: Holding, adapter: Hashable, hash_ids: Sequence[int], prompt: int, target: int
    ) -> tuple[dict[Segment, int], int, int]:
        """The longest cached prefix of `target` tokens, of which one at least is computed.

        The first `prompt` of them are what the hash ids name; beyond, a preempted request finds what
        it left behind. Returns the segments with the blocks that are used of each, these in all, and
        how many of them are free now.
        """
        size, width = self.block_tokens, self.segment_tokens
        most = (target - 1) // size
        found: dict[Segment, int] = {}
        blocks = free = 0
        table = self._tables.get(adapter)
        for index, key in enumerate(hash_ids):
            end = min((index + 1) * width, prompt) // size
            if end == blocks:  # too short for a block of its own
                continue
            segment = table.get(key) if table is not None else None
            if segment is None or segment in found:
                break
            usable = min(segment.blocks, end - blocks, most - blocks)
            if usable <= 0:
                break
            found[segment] = usable
            blocks += usable
            if not segment.users:
                free += usable
            if blocks < end:
                break
        parked = holding.parked
        if parked is not None and blocks >= holding.parked_at:
            usable = min(holding.parked_at + parked.blocks, most) - blocks
            if usable > 0:
                found[parked] = usable
                blocks += usable
                free += usable
        return found, blocks, free

    # Taking.

    def share(self, holding: Holding, found: dict[Segment, int]) -> None:
        """Hold segments that a lookup has found.

        What is not used of an idle one stays free; nobody finds it there any more, except that who
        computes it again publishes it again.
        """
        for segment, used in found.items():
            if not segment.users:
                self._cached.pop(segment)
                if segment is self._junk:
                    self._junk = None
                if segment.blocks > used:
                    self._append(segment.blocks - used, None)
                    segment.blocks = used
                self.free -= used
            segment.users += 1
            holding.shared += used
        holding.segments = [*holding.segments, *found]

    def take(self, blocks: int) -> None:
        """Use free blocks, of which there are enough: blank ones first, then the oldest cached."""
        assert blocks <= self.free, (blocks, self.free)
        self.free -= blocks
        if blocks <= self._blank:
            self._blank -= blocks
            return
        blocks -= self._blank
        self._blank = 0
        cached = self._cached
        while blocks:
            segment = next(iter(cached))
            if segment.blocks > blocks:
                segment.blocks -= blocks
                return
            blocks -= segment.blocks
            segment.blocks = 0
            del cached[segment]
            if segment is self._junk:
                self._junk = None
            if segment.table is not None:
                del segment.table[segment.key]

    def publish(
        self, holding: Holding, adapter: Hashable, hash_ids: Sequence[int], start: int, end: int
    ) -> None:
        """The prompt's tokens from `start` to `end` are computed: others may find their blocks."""
        size, width = self.block_tokens, self.segment_tokens
        table = self._tables.get(adapter)
        if table is None:
            table = self._tables[adapter] = {}
        last = min(len(hash_ids), -(-end // width))
        fresh_segments: list[Segment] = []
        for index in range(start // width, last):
            first = index * width
            before = max(start, first) // size - first // size
            whole = min(end, first + width) // size - first // size
            fresh = whole - before
            if fresh <= 0:
                continue
            key = hash_ids[index]
            segment = table.get(key)
            if segment is None:
                if before:  # its beginning was computed twice, and is another's
                    continue
                segment = table[key] = Segment(fresh, table, key)
                segment.users = 1
                fresh_segments.append(segment)
            elif segment.blocks == before and holding.segments and holding.segments[-1] is segment:
                segment.blocks += fresh
            else:
                continue
            holding.shared += fresh
            holding.private -= fresh
        if fresh_segments:
            holding.segments = [*holding.segments, *fresh_segments]

    # Giving back.

    def release(self, holding: Holding, *, tokens: int, park: bool = False) -> None:
        """Give back all that a request of `tokens` computed tokens holds, its last blocks first."""
        private = holding.private
        self.free += private
        if not self._caching:
            self._blank += private
        else:
            # Only a block that is full can be found again.
            full = max(0, min(private, tokens // self.block_tokens - holding.shared))
            self._blank += private - full
            holding.parked_at = holding.shared
            if park and holding.segments and holding.segments[-1].table is None:
                found_again = holding.segments[-1]
                holding.segments = holding.segments[:-1]
                holding.parked_at -= found_again.blocks
                self.free += found_again.blocks
                full += found_again.blocks
            if full:
                self._append(full, holding if park else None)
        if holding.segments:
            for segment in reversed(holding.segments):
                segment.users -= 1
                if not segment.users:
                    self.free += segment.blocks
                    if segment.blocks:
                        self._cached[segment] = None
                        self._junk = None
            holding.segments = NONE
        holding.shared = holding.private = 0

    def _append(self, blocks: int, owner: Holding | None) -> None:
        if owner is None and self._junk is not None:
            self._junk.blocks += blocks
            return
        segment = Segment(blocks, None, 0)
        self._cached[segment] = None
        if owner is None:
            self._junk = segment
        else:
            self._junk = None
            owner.parked = segment

    # For the tests' invariants.

    @property
    def cached(self) -> int:
        """Free blocks that hold something which could be found."""
        return sum(segment.blocks for segment in self._cached)

    @property
    def blank(self) -> int:
        """Free blocks that hold nothing."""
        return self._blank
