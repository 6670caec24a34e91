"""When a peer has been silent for too long: one lazy timer a connection.

The rule: a deadline moves with every byte, and its timer does not. It fires at most every `STEP_S`,
looks at the deadline as it stands then, and sleeps again if it has moved. So a chunk costs an
assignment instead of a timer that is cancelled and made anew.
"""

import asyncio
from collections.abc import Callable
from math import inf
from typing import Final

STEP_S: Final = 60.0


def _nothing() -> None:
    """It is over."""


class Patience:
    """Calls `expired` once when `due`, a time of the loop, has come; `wait` begins again."""

    __slots__ = ("_expired", "_fires_at", "_loop", "_timer", "due")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = inf
        self.due = inf

    def wait(self, seconds: float) -> None:
        """From now on, so long. Later moves may be made by setting `due`, if not to before that."""
        now = self._loop.time()
        self.due = now + seconds
        if self.due < self._fires_at:
            self._arm(now)

    def _arm(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = min(self.due, now + STEP_S)
        self._timer = self._loop.call_at(self._fires_at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._fires_at = inf
        now = self._loop.time()
        if now < self.due:
            self._arm(now)
        else:
            self.due = inf
            self._expired()

    def end(self) -> None:
        """Never call again, nor hold on to who is called."""
        self.due = self._fires_at = inf
        self._expired = _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
