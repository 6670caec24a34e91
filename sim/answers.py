"""What a sweep's points say: the smallest fleet, the threshold to configure, where overload begins.

Pure functions over measured points. Two sorts of axes are kept apart: what an operator chooses
(workers, slots, threshold, policy) is chosen, and what the world does (how fast requests come, how
many adapters they ask for) is not, so each answer holds for one state of the world.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

from sim.experiment import Point
from sim.report.intervals import Estimate
from sim.report.metrics import Metric, figure
from sim.slo import Target, Verdict, verdict
from sim.variants import THRESHOLD_PATH, Value

# DistServe (Zhong et al., OSDI 2024) takes as goodput the highest rate at which 90% of the requests
# keep their objectives; beyond it goodput no longer follows the load.
KNEE_ATTAINMENT: Final = 0.9
WORLD: Final = ("speed", "adapters", "locality", "zipf")
THRESHOLDS: Final = ("threshold", THRESHOLD_PATH)


class Direction(StrEnum):
    """Which way an axis goes for the load on a worker to rise."""

    RISING = "rising"
    FALLING = "falling"


# The axes along which load rises, in the order in which one is looked for.
LOAD_AXES: Final[dict[str, Direction]] = {
    "speed": Direction.RISING,
    "workers": Direction.FALLING,
    "adapters": Direction.RISING,
}


class Fleet(msgspec.Struct, frozen=True):
    """The smallest fleet of one state of the world: None where no point meets the targets.

    `smaller` is the best point with the next smaller number of workers, where one was measured.
    `larger_misses` are numbers of workers above it of which no point meets the targets.
    """

    world: dict[str, Value]
    point: Point | None
    smaller: Point | None
    larger_misses: tuple[int, ...]


class Choosing(msgspec.Struct, frozen=True):
    """The value to take along one axis, and all that cannot be told from the best."""

    point: Point
    path: str
    value: Value
    plateau: tuple[Value, ...]


class Knee(msgspec.Struct, frozen=True):
    """Where overload begins along an axis, with all else equal (`rest`).

    Walking towards more load, `knee` is the first point at which less than `KNEE_ATTAINMENT` of the
    requests offered are answered within the objectives, or a target is missed; `before` is the last
    point before it. `knee` is None where there is none up to the highest load.
    """

    axis: str
    rest: dict[str, Value]
    before: Point | None
    knee: Point | None


def measured(points: Sequence[Point]) -> list[Point]:
    """The points that the engine model did not refuse."""
    return [point for point in points if point.refused is None]


# Which point is better.


def apart(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals have nothing in common, infinity being equal to itself."""
    if one.mean is None or other.mean is None:
        return one.mean is not other.mean
    return one.low > other.high or other.low > one.high


def order(point: Point, targets: Sequence[Target]) -> tuple[float, ...]:
    """A key that sorts the better point first: verdict, SLO attained, p99 of the first token."""
    estimates = point.estimates
    return (
        -verdict(targets, estimates),
        -(estimates[Metric.ATTAINMENT].mean or 0.0),
        estimates[Metric.TTFT_P99].high,
    )


def choose(
    points: Sequence[Point], path: str, targets: Sequence[Target], *, prefer: Value = None
) -> Choosing:
    """The value of one axis to take.

    All points that cannot be told from the best one are a plateau; of a row of numbers the middle
    one is taken, which is the farthest from where it ends on either side, unless `prefer` is there.
    """
    assert points
    best = min(points, key=lambda point: order(point, targets))
    ranks = best.estimates
    equal = [
        point
        for point in points
        if verdict(targets, point.estimates) == verdict(targets, ranks)
        and not apart(point.estimates[Metric.ATTAINMENT], ranks[Metric.ATTAINMENT])
        and not apart(point.estimates[Metric.TTFT_P99], ranks[Metric.TTFT_P99])
    ]
    preferred = [point for point in equal if point.choice[path] == prefer]
    chosen = (preferred or [equal[len(equal) // 2]])[0]
    return Choosing(chosen, path, chosen.choice[path], tuple(point.choice[path] for point in equal))


# The answers.


def smallest_fleets(points: Sequence[Point], targets: Sequence[Target]) -> list[Fleet]:
    """For each state of the world the point with the fewest workers that meets all targets."""
    fleets = []
    for world, group in _groups(points, WORLD):
        sizes: dict[int, Point] = {}  # the best point of each size
        for point in sorted(group, key=lambda point: order(point, targets)):
            workers = point.choice["workers"]
            assert isinstance(workers, int)
            sizes.setdefault(workers, point)
        met = [
            size for size in sorted(sizes) if verdict(targets, sizes[size].estimates) is Verdict.MET
        ]
        if not met:
            fleets.append(Fleet(world, None, sizes[max(sizes)], ()))
            continue
        smaller = [size for size in sizes if size < met[0]]
        fleets.append(
            Fleet(
                world,
                _settled(sizes[met[0]], group, targets).point,
                sizes[max(smaller)] if smaller else None,
                tuple(size for size in sorted(sizes) if size > met[0] and size not in met),
            )
        )
    return fleets


def _threshold_path(point: Point) -> str | None:
    return next((path for path in THRESHOLDS if path in point.choice), None)


def _settled(best: Point, group: Sequence[Point], targets: Sequence[Target]) -> Choosing:
    """The best point, with the threshold that is chosen among those with all else equal."""
    path = _threshold_path(best)
    if path is None:
        return Choosing(best, "", None, ())
    rest = {**best.choice, path: None}
    return choose([point for point in group if {**point.choice, path: None} == rest], path, targets)


def thresholds(points: Sequence[Point], targets: Sequence[Target]) -> list[Choosing]:
    """The threshold for each state of the world, at the smallest fleet where workers vary."""
    if _threshold_path(points[0]) is None:
        return []
    answers = []
    for _, group in _groups(points, WORLD):
        best = min(group, key=lambda point: order(point, targets))
        if "workers" in best.choice:
            fleet = smallest_fleets(group, targets)[0]
            best = fleet.point or fleet.smaller or best
        answers.append(_settled(best, group, targets))
    return answers


def knees(points: Sequence[Point], targets: Sequence[Target]) -> list[Knee]:
    """Where overload begins, for each combination of the other axes' values."""
    axis = next(
        (
            axis
            for axis in LOAD_AXES
            if axis in points[0].choice and len({point.choice[axis] for point in points}) > 1
        ),
        None,
    )
    if axis is None:
        return []
    others = [name for name in points[0].choice if name != axis]
    found = []
    for rest, group in _groups(points, others):
        before: Point | None = None
        knee: Point | None = None
        falling = LOAD_AXES[axis] is Direction.FALLING
        for point in sorted(group, key=lambda point: _number(point, axis), reverse=falling):
            if overloaded(point, targets):
                knee = point
                break
            before = point
        found.append(Knee(axis, rest, before, knee))
    return found


def overloaded(point: Point, targets: Sequence[Target]) -> bool:
    """Whether goodput has stopped following the load here, or a target is missed."""
    estimates = point.estimates
    return (estimates[Metric.ATTAINMENT].mean or 0.0) < KNEE_ATTAINMENT or verdict(
        targets, estimates
    ) is Verdict.MISSED


def _number(point: Point, axis: str) -> float:
    value = point.choice[axis]
    assert isinstance(value, int | float)
    return value


def _groups(
    points: Sequence[Point], names: Sequence[str]
) -> list[tuple[dict[str, Value], list[Point]]]:
    """The points by their values of `names`, in the order of their coming."""
    groups: dict[tuple[tuple[str, Value], ...], list[Point]] = {}
    for point in points:
        key = tuple((name, point.choice[name]) for name in names if name in point.choice)
        groups.setdefault(key, []).append(point)
    return [(dict(key), group) for key, group in groups.items()]


# In words.


def _at(world: dict[str, Value]) -> str:
    named = ", ".join(f"{name}={value}" for name, value in world.items())
    return f"With {named}: " if named else ""


def say_fleet(fleet: Fleet, targets: Sequence[Target]) -> list[str]:
    """The smallest fleet, its margins, and what the next smaller one would give."""
    at = _at(fleet.world)
    if fleet.point is None:
        assert fleet.smaller is not None
        estimates = fleet.smaller.estimates
        return [
            f"{at}No fleet that was tried surely meets the SLO. The largest, {fleet.smaller.name}:",
            *(f"  {target.margin(estimates[target.metric])}" for target in targets),
        ]
    lines = [f"{at}The smallest fleet that meets the SLO: {fleet.point.name}."]
    estimates = fleet.point.estimates
    lines.extend(f"  {target.margin(estimates[target.metric])}" for target in targets)
    if fleet.smaller is not None:
        estimates = fleet.smaller.estimates
        lines.append(f"  One size smaller, {fleet.smaller.name}:")
        lines.extend(f"  {target.margin(estimates[target.metric])}" for target in targets)
    if fleet.larger_misses:
        sizes = ", ".join(str(size) for size in fleet.larger_misses)
        lines.append(f"  Careful: {sizes} workers do not meet it; the answer is not robust.")
    return lines


def say_choosing(choosing: Choosing) -> str:
    """The value to configure, and how much it matters."""
    choice = choosing.point.choice
    world = {name: value for name, value in choice.items() if name in WORLD}
    path = THRESHOLD_PATH if choosing.path in THRESHOLDS else choosing.path
    if len(choosing.plateau) == 1:
        why = "the best of those tried"
    else:
        values = ", ".join(str(value) for value in choosing.plateau)
        why = f"the middle of {values}, which cannot be told apart"
    fleet = "".join(
        f", {name}={value}"
        for name, value in choice.items()
        if name != choosing.path and name not in world
    )
    at = f" (at {fleet[2:]})" if fleet else ""
    return f"{_at(world)}Put {path}: {choosing.value} into the configuration{at}: {why}."


def say_knee(knee: Knee) -> str:
    """Where overload begins, in the axis and in requests a second."""
    at = _at(knee.rest)

    def place(point: Point) -> str:
        value, rate = point.choice[knee.axis], point.offered_rps
        if rate is None:
            return f"{knee.axis}={value}"
        if knee.axis == "workers" and isinstance(value, int):
            return f"workers={value} ({rate / value:.2f} requests/s offered for each)"
        return f"{knee.axis}={value} ({rate:.2f} requests/s offered)"

    if knee.knee is None:
        assert knee.before is not None
        return f"{at}No overload up to {place(knee.before)}."
    estimates = knee.knee.estimates
    mean = estimates[Metric.TTFT_P99].mean
    p99 = "infinite" if mean is None else figure(Metric.TTFT_P99, mean)
    gives = (
        f"there {figure(Metric.ATTAINMENT, estimates[Metric.ATTAINMENT].mean)} of the requests keep "
        f"the SLO, and TTFT p99 is {p99}"
    )
    if knee.before is None:
        return f"{at}Overloaded at every point, from {place(knee.knee)} on: {gives}."
    attained = estimates[Metric.ATTAINMENT].mean or 0.0
    what = "Overload begins" if attained < KNEE_ATTAINMENT else "The SLO is first missed"
    return f"{at}{what} between {place(knee.before)} and {place(knee.knee)}: {gives}."
