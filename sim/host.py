"""A machine that several engines share: each slows the others while it works.

The rule: a step takes `1 + contention × others` of its time, `others` being the engines of the host
that are at work when it begins. Workers with a GPU each share nothing that counts; workers on the
cores of one CPU share its memory's bandwidth. The calibration says how much (`host_contention`).
"""

from typing import Final, Protocol

PERMILLE: Final = 1000


class Sharer(Protocol):
    """An engine of the host."""

    def neighbour_changed(self) -> None:
        """Another one has begun to work, or has stopped."""


class Host:
    """The engines of one machine that share what their steps need."""

    def __init__(self) -> None:
        self._sharers: list[Sharer] = []
        self._at_work = 0

    def join(self, sharer: Sharer) -> None:
        """One more engine."""
        self._sharers.append(sharer)

    def slowdown(self, contention: int) -> int:
        """What a step of an engine at work takes now, in thousandths of its time alone.

        `contention` is in thousandths too, so that times stay whole numbers.
        """
        return PERMILLE + contention * (self._at_work - 1)

    def changed(self, sharer: Sharer, *, at_work: bool) -> None:
        """An engine has begun to work, or has stopped."""
        self._at_work += 1 if at_work else -1
        for other in self._sharers:
            if other is not sharer:
                other.neighbour_changed()
