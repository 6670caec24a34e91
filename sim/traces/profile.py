"""What a workload is like: rate, burstiness, lengths, and how near in time an adapter comes again.

The last decides what any placement is worth, and a list of popularities does not show it. The reuse
distance of a request is the number of other adapters asked for since its own was; one cache that
drops the least recently used and has more slots than that hits (Mattson et al., 1970, "Evaluation
techniques for storage hierarchies"), so one stack of recent adapters gives the hit rate of every size.
"""

import math
from collections import Counter
from typing import Final

import msgspec

from sim.traces.row import TraceRow

DISTANCES: Final = 64
CACHE_SLOTS: Final = (4, 16)


class Locality:
    """The reuse distances of a sequence of names, up to `DISTANCES`."""

    def __init__(self) -> None:
        self.requests = 0
        self.names: Counter[str] = Counter()
        self._recent: list[str] = []
        self._at_distance = [0] * DISTANCES

    def add(self, name: str) -> None:
        """The next request's name."""
        self.requests += 1
        self.names[name] += 1
        recent = self._recent
        try:
            distance = recent.index(name)
        except ValueError:
            if len(recent) == DISTANCES:
                recent.pop()
        else:
            self._at_distance[distance] += 1
            del recent[distance]
        recent.insert(0, name)

    def hit_rate(self, slots: int) -> float:
        """The share of requests that one cache of so many slots would hit."""
        assert slots <= DISTANCES
        return sum(self._at_distance[:slots]) / self.requests if self.requests else 0.0

    @property
    def median(self) -> int | None:
        """Half of the requests come at this distance or nearer; None: farther than is counted."""
        reached = 0
        for distance, count in enumerate(self._at_distance):
            reached += count
            if reached * 2 >= self.requests > 0:
                return distance
        return None


class Lengths(msgspec.Struct, frozen=True):
    """Tokens: their mean and two percentiles by nearest rank."""

    mean: float
    p50: int
    p99: int


class Profile:
    """The figures of the rows that were added, in their order. Memory does not grow with them."""

    def __init__(self) -> None:
        self.requests = 0
        self.first_ms = 0.0
        self.last_ms = 0.0
        self.locality = Locality()
        self._gaps_squared = 0.0
        self._inputs: Counter[int] = Counter()
        self._outputs: Counter[int] = Counter()

    def add(self, row: TraceRow) -> None:
        """Take one row into account."""
        if not self.requests:
            self.first_ms = self.last_ms = row.timestamp
        self.requests += 1
        self._gaps_squared += (row.timestamp - self.last_ms) ** 2
        self.last_ms = row.timestamp
        self._inputs[row.input_length] += 1
        self._outputs[row.output_length] += 1
        if row.model is not None and ":" in row.model:
            self.locality.add(row.model)

    @property
    def span_s(self) -> float:
        """From the first request to the last, in seconds."""
        return (self.last_ms - self.first_ms) / 1000

    @property
    def rate_rps(self) -> float | None:
        """Requests a second; None for a trace without a span."""
        return (self.requests - 1) / self.span_s if self.span_s else None

    @property
    def gap_cv(self) -> float | None:
        """The gaps' coefficient of variation: 1 for Poisson, more for bursts."""
        if not self.span_s:
            return None
        mean_ms = self.span_s * 1000 / (self.requests - 1)
        variance = self._gaps_squared / (self.requests - 1) - mean_ms**2
        return math.sqrt(max(0.0, variance)) / mean_ms

    @property
    def input_tokens(self) -> Lengths:
        """The prompts."""
        return _lengths(self._inputs)

    @property
    def output_tokens(self) -> Lengths:
        """The answers."""
        return _lengths(self._outputs)


def _lengths(counts: Counter[int]) -> Lengths:
    total = counts.total()
    found: list[int] = []
    reached = 0
    for tokens in sorted(counts):
        reached += counts[tokens]
        while len(found) < 2 and reached >= (0.5, 0.99)[len(found)] * total:  # noqa: PLR2004
            found.append(tokens)
    return Lengths(sum(map(math.prod, counts.items())) / total, *found)
