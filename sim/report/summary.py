"""A replay's figures: over every request offered, so that turning requests away flatters nothing.

A request that was rejected, failed or never finished has waited for ever: it counts as infinite, and
a percentile or mean that falls on one is null. Percentiles are nearest rank: the smallest value
that at least that share of the requests does not exceed.
"""

import math
from array import array
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from router.core.job import Outcome

COMPLETED: Final = Outcome.COMPLETED  # by this name at a tenth of the cost (Python 3.11)
PERCENTILES: Final = {"p50": 50, "p90": 90, "p99": 99}

# The shares of a curve: even over the body, finer towards the tail.
CURVE_SHARES: Final = (
    *(number / 200 for number in range(1, 199)),
    0.9925,
    0.995,
    0.9975,
    0.999,
    1.0,
)


class Slo(msgspec.Struct, frozen=True):
    """What a good answer is, in seconds: time to first token, and mean time between tokens."""

    ttft_s: float = 2.0
    itl_s: float = 0.1


class Latencies:
    """The three latencies of every request offered, and how each ended."""

    def __init__(self) -> None:
        self.ttft_s = array("d")
        self.itl_s = array("d")
        self.e2e_s = array("d")
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.good = 0
        self._ended = 0
        self.single = 0  # answers of one token: they have no gap to measure

    def answered(self, *, ttft_s: float, e2e_s: float, tokens: int, slo: Slo) -> None:
        """One request was answered in full."""
        self.outcomes[COMPLETED] += 1
        self._ended += 1
        self.ttft_s.append(ttft_s)
        self.e2e_s.append(e2e_s)
        itl_s = 0.0
        if tokens > 1:
            itl_s = (e2e_s - ttft_s) / (tokens - 1)
            self.itl_s.append(itl_s)
        else:
            self.single += 1
        if ttft_s <= slo.ttft_s and itl_s <= slo.itl_s:
            self.good += 1

    def lost(self, outcome: Outcome) -> None:
        """One request was not answered."""
        self.outcomes[outcome] += 1
        self._ended += 1

    @property
    def ended(self) -> int:
        """Requests that ended, well or not."""
        return self._ended


def distribution(values: Sequence[float], offered: int) -> dict[str, float | None]:
    """Mean and percentiles over `offered` requests, those without a value being infinite."""
    ordered = sorted(values)
    complete = bool(ordered) and len(ordered) == offered
    result: dict[str, float | None] = {
        "mean": math.fsum(ordered) / len(ordered) if complete else None
    }
    for name, percent in PERCENTILES.items():
        rank = max(1, math.ceil(percent * offered / 100))
        result[name] = ordered[rank - 1] if rank <= len(ordered) else None
    return result


def curve(values: Sequence[float], offered: int) -> tuple[float | None, ...]:
    """The value at each of `CURVE_SHARES` of the requests offered; None is infinite."""
    ordered = sorted(values)
    ranks = (max(1, math.ceil(share * offered)) for share in CURVE_SHARES)
    return tuple(ordered[rank - 1] if rank <= len(ordered) else None for rank in ranks)


def outcome_counts(latencies: Latencies, offered: int) -> dict[str, int]:
    """Counts that add up: requests = completed + rejected + failed + unfinished."""
    completed = latencies.outcomes[Outcome.COMPLETED]
    rejected = sum(count for outcome, count in latencies.outcomes.items() if outcome.is_rejection)
    failed = latencies.ended - completed - rejected
    return {
        "requests": offered,
        "completed": completed,
        "rejected": rejected,
        "failed": failed,
        "unfinished": offered - latencies.ended,
    }


def latency_figures(latencies: Latencies, offered: int) -> dict[str, Any]:
    """`ttft_s`, `itl_s` and `e2e_s` of the contract."""
    return {
        "ttft_s": distribution(latencies.ttft_s, offered),
        "itl_s": distribution(latencies.itl_s, offered - latencies.single),
        "e2e_s": distribution(latencies.e2e_s, offered),
    }
