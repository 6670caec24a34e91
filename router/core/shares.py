"""Adapter slots and places among tenants: who floods may not take all that a worker has.

A slot is held as long as answers run, for seconds, and so is a place of `max_ongoing_requests`: a fair
queue alone comes too late for a tenant that finds none. The rule, on each worker, for each of the two:

  - a tenant may always take a slot within its share: its weight's part of the slots, one at least;
  - beyond, it may take what is left after each other tenant that is active can still have what it used
    of late, as far as its own share goes, and one of them one more.

So one tenant alone uses all slots, and one that uses few costs the others few. Tenants are active for
`ACTIVE_S` after their last job; what was used of late fades as slowly. Slots in use are what counts, by
the tenant that first used the adapter there. O(active tenants), and O(1) where there is one.
"""

from collections import OrderedDict
from collections.abc import Mapping
from math import exp, fsum
from typing import Final

ACTIVE_S: Final = 10.0
TENANTS_MAX: Final = 32


class Tenants:
    """Who is active, and their weights: 1 where not named. Of too many, the last to come count."""

    __slots__ = ("_seen", "_weights", "now")

    def __init__(self) -> None:
        self._weights: Mapping[str, float] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()
        self.now = 0.0  # as of the last arrival, or tick: only then does anything fade

    def weigh(self, weights: Mapping[str, float]) -> None:
        """What each tenant's share is worth."""
        self._weights = weights

    def arrived(self, tenant: str, now: float) -> None:
        """A job of the tenant has come."""
        seen = self._seen
        seen[tenant] = now
        seen.move_to_end(tenant)
        while len(seen) > TENANTS_MAX:
            seen.popitem(last=False)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Time has passed: who has not asked for long is not active any more."""
        self.now = now
        seen = self._seen
        while seen and next(iter(seen.values())) < now - ACTIVE_S:
            seen.popitem(last=False)

    @property
    def alone(self) -> bool:
        """Whether no more than one is active."""
        return len(self._seen) <= 1

    def weights(self, tenant: str) -> dict[str, float]:
        """The weights of all who are active, and of `tenant`."""
        weights = {name: self._weights.get(name, 1.0) for name in self._seen}
        weights[tenant] = self._weights.get(tenant, 1.0)
        return weights


class Shares:
    """One worker's slots, or its places, in use by tenant."""

    __slots__ = ("_capacity", "_counts", "_peaks", "tenants")

    def __init__(self, capacity: int) -> None:
        self.tenants = Tenants()  # of the fleet, once the worker is in one
        self._capacity = capacity
        self._counts: dict[str, int] = {}
        self._peaks: dict[str, tuple[float, float]] = {}  # the most of late, and when that was

    def opened(self, tenant: str) -> None:
        """A slot has come into use, by the tenant."""
        count = self._counts[tenant] = self._counts.get(tenant, 0) + 1
        if count >= self._of_late(tenant):
            peaks = self._peaks
            peaks[tenant] = (count, self.tenants.now)
            if len(peaks) > 2 * TENANTS_MAX:
                self._peaks = {name: peaks[name] for name in self._counts if name in peaks}

    def closed(self, tenant: str) -> None:
        """A slot of the tenant's is in use no more."""
        left = self._counts[tenant] - 1
        if left:
            self._counts[tenant] = left
        else:
            del self._counts[tenant]

    def _of_late(self, tenant: str) -> float:
        peak, at = self._peaks.get(tenant, (0.0, 0.0))
        return peak * exp((at - self.tenants.now) / ACTIVE_S)

    def may_open(self, tenant: str, left: int) -> bool:
        """Whether the tenant may take one of the `left` slots that are not in use."""
        if left <= 0:
            return False
        if self.tenants.alone:
            return True
        weights = self.tenants.weights(tenant)
        part = self._capacity / fsum(weights.values())
        counts = self._counts
        if counts.get(tenant, 0) + 1 <= max(1.0, part * weights[tenant]):
            return True
        reserved = 1.0  # one for whichever of them comes
        for other, weight in weights.items():
            if other != tenant:
                wanted = min(part * weight, self._of_late(other))
                reserved += max(0.0, wanted - counts.get(other, 0))
        return left >= reserved + 1.0

    def entitled(self, tenant: str) -> bool:
        """Whether a slot more would be within the tenant's share."""
        weights = self.tenants.weights(tenant)
        share = self._capacity * weights[tenant] / fsum(weights.values())
        return self._counts.get(tenant, 0) + 1 <= max(1.0, share)

    def beyond(self, tenant: str) -> bool:
        """Whether the tenant uses more than its share."""
        weights = self.tenants.weights(tenant)
        share = self._capacity * weights[tenant] / fsum(weights.values())
        return self._counts.get(tenant, 0) > share
