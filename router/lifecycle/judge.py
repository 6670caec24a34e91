"""Whether a new version of an adapter is worse than the rest, by how its requests end.

The rest is what is served beside it in the same time: the other versions and the other adapters. A
worker that fails then fails both, so a new version is not blamed for it. A share of failures is known
only within bounds, Wilson's score interval (E. B. Wilson, "Probable inference", 1927); a version is
worse where even the low end of its own is above the high end of the rest's.
Pure: it counts.
"""

from math import sqrt
from typing import Final

Z: Final = 2.58  # 99% of a normal distribution: a look at every request must not cry wolf
FAILURES_MIN: Final = 5  # what one worker takes with it, ending, is no verdict
SELDOM: Final = 0.2


class Tally:
    """Requests that ended, and how many of them in failure."""

    __slots__ = ("failures", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.failures = 0

    def add(self, *, failed: bool) -> None:
        """Count one."""
        self.requests += 1
        self.failures += failed


def bounds(failures: int, requests: int) -> tuple[float, float]:
    """Between which shares the true share of failures is."""
    if not requests:
        return 0.0, 1.0
    share = failures / requests
    square = Z * Z
    middle = share + square / (2 * requests)
    half = Z * sqrt(share * (1 - share) / requests + square / (4 * requests * requests))
    scale = 1 + square / requests
    # The share itself is between them, whatever was rounded.
    return min(share, max(0.0, (middle - half) / scale)), max(
        share, min(1.0, (middle + half) / scale)
    )


def is_worse(new: Tally, rest: Tally) -> bool:
    """Whether the new version fails more often than what is served beside it, beyond chance."""
    if new.failures < FAILURES_MIN:
        return False
    low, _ = bounds(new.failures, new.requests)
    _, high = bounds(rest.failures, rest.requests)
    if (
        not rest.failures
    ):  # little was served beside it: it is measured against one that fails seldom
        high = min(high, SELDOM)
    return low > high
