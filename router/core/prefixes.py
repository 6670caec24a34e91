"""Which worker has probably cached how much of a prompt: an index of prefixes, by what was sent there.

A prompt's prefix is known by hashes at marks: of its first 1, 2, 3, 4, 6, 8, 12, 16, ... blocks. So a
prompt has few of them however long it is, and what two prompts share is found to within a third. A
key holds the adapter, as a KV block's does in vLLM: the same text under two adapters shares nothing.

The engine's own cache is not asked: the index forgets the longest unused, as the engine does, and is
as large as the workers' memories together are likely to be. O(marks) for each job.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from router.core.job import AdapterRef, Prefix

PREFIXES_MAX: Final = 1 << 16


def marks(blocks: int) -> Sequence[int]:
    """After how many blocks a prompt of so many is marked: powers of two, and halfway between."""
    found = []
    mark = 1
    while mark <= blocks:
        found.append(mark)
        half = mark + mark // 2
        if mark > 1 and half <= blocks:
            found.append(half)
        mark *= 2
    return found


class PrefixIndex:
    """Prefixes and the workers that they were sent to, by id."""

    __slots__ = ("_limit", "_sent")

    def __init__(self, limit: int = PREFIXES_MAX) -> None:
        self._limit = limit
        self._sent: OrderedDict[tuple[AdapterRef | None, int], dict[str, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def cached_tokens(self, adapter: AdapterRef | None, prefix: Sequence[Prefix]) -> dict[str, int]:
        """The most tokens of the prompt that each worker has seen; workers that saw none are absent."""
        found: dict[str, int] = {}
        for mark in prefix:  # each is longer than the last
            workers = self._sent.get((adapter, mark.key))
            if workers is None:
                break
            for worker in workers:
                found[worker] = mark.tokens
        return found

    def sent(self, adapter: AdapterRef | None, prefix: Sequence[Prefix], worker: str) -> None:
        """The prompt went to a worker."""
        sent = self._sent
        for mark in prefix:
            key = (adapter, mark.key)
            workers = sent.get(key)
            if workers is None:
                sent[key] = {worker: None}
            else:
                workers[worker] = None
                sent.move_to_end(key)
        while len(sent) > self._limit:
            sent.popitem(last=False)

    def forget(self, worker: str) -> None:
        """A worker is gone, with all that it had cached. Walks the index: it happens seldom."""
        for key in [key for key, workers in self._sent.items() if worker in workers]:
            workers = self._sent[key]
            del workers[worker]
            if not workers:
                del self._sent[key]
