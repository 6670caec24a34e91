"""How much each adapter is asked for: requests a second, with the past fading away.

An exponentially decayed count: each arrival adds 1, and what was counted halves about every
`0.7 x memory_s`. The rate is the count over the memory. Bounded: the adapter that has not been asked
for longest is forgotten first. O(1) for each arrival and each question.
"""

from collections import OrderedDict
from math import exp
from typing import Final

from router.core.job import AdapterRef

MEMORY_S: Final = 60.0
ADAPTERS_MAX: Final = 1 << 16


class Demand:
    """Rates of arrival, by adapter."""

    __slots__ = ("_counts", "_limit", "_memory_s")

    def __init__(self, *, memory_s: float = MEMORY_S, limit: int = ADAPTERS_MAX) -> None:
        self._memory_s = memory_s
        self._limit = limit
        self._counts: OrderedDict[AdapterRef, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def arrived(self, adapter: AdapterRef, now: float) -> None:
        """A job for the adapter has come."""
        counts = self._counts
        known = counts.pop(adapter, None)
        if known is None:
            counts[adapter] = (1.0, now)
            if len(counts) > self._limit:
                counts.popitem(last=False)
        else:
            count, since = known
            counts[adapter] = (1.0 + count * exp((since - now) / self._memory_s), now)

    def forget(self, adapter: AdapterRef) -> None:
        """It will not be asked for any more."""
        self._counts.pop(adapter, None)

    def rate(self, adapter: AdapterRef, now: float) -> float:
        """Requests a second for the adapter, of late."""
        known = self._counts.get(adapter)
        if known is None:
            return 0.0
        count, since = known
        return count * exp((since - now) / self._memory_s) / self._memory_s
