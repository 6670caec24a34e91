"""Find the smallest fleet that gives a service level: workers first, then slots and threshold.

No full grid: more workers never serve a trace worse, but for luck, so the number is found by doubling
and bisection, a handful of points. Slots and threshold are then compared at that size, and with the
better ones the size is searched again. Last, both neighbours of the answer are measured: the smaller
fleet must miss, and the larger must not, or else the answer stands on luck and says so.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from sim.answers import Choosing, choose
from sim.experiment import Point
from sim.slo import Target, Verdict, verdict
from sim.variants import Choice

SLOTS: Final = (4, 8, 16, 32, 64)
THRESHOLDS: Final = (8, 16, 32, 64, 128, 256)


class Measure(Protocol):
    """Measures points, in the order of their choices."""

    def __call__(self, choices: Sequence[Choice], *, optional: bool = False) -> list[Point]:
        """See `sim.experiment.Experiment.measure`."""


class Settings(msgspec.Struct, frozen=True):
    """What is searched. `slots` is None where nobody asks for an adapter, or none can be had."""

    workers: int
    slots: int | None
    threshold: int

    @property
    def choice(self) -> Choice:
        """As a choice of a sweep's axes."""
        slots = () if self.slots is None else (("slots", self.slots),)
        return (("workers", self.workers), *slots, ("threshold", self.threshold))


class Recommendation(msgspec.Struct, frozen=True):
    """The answer: `met` tells whether the settings give the service level.

    `smaller` and `larger` are the neighbours, where there may be such fleets. `points` is all that
    was measured, in that order.
    """

    settings: Settings
    met: bool
    point: Point
    smaller: Point | None
    larger: Point | None
    slots: Choosing | None
    threshold: Choosing
    points: tuple[Point, ...]


class Search:
    """One search. `more` is told how many points are about to be measured."""

    def __init__(
        self, measure: Measure, targets: Sequence[Target], *, more: Callable[[int], None]
    ) -> None:
        self._measure = measure
        self._targets = targets
        self._more = more
        self._known: dict[Settings, Point] = {}

    def run(self, start: Settings, max_workers: int) -> Recommendation:
        """Search from `start`, whose slots and threshold are kept unless others are better."""
        first = self._smallest(start, max_workers)
        settings = msgspec.structs.replace(start, workers=first or max_workers)
        slots: Choosing | None = None
        if settings.slots is not None:
            slots = self._choose(settings, "slots", SLOTS)
            settings = msgspec.structs.replace(settings, slots=slots.value)
        threshold = self._choose(settings, "threshold", THRESHOLDS)
        settings = msgspec.structs.replace(settings, threshold=threshold.value)
        again = self._smallest(settings, settings.workers)
        settings = msgspec.structs.replace(settings, workers=again or settings.workers)
        while settings.workers > 1 and self._meets(smaller := _resized(settings, -1)):
            settings = smaller
        return Recommendation(
            settings=settings,
            met=self._meets(settings),
            point=self._point(settings),
            smaller=self._point(_resized(settings, -1)) if settings.workers > 1 else None,
            larger=self._point(_resized(settings, 1)) if settings.workers < max_workers else None,
            slots=slots,
            threshold=threshold,
            points=tuple(self._known.values()),
        )

    def _smallest(self, settings: Settings, most: int) -> int | None:
        """The smallest number of workers up to `most` that meets the targets, by bisection."""

        def meets(workers: int) -> bool:
            return self._meets(msgspec.structs.replace(settings, workers=workers))

        low, high = 0, 1  # `low` misses, none at all does so surely
        while not meets(high):
            if high == most:
                return None
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            if meets(middle):
                high = middle
            else:
                low = middle
        return high

    def _choose(self, settings: Settings, path: str, values: Sequence[int]) -> Choosing:
        """The best value of one setting, all else being equal; the present one if it is as good."""
        present = getattr(settings, path)
        tried = sorted({present, *values})
        points = self._points(
            [msgspec.structs.replace(settings, **{path: value}) for value in tried], optional=True
        )
        return choose(
            [point for point in points if point.refused is None],
            path,
            self._targets,
            prefer=present,
        )

    def _meets(self, settings: Settings) -> bool:
        return verdict(self._targets, self._point(settings).estimates) is Verdict.MET

    def _point(self, settings: Settings) -> Point:
        return self._points([settings])[0]

    def _points(self, wanted: Sequence[Settings], *, optional: bool = False) -> list[Point]:
        new = [settings for settings in wanted if settings not in self._known]
        if new:
            self._more(len(new))
            points = self._measure([settings.choice for settings in new], optional=optional)
            self._known.update(zip(new, points, strict=True))
        return [self._known[settings] for settings in wanted]


def _resized(settings: Settings, by: int) -> Settings:
    return msgspec.structs.replace(settings, workers=settings.workers + by)
