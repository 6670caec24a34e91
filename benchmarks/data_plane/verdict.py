"""The goals of the data plane, as arithmetic on figures of one run. Pure.

A figure is the median over rounds. What a goal needs and the run does not have makes it unknown, never
reached.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from benchmarks.data_plane.cases import Case, Figures

OURS: Final = "lorayard"
DIRECT: Final = "direct"
CROWD: Final = 10_000
RUST: Final = "vllm-router"
HAPROXY: Final = "haproxy"
Rounds = Mapping[str, Mapping[Case, Sequence[Figures]]]


class Verdict(StrEnum):
    """Whether a goal is reached."""

    REACHED = "reached"
    MISSED = "not reached"
    UNKNOWN = "not measured"


class Goal(msgspec.Struct, frozen=True):
    """One goal: `found` is to be at most `limit`, or at least where `least` is set."""

    name: str
    limit: float
    unit: str
    found: float | None
    least: bool = False

    @property
    def verdict(self) -> Verdict:
        """Whether it is reached."""
        if self.found is None:
            return Verdict.UNKNOWN
        good = self.found >= self.limit if self.least else self.found <= self.limit
        return Verdict.REACHED if good else Verdict.MISSED


def series(rounds: Rounds, name: str, case: Case, figure: str) -> list[float]:
    """A figure of a contender in each round that has it."""
    return [one[figure] for one in rounds.get(name, {}).get(case, ()) if figure in one]


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def over(rounds: Rounds, name: str, base: str, case: Case, figure: str) -> list[float]:
    """By how much a figure is more than another contender's, in each round that has both."""
    mine = rounds.get(name, {}).get(case, ())
    theirs = rounds.get(base, {}).get(case, ())
    return [
        one[figure] - other[figure]
        for one, other in zip(mine, theirs, strict=False)
        if figure in one and figure in other
    ]


def ratio(rounds: Rounds, name: str, base: str, case: Case, figure: str) -> float | None:
    """The ratio of two medians; None where either is not there."""
    mine = middle(series(rounds, name, case, figure))
    theirs = middle(series(rounds, base, case, figure))
    return None if mine is None or not theirs else mine / theirs


def goals(rounds: Rounds, *, lost: int | None, crowd: int = CROWD) -> Iterator[Goal]:
    """All goals of issue 5 that need no real engine.

    `lost` are answers that ours did not give whole, `crowd` the streams that were offered at once:
    fewer than wanted where the machine allows no more files.
    """
    yield Goal("answers lost, in all cases", 0.0, "", lost)
    yield Goal("CPU a request, × vllm-router", 0.6, "×", _cpu(rounds, RUST, Case.ANSWERS))
    yield Goal("CPU a chunk, × vllm-router", 0.6, "×", _cpu(rounds, RUST, Case.TOKENS))
    yield Goal("CPU a chunk, × HAProxy", 2.0, "×", _cpu(rounds, HAPROXY, Case.TOKENS))
    latency = [middle(series(rounds, name, Case.SINGLE, "p50_s")) for name in (OURS, RUST)]
    yield Goal(
        "median latency of one client, ms beyond vllm-router's",
        0.0,
        "ms",
        None if None in latency else ((latency[0] or 0.0) - (latency[1] or 0.0)) * 1e3,
    )
    peak = series(rounds, OURS, Case.CROWD, "peak_open")
    name = "crowd: streams open at once"
    name += f" (open files allow no more of {CROWD:,})" if crowd < CROWD else ""
    yield Goal(name, float(crowd), "", min(peak, default=None), least=True)
    yield Goal(
        "crowd: memory a stream beyond the base",
        20.0,
        "KiB",
        middle(series(rounds, OURS, Case.CROWD, "kib_per_stream")),
    )
    yield Goal(
        "memory of the base", 100.0, "MiB", middle(series(rounds, OURS, Case.CROWD, "base_mib"))
    )
    added = [
        middle(over(rounds, OURS, DIRECT, Case.PACE, figure))
        for figure in ("transit_p99_s", "late_p99_s")
    ]
    yield Goal(
        "pace: p99 of added inter-token delay",
        5.0,
        "ms",
        None if None in added else max(value or 0.0 for value in added) * 1e3,
    )
    yield Goal(
        "pace: chunks a second, of those direct",
        0.98,
        "×",
        ratio(rounds, OURS, DIRECT, Case.PACE, "per_s"),
        least=True,
    )


def _cpu(rounds: Rounds, peer: str, case: Case) -> float | None:
    return ratio(rounds, OURS, peer, case, "cpu_us")
