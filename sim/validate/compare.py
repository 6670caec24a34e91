"""Real against simulated, with the noise of the real beside it.

The rule: a figure is near enough when its relative error is within its goal, or within the difference
between two real runs of the same workload, since no simulator can be closer than that. A simulated
figure is the mean over placement seeds: the router draws, and one draw is not its behaviour.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Final

import msgspec

from sim.report.summary import distribution
from sim.validate.record import Served

# figure -> the relative error that is aimed at; the others are shown without a goal
GOALS: Final = {
    ("e2e_s", "p50"): 0.05,
    ("ttft_s", "p50"): 0.10,
    ("ttft_s", "p99"): 0.15,
    ("adapters", "hits"): 0.02,
    ("adapters", "loads"): 0.02,
    ("adapters", "evictions"): 0.02,
}
LATENCIES: Final = ("ttft_s", "itl_s", "e2e_s")
STATISTICS: Final = ("mean", "p50", "p90", "p99")
Figures = dict[tuple[str, str], float]


class Comparison(msgspec.Struct, frozen=True):
    """One figure of one workload: every real run's, the simulated one, and how they differ."""

    case: str
    group: str
    name: str
    real: tuple[float, ...]
    simulated: float
    error: float | None  # relative, of the simulated against the real runs' mean
    noise: float | None  # relative, of one real run against another: the mean over pairs
    goal: float | None

    @property
    def met(self) -> bool | None:
        """Whether it is near enough, where a goal says what that is.

        A figure that is infinite, because requests were not answered, is not.
        """
        if self.goal is None:
            return None
        if self.error is None:
            return False
        return self.error <= max(self.goal, self.noise or 0.0)


def figures(served: Sequence[Served], evictions: int) -> Figures:
    """All figures of one run of one workload."""
    found: Figures = {}
    for name, of in _VALUES.items():
        values = [value for one in served if (value := of(one)) is not None]
        statistics = distribution(values, len(served) if name != "itl_s" else len(values))
        found |= {
            (name, key): math.inf if statistics[key] is None else float(statistics[key] or 0.0)
            for key in STATISTICS
        }
    ends = [one.timestamp_ms / 1000 + one.e2e_s for one in served if one.e2e_s is not None]
    span_s = max(ends) - served[0].timestamp_ms / 1000 if ends else math.inf
    tokens = sum(one.output_tokens for one in served if one.completed)
    found["throughput", "output tokens/s"] = tokens / span_s
    found["adapters", "hits"] = sum(one.use == "hit" for one in served)
    found["adapters", "loads"] = sum(one.use == "cold" for one in served)
    found["adapters", "evictions"] = evictions
    return found


_VALUES: Final[dict[str, Callable[[Served], float | None]]] = {
    "ttft_s": lambda one: one.ttft_s if one.completed else None,
    "itl_s": lambda one: one.itl_s if one.completed else None,
    "e2e_s": lambda one: one.e2e_s if one.completed else None,
}


def compare(case: str, real: Sequence[Figures], simulated: Sequence[Figures]) -> list[Comparison]:
    """Every figure of one workload: real runs against simulated ones."""
    found = []
    for group, name in real[0]:
        runs = tuple(one[group, name] for one in real)
        mean, model = fmean(runs), fmean(one[group, name] for one in simulated)
        found.append(
            Comparison(
                case,
                group,
                name,
                runs,
                model,
                _relative(model - mean, mean),
                _relative(_apart(runs), mean),
                GOALS.get((group, name)),
            )
        )
    return found


def _apart(runs: Sequence[float]) -> float:
    """How far two of them are from each other, on average."""
    pairs = [abs(one - other) for one, other in combinations(runs, 2)]
    return fmean(pairs) if pairs else 0.0


def _relative(difference: float, of: float) -> float | None:
    if not math.isfinite(difference) or not math.isfinite(of):
        return None
    if of == 0:
        return 0.0 if difference == 0 else math.inf
    return abs(difference) / abs(of)
