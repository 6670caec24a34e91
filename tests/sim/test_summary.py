"""The figures of a replay, on numbers small enough to check by hand."""

import pytest

from router.core.job import Outcome
from sim.report.summary import (
    Latencies,
    Slo,
    distribution,
    latency_figures,
    outcome_counts,
)

SLO = Slo(ttft_s=1.0, itl_s=0.1)


@pytest.mark.parametrize(
    ("values", "offered", "expected"),
    [
        # Nearest rank: of 10 values p50 is the 5th, p90 the 9th, p99 the 10th.
        ([*range(1, 11)], 10, {"mean": 5.5, "p50": 5, "p90": 9, "p99": 10}),
        ([*range(1, 101)], 100, {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}),
        ([7], 1, {"mean": 7, "p50": 7, "p90": 7, "p99": 7}),
        # Two of ten were never answered: they are the largest, and infinite.
        ([3, 1, 2, 4, 5, 6, 7, 8], 10, {"mean": None, "p50": 5, "p90": None, "p99": None}),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 10, {"mean": None, "p50": 5, "p90": 9, "p99": None}),
        ([], 4, {"mean": None, "p50": None, "p90": None, "p99": None}),
        ([], 0, {"mean": None, "p50": None, "p90": None, "p99": None}),
    ],
)
def test_distribution(values: list[float], offered: int, expected: dict[str, float | None]) -> None:
    assert distribution([float(value) for value in values], offered) == expected


def test_latencies_count_each_request_once() -> None:
    latencies = Latencies()
    latencies.answered(ttft_s=0.5, e2e_s=1.5, tokens=11, slo=SLO)  # 0.1 s a token: good
    latencies.answered(ttft_s=0.5, e2e_s=2.6, tokens=11, slo=SLO)  # 0.21 s a token: not
    latencies.answered(ttft_s=1.1, e2e_s=1.2, tokens=11, slo=SLO)  # first token late: not
    latencies.answered(ttft_s=0.9, e2e_s=0.9, tokens=1, slo=SLO)  # one token has no gap: good
    latencies.lost(Outcome.QUEUE_FULL)
    latencies.lost(Outcome.QUEUE_TIMEOUT)
    latencies.lost(Outcome.REFUSED)
    assert latencies.good == 2
    assert latencies.ended == 7
    assert outcome_counts(latencies, 9) == {
        "requests": 9,
        "completed": 4,
        "rejected": 2,
        "failed": 1,
        "unfinished": 2,
    }
    figures = latency_figures(latencies, 9)
    assert figures["ttft_s"]["p50"] is None, "the 5th of 9, of whom 4 were answered"
    assert list(latencies.itl_s) == pytest.approx([0.1, 0.21, 0.01])
    assert list(latencies.e2e_s) == [1.5, 2.6, 1.2, 0.9]
