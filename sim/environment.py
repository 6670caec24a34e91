"""SimPy's environment, with events at a moment rather than after a delay.

The rule: a moment that is computed once is the moment at which the event happens, to the last bit.
`now + (moment - now)` is not, and two ways to the same moment would then differ.

Ranks order what happens at one moment: SimPy's own events first (URGENT 0, NORMAL 1), then the
engines' step boundaries, each engine by a rank of its own. So what arrives at the very moment of a
boundary is seen by the step that begins there, however the two came about.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any, Final

import simpy

FIRST_RANK: Final = 2


class Moment:
    """What is certain to happen: one callback, at one moment. A SimPy event costs three times that."""

    __slots__ = ("callback", "value")

    def __init__(self, callback: "Callable[[Moment], None]", value: object) -> None:
        self.callback = callback
        self.value = value


class Environment(simpy.Environment):
    """Virtual time. `passed_at` is when a boundary was last reached, `passed_rank` whose it was."""

    # As SimPy's, which costs a call into Python each time, some twenty times a request.
    now = property(attrgetter("_now"))

    def __init__(self) -> None:
        super().__init__(0.0)
        self.passed_at = -1.0
        self.passed_rank = 0
        self._ranks = FIRST_RANK

    def next_rank(self) -> int:
        """A rank for one more engine."""
        self._ranks += 1
        return self._ranks - 1

    def at(
        self,
        moment: float,
        callback: Callable[[Moment], None],
        rank: int = 1,
        value: object = None,
    ) -> Moment:
        """Call back at `moment`, which is not in the past."""
        happens = Moment(callback, value)
        heappush(self._queue, (moment, rank, next(self._eid), happens))  # type: ignore[misc]  # a rank beyond SimPy's two, and no event of its
        return happens

    def step(self) -> None:
        """Let the next thing happen. Raises `simpy.core.EmptySchedule` where there is none."""
        queue: Any = self._queue
        if queue and type(queue[0][3]) is Moment:
            self._now, _, _, happens = heappop(queue)
            happens.callback(happens)
        else:
            super().step()
