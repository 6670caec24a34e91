"""What points say, and the search for a fleet, over made-up points: no replay is run."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.answers import (
    choose,
    knees,
    say_choosing,
    say_fleet,
    say_knee,
    smallest_fleets,
    thresholds,
)
from sim.experiment import Point
from sim.report.metrics import Metric
from sim.report.table import BEST, difference_table, point_table
from sim.search import Search, Settings
from sim.slo import Target, parse_targets
from sim.variants import Choice, Value

SLO = parse_targets(["ttft_p99=2s"])


def point(
    choice: dict[str, Value], ttft: float | None, attainment: float = 1.0, noise: float = 0.0
) -> Point:
    """A point of two seeds that differ by `noise`."""
    values: dict[Metric, tuple[float | None, ...]] = dict.fromkeys(Metric, (1.0, 1.0))
    values[Metric.TTFT_P99] = (None, None) if ttft is None else (ttft, ttft + noise)
    values[Metric.ATTAINMENT] = (attainment, attainment)
    return Point(choice, values, 10.0, (), ("", ""))


def test_the_smallest_fleet_and_what_less_would_give() -> None:
    points = [
        point({"workers": 1}, None, 0.2),
        point({"workers": 2}, 1.5, noise=0.2),  # on average below 2 s, but not for sure
        point({"workers": 3}, 1.2),
        point({"workers": 4}, 2.1),
    ]
    (fleet,) = smallest_fleets(points, SLO)
    assert fleet.point is points[2]
    assert fleet.smaller is points[1]
    assert fleet.larger_misses == (4,)
    words = "\n".join(say_fleet(fleet, SLO))
    assert "meets the SLO: workers=3." in words
    assert "TTFT p99 ≤ 2.00 s: met; TTFT p99 is 1.20 ±0.00 s, 40% to spare" in words
    assert "One size smaller, workers=2:" in words
    assert "Careful: 4 workers do not meet it" in words


def test_no_fleet_is_said_so_for_each_state_of_the_world() -> None:
    points = [
        point({"workers": workers, "speed": speed}, 1.0 if speed == 1 else None)
        for speed in (1, 2)
        for workers in (2, 4)
    ]
    slow, fast = smallest_fleets(points, SLO)
    assert (slow.world, slow.point) == ({"speed": 1}, points[0])
    assert (fast.world, fast.point) == ({"speed": 2}, None)
    words = "\n".join(say_fleet(fast, SLO))
    assert words.startswith("With speed=2: No fleet that was tried surely meets the SLO.")
    assert "infinite: too many requests were not answered" in words


def test_the_threshold_is_the_middle_of_what_cannot_be_told_apart() -> None:
    row = [
        point({"threshold": 8}, 9.0, 0.3),
        point({"threshold": 16}, 1.0, noise=0.1),
        point({"threshold": 32}, 1.0, noise=0.1),
        point({"threshold": 64}, 1.0, noise=0.1),
        point({"threshold": 128}, 1.9),
    ]
    (answer,) = thresholds(row, SLO)
    assert (answer.value, answer.plateau) == (32, (16, 32, 64))
    assert "Put deployment_config.max_ongoing_requests: 32" in say_choosing(answer)
    assert choose(row, "threshold", SLO, prefer=64).value == 64
    assert choose(row, "threshold", SLO, prefer=128).value == 32


def test_the_fleet_and_the_threshold_agree() -> None:
    points = [
        point({"workers": workers, "threshold": threshold}, 1.0 if workers > 1 else 5.0)
        for workers in (1, 2, 3)
        for threshold in (8, 16, 32)
    ]
    (fleet,) = smallest_fleets(points, SLO)
    (threshold,) = thresholds(points, SLO)
    assert fleet.point is threshold.point
    assert threshold.point.choice == {"workers": 2, "threshold": 16}


@pytest.mark.parametrize(
    ("axis", "values", "bad_from", "before", "at"),
    [
        ("speed", (1, 2, 3, 4), 3, 2, 3),
        ("speed", (1, 2), 9, 2, None),
        ("speed", (1, 2), 1, None, 1),
        ("adapters", (10, 100, 1000), 100, 10, 100),
    ],
)
def test_where_overload_begins(
    axis: str, values: tuple[int, ...], bad_from: int, before: int | None, at: int | None
) -> None:
    points = [point({axis: value}, 1.0, 0.5 if value >= bad_from else 1.0) for value in values]
    (knee,) = knees(points, SLO)
    assert (knee.before.choice[axis] if knee.before else None) == before
    assert (knee.knee.choice[axis] if knee.knee else None) == at
    assert say_knee(knee)


def test_overload_along_fewer_workers_for_each_policy() -> None:
    points = [
        point(
            {"policy": policy, "workers": workers}, *((1.0,) if workers >= least else (None, 0.3))
        )
        for policy, least in (("a", 2), ("b", 3))
        for workers in (1, 2, 3, 4)
    ]
    assert [say_knee(knee).partition(": there")[0] for knee in knees(points, SLO)] == [
        "With policy=a: Overload begins between workers=2 (5.00 requests/s offered for each) and "
        "workers=1 (10.00 requests/s offered for each)",
        "With policy=b: Overload begins between workers=3 (3.33 requests/s offered for each) and "
        "workers=2 (5.00 requests/s offered for each)",
    ]


def test_the_best_is_marked_only_beyond_doubt() -> None:
    fast = point({"policy": "a"}, 1.0, noise=0.01)
    near = point({"policy": "b"}, 1.01, noise=0.01)
    far = point({"policy": "c"}, 5.0, noise=0.01)
    lost = point({"policy": "d"}, None)
    column = 2
    assert point_table([fast, near], "").columns[column] == "TTFT p99"
    for points, marked in (
        ([fast, near], [False, False]),
        ([fast, far], [True, False]),
        ([lost, far], [False, True]),
        ([fast], [False]),
        ([lost, lost], [False, False]),
    ):
        rows = point_table(points, "").rows
        assert [row[column].startswith(BEST) for row in rows] == marked
    assert point_table([lost, far], "").rows[0][column] == "-"


def test_paired_differences_find_what_two_intervals_hide() -> None:
    def seeds(policy: str, values: tuple[float, ...]) -> Point:
        every: dict[Metric, tuple[float | None, ...]] = dict.fromkeys(Metric, values)
        return Point({"policy": policy}, every, 10.0, (), ())

    # Seeds differ by far more than policies do, and the policies alike in each.
    points = [seeds("a", (1.0, 2.0, 3.0)), seeds("b", (0.9, 1.88, 2.91))]
    assert not any(cell.startswith(BEST) for row in point_table(points, "").rows for cell in row)
    (row,) = difference_table(points, "policy").rows
    assert row[0] == "b - a"
    assert row[2].startswith(BEST)


# The search.


@settings(max_examples=40)
@given(need=st.integers(2, 60), best=st.sampled_from([4, 8, 16, 32]))
def test_the_search_finds_the_smallest_fleet(need: int, best: int) -> None:
    asked: list[Choice] = []

    def measure(choices: Sequence[Choice], *, optional: bool = False) -> list[Point]:
        asked.extend(choices)
        points = []
        for choice in choices:
            got = dict(choice)
            workers = got["workers"]
            assert isinstance(workers, int)
            if got["slots"] == 64:
                assert optional
                points.append(Point(got, {}, None, (), (), refused="no memory"))
            else:
                time = 0.5 if got["slots"] == best else 1.0
                fits = workers >= need - (got["slots"] == best)
                points.append(point(got, time if fits else 2 + time))
        return points

    found = Search(measure, SLO, more=lambda _: None).run(Settings(1, 16, 64), 64)
    assert found.met
    assert (found.settings.workers, found.settings.slots) == (need - 1, best)
    assert found.settings.threshold == 64, "what is configured stays where nothing is better"
    assert found.larger is not None
    assert found.larger.choice["workers"] == need
    assert (found.smaller is None) == (need == 2)
    assert len(asked) == len(set(asked)), "nothing is measured twice"
    assert len(asked) < 45


def test_the_search_says_when_no_fleet_will_do() -> None:
    def measure(choices: Sequence[Choice], *, optional: bool = False) -> list[Point]:
        return [point(dict(choice), None) for choice in choices]

    found = Search(measure, SLO, more=lambda _: None).run(Settings(1, None, 64), 5)
    assert not found.met
    assert found.settings.workers == 5
    assert found.slots is None


def test_targets_read_as_they_were_given() -> None:
    assert str(Target(Metric.ATTAINMENT, 0.99)) == "SLO attained ≥ 99.0%"
