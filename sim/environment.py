"""SimPy's environment, with events at a moment rather than after a delay.

The rule: a moment that is computed once is the moment at which the event happens, to the last bit.
`now + (moment - now)` is not, and two ways to the same moment would then differ.

Ranks order what happens at one moment: SimPy's own events first (URGENT 0, NORMAL 1), then the
engines' step boundaries, each engine by a rank of its own. So what arrives at the very moment of a
boundary is seen by the step that begins there, however the two came about.
"""

from collections.abc import Callable
from heapq import heappush
from operator import attrgetter
from typing import Final

import simpy

FIRST_RANK: Final = 2


class Moment(simpy.Event):
    """An event that is certain to happen: one callback, at one moment."""

    def __init__(
        self, env: simpy.Environment, callback: Callable[[simpy.Event], None], value: object
    ) -> None:
        # What `Event.__init__`, `succeed` and `callbacks.append` would do, in one.
        self.env = env
        self.callbacks = [callback]
        self._value = value
        self._ok = True


class Environment(simpy.Environment):
    """Virtual time. `passed_at` is when a boundary was last reached, `passed_rank` whose it was."""

    # As SimPy's, which costs a call into Python each time, some twenty times a request.
    now = property(attrgetter("_now"))

    def __init__(self) -> None:
        super().__init__()
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
        callback: Callable[[simpy.Event], None],
        rank: int = 1,
        value: object = None,
    ) -> simpy.Event:
        """Call back at `moment`, which is not in the past."""
        event = Moment(self, callback, value)
        heappush(self._queue, (moment, rank, next(self._eid), event))  # type: ignore[misc]  # a rank beyond SimPy's two
        return event
