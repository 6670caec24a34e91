"""What a decision costs: that the scenes are what they claim, and the arithmetic of the tables."""

import asyncio
import json
from pathlib import Path

import pytest
from apart import run_in_a_thread

from benchmarks import decisions
from benchmarks.decisions import IN_FLIGHT, SLOTS, Cost, goals, growth, measured, scene, tables


def cost(operation: str, workers: int, adapters: int, us: float, waiting: int = 0) -> Cost:
    return Cost(
        operation=operation,
        policy="cost",
        workers=workers,
        adapters=adapters,
        waiting=waiting,
        us={"median": us, "min": us, "max": us},
    )


async def test_a_scene_is_a_fleet_under_load() -> None:
    fleet, router, jobs = scene("cost", 4, 1_000, 200)
    assert [len(worker.slots) for worker in fleet] == [SLOTS] * 4
    assert all(worker.in_flight == IN_FLIGHT and worker.slots.idle for worker in fleet)
    assert len(fleet.demand) == 1_000
    assert any(len(fleet.holders(slot.adapter)) > 1 for worker in fleet for slot in worker.slots)
    assert all(job.adapter is not None and fleet.staged(job.adapter) for job in jobs)
    resident = sum(job.adapter is not None and bool(fleet.resident(job.adapter)) for job in jobs)
    assert 0.9 <= resident / len(jobs) < 1.0
    await router.aclose()


async def test_an_operation_is_told_for_one() -> None:
    calls = 0

    async def operation() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return 1_000_000

    us = await measured(operation, 3)
    assert calls == 4  # one to warm up
    assert 0.0 <= us["min"] <= us["median"] <= us["max"] < 1.0


def test_growth_is_the_last_over_the_first() -> None:
    assert growth([2.0, 5.0, 3.0]) == pytest.approx(1.5)


@pytest.mark.parametrize(("us", "word"), [(19.9, "met"), (20.0, "missed")])
def test_a_goal_is_for_the_median(us: float, word: str) -> None:
    rows = list(goals([cost("place", 8, 100_000, us), cost("place", 8, 100, 1.0)]))
    assert [row[-1] for row in rows] == [word]


def test_a_table_for_each_way_to_grow() -> None:
    ones = [cost("place", workers, 100, 5.0) for workers in (1, 8)]
    assert [table.row_count for table in tables([*ones, cost("turn", 8, 100, 9.0)])] == [2, 1]


def test_the_command_measures_every_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decisions, "TURN_ADAPTERS", 100)
    monkeypatch.setattr(
        "sys.argv",
        [
            *("decisions", "--rounds", "1", "--workers", "1,2", "--adapters", "50,100"),
            *("--waiting", "0,5", "--turn-workers", "2", "--decisions", "20", "--turns", "5"),
            *("--json", str(tmp_path / "out.json")),
        ],
    )
    run_in_a_thread(decisions.main)
    capsys.readouterr()
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    # For each policy: two operations in four scenes, two turns, two hard ones, and one without memory.
    assert len(found) == 2 * (2 * 4 + 2 + 2 + 1)
    assert all(one["us"]["median"] > 0.0 for one in found)
