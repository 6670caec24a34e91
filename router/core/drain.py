"""How fast the queue drains: jobs served a second while others wait.

Only then is it the fleet's capacity that is measured, and not how many happen to come. The rate of the
last time of contention is kept for the next one, but not for long: what turns jobs away by it would
else never learn that it has become wrong. O(1).
"""

from typing import Final

WINDOW: Final = 32
FRESH_S: Final = 30.0


class DrainRate:
    """`per_s` is 0.0 until it was seen once."""

    __slots__ = ("_measured_at", "_served", "_since", "per_s")

    def __init__(self) -> None:
        self.per_s = 0.0
        self._served = -1
        self._since = 0.0
        self._measured_at = 0.0

    def served(self, now: float) -> None:
        """A job was served while somebody waited."""
        if self._served < 0:
            self._since = now
        self._served += 1
        if self._served == WINDOW:
            if now > self._since:
                self.per_s = self._served / (now - self._since)
                self._measured_at = now
            self._served = 0
            self._since = now

    def fresh(self, now: float) -> float:
        """The rate, if it was measured of late; else 0.0, and nobody should be turned away by it."""
        return self.per_s if now - self._measured_at <= FRESH_S else 0.0

    def pause(self) -> None:
        """Nobody waits any more: what comes next is another time of contention."""
        self._served = -1
