"""Overload: what is offered, what counts as good, and the arithmetic of the goals."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.overload import (
    OTHER,
    POLITE,
    Task,
    Way,
    figures,
    goals,
    goodput_points,
    percentile,
    requests,
    run,
    seen,
    tenant_points,
)
from benchmarks.policies.cells import Setting
from router.core.job import AdapterUse, Outcome
from sim.replay import Ended
from sim.report.summary import Slo
from sim.traces import TraceRow

PLAIN = Way(policy="affinity", deadline=False)
LATE = Way(policy="cost", deadline=True, priority=-1)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    lengths = tmp_path / "lengths.csv"
    lines = [
        f"2023-11-16 18:{number // 60:02d}:{number % 60:02d}.0000000,{100 + number},{5 + number % 9}"
        for number in range(120)
    ]
    lengths.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    setting = Setting(workers=2, slots=2, duration_s=6.0, azure=lengths)
    return Task(
        setting=setting,
        way=LATE,
        loads={POLITE: 0.3, OTHER: 0.3},
        ratio=1.0,
        seed=100,
        capacity_rps=20.0,
        warm_up_s=1.0,
    )


def ended(number: int, ttft_s: float | None, e2e_s: float | None) -> Ended:
    outcome = Outcome.DEADLINE if ttft_s is None else Outcome.COMPLETED
    return Ended(number, outcome, "", AdapterUse.NONE, ttft_s, e2e_s, 0)


def mean(value: float | None) -> dict[str, float | None]:
    return {"mean": value, "half": 0.0}


def test_the_polite_tenants_requests_are_the_same_whatever_the_other_offers(task: Task) -> None:
    flood = msgspec.structs.replace(task, loads={POLITE: 0.3, OTHER: 3.0})

    def polite(task: Task) -> list[TraceRow]:
        return [row for row in requests(task) if row.tenant == POLITE]

    rows = requests(flood)
    assert polite(task) == polite(flood)
    assert rows == sorted(rows, key=lambda row: row.timestamp)
    assert {row.priority for row in rows if row.tenant == POLITE} == {-1}
    names = {row.tenant: {one.model for one in rows if one.tenant == row.tenant} for row in rows}
    assert not names[POLITE] & names[OTHER]  # each has adapters of its own


def test_good_is_in_time_for_the_first_token_and_for_the_others() -> None:
    row = TraceRow(timestamp=0.0, input_length=10, output_length=11)
    pairs = [
        (row, ended(1, 1.0, 1.5)),
        (row, ended(2, 3.0, 3.5)),  # late
        (row, ended(3, 1.0, 3.5)),  # slow
        (row, ended(4, None, None)),  # turned away
    ]
    found = figures(pairs, 2.0, Slo(ttft_s=2.0, itl_s=0.1))
    assert (found.requests, found.goodput_rps, found.rejected) == (4, 0.5, 0.25)
    assert (found.ttft_p50_s, found.ttft_p99_s) == (1.0, None)


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([3.0, 1.0, 2.0], 0.99, 3.0),
        ([None, 1.0], 0.5, 1.0),
        ([None, 1.0], 0.99, None),
        ([], 0.5, None),
    ],
)
def test_a_percentile_is_the_nearest_rank(
    values: list[float | None], share: float, found: float | None
) -> None:
    assert percentile(values, share) == found


def test_a_replay_counts_each_request_after_the_warm_up_once(task: Task) -> None:
    found = seen(task)
    rows = requests(task)
    late = [row for row in rows if row.timestamp - rows[0].timestamp >= 1000.0]
    assert {name: one.requests for name, one in found.items()} == {
        name: sum(row.tenant == name for row in late) for name in (POLITE, OTHER)
    }
    assert found[POLITE].rejected == 0.0


def test_points_are_by_way_and_load_and_paired_by_seed(task: Task) -> None:
    tasks = [
        msgspec.structs.replace(task, way=PLAIN, loads={POLITE: 0.3, OTHER: load}, seed=seed)
        for load in (0.3, 0.65, 3.0)
        for seed in (100, 101)
    ]
    found = run(tasks, 1)
    points = tenant_points(tasks, found)
    assert [point["other"] for point in points] == ["base", "busy", "flood"]
    assert points[0]["p99_to_base"] == {"mean": 1.0, "half": 0.0}
    assert [point["load"] for point in goodput_points(tasks, found)] == [0.3, 0.65, 3.0]


def test_the_goals_are_a_share_of_the_peak_and_a_ratio_to_base() -> None:
    def point(load: float, rps: float) -> dict[str, Any]:
        return {"way": "cost", "load": load, "goodput_rps": mean(rps)}

    flood = {"ratio": 2.0, "way": "cost", "other": "flood", "p99_to_busy": mean(1.0)}
    found = list(
        goals(
            [point(1.0, 20.0), point(2.0, 19.5), point(3.0, 18.9)],
            [{**flood, "p99_to_base": mean(1.1)}, {**flood, "p99_to_base": mean(None)}],
        )
    )
    assert [row[-1] for row in found] == ["missed", "met", "missed"]
    assert found[0][3].startswith("94.5%")
