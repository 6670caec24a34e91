"""Adapter slots and places among tenants: who floods may not take all that a worker has.

A slot is held as long as answers run, for seconds, and so is a place of `max_ongoing_requests`: a fair
queue alone comes too late for a tenant that finds none. A tenant's level is the larger of its parts of
the fleet's slots and of its places, by its weight: its dominant share, by which Ghodsi et al. share
unlike resources ("Dominant resource fairness", NSDI 2011). The rule, on each worker, for each of both:

  - a tenant whose level stays within its share, its weight's part of all, takes what is left;
  - beyond, it leaves to each other active tenant of a lower level what that used here of late and the
    square root of it, for that is how far a number of independent users strays; one at least to them
    all. So what it needs next is there when it asks, and who floods places has no claim to slots;
  - its first on a worker it may always have.

So one tenant alone uses all slots, and one that uses few costs the others few. Tenants are active for
`ACTIVE_S` after their last job; what was used of late fades as slowly. Slots in use are what counts, by
the tenant that first used the adapter there. O(active tenants), and O(1) where there is one.
"""

from collections import OrderedDict
from collections.abc import Mapping
from math import exp, fsum, sqrt
from typing import Final

ACTIVE_S: Final = 10.0
TENANTS_MAX: Final = 32


class Use:
    """So much of something that there is, and who uses how much of it."""

    __slots__ = ("capacity", "counts")

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.counts: dict[str, int] = {}

    def add(self, tenant: str, more: int) -> int:
        """Count so much more for the tenant, or less; how much that makes."""
        count = self.counts.get(tenant, 0) + more
        if count:
            self.counts[tenant] = count
        else:
            del self.counts[tenant]
        return count

    def part(self, tenant: str, more: int = 0) -> float:
        """The tenant's part of it, with so much more."""
        return (self.counts.get(tenant, 0) + more) / max(1, self.capacity)


class Tenants:
    """Who is active, their weights, 1 where not named, and what they use of the fleet.

    Of too many that are active, the last to come count.
    """

    __slots__ = ("_seen", "_weights", "now", "places", "slots")

    def __init__(self) -> None:
        self._weights: Mapping[str, float] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()
        self.slots = Use()
        self.places = Use()
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

    def weight(self, tenant: str) -> float:
        """What the tenant's share is worth."""
        return self._weights.get(tenant, 1.0)

    def weights(self, tenant: str) -> dict[str, float]:
        """The weights of all who are active, and of `tenant`."""
        weights = {name: self._weights.get(name, 1.0) for name in self._seen}
        weights[tenant] = self._weights.get(tenant, 1.0)
        return weights

    def share(self, tenant: str) -> float:
        """The tenant's part of the whole, by the weights of all who are active."""
        weights = self.weights(tenant)
        return weights[tenant] / fsum(weights.values())

    def level(self, tenant: str) -> float:
        """The larger of the parts that the tenant uses, of slots and of places, by its weight."""
        return max(self.slots.part(tenant), self.places.part(tenant)) / self.weight(tenant)

    def beyond(self, tenant: str) -> bool:
        """Whether the tenant uses more than its share."""
        return self.level(tenant) * fsum(self.weights(tenant).values()) > 1.0


class Shares:
    """One worker's slots, or its places, in use by tenant."""

    __slots__ = ("_fleet", "_here", "_peaks", "tenants")

    def __init__(self, capacity: int) -> None:
        self._here = Use(capacity)
        self._peaks: dict[str, tuple[float, float]] = {}  # the most of late, and when that was
        self.tenants = Tenants()
        self._fleet = self.tenants.slots
        self._fleet.capacity = capacity

    def join(self, tenants: Tenants, fleet: Use) -> None:
        """The worker is of a fleet, of whose slots, or places, these are some."""
        self.tenants, self._fleet = tenants, fleet
        self._count(1)

    def leave(self) -> None:
        """The worker is of no fleet any more; what is in use here ends by itself."""
        self._count(-1)
        self._fleet = Use()
        self._count(1)

    def _count(self, sign: int) -> None:
        self._fleet.capacity += sign * self._here.capacity
        for tenant, count in self._here.counts.items():
            self._fleet.add(tenant, sign * count)

    def opened(self, tenant: str) -> None:
        """A slot has come into use, by the tenant."""
        count = self._here.add(tenant, 1)
        self._fleet.add(tenant, 1)
        if count >= self._of_late(tenant):
            peaks = self._peaks
            peaks[tenant] = (count, self.tenants.now)
            if len(peaks) > 2 * TENANTS_MAX:
                self._peaks = {name: peaks[name] for name in self._here.counts if name in peaks}

    def closed(self, tenant: str) -> None:
        """A slot of the tenant's is in use no more."""
        self._here.add(tenant, -1)
        self._fleet.add(tenant, -1)

    def _of_late(self, tenant: str) -> float:
        peak, at = self._peaks.get(tenant, (0.0, 0.0))
        return peak * exp((at - self.tenants.now) / ACTIVE_S)

    def _level(self, tenant: str) -> float:
        """The tenant's level with one more of these; 0 for the first, which it may always have."""
        if not self._here.counts.get(tenant, 0):
            return 0.0
        tenants = self.tenants
        return max(self._fleet.part(tenant, 1) / tenants.weight(tenant), tenants.level(tenant))

    def may_open(self, tenant: str, left: int) -> bool:
        """Whether the tenant may take one of the `left` slots that are not in use."""
        if left <= 0:
            return False
        tenants = self.tenants
        if tenants.alone:
            return True
        level = self._level(tenant)
        weights = tenants.weights(tenant)
        if level * fsum(weights.values()) <= 1.0:
            return True
        return left >= self._kept(tenant, level, weights) + 1.0

    def _kept(self, tenant: str, level: float, weights: Mapping[str, float]) -> float:
        """What a tenant at that level leaves to those below it."""
        tenants, here = self.tenants, self._here
        kept = 0.0
        for other, weight in weights.items():
            if other != tenant and tenants.level(other) < level:
                of_late = self._of_late(other)
                wanted = min(of_late + sqrt(of_late), level * weight * here.capacity)
                kept += max(0.0, wanted - here.counts.get(other, 0))
                kept = max(kept, 1.0)  # for whichever of them comes
        return kept

    def entitled(self, tenant: str) -> bool:
        """Whether the tenant is within its share with a slot more."""
        return self._level(tenant) * fsum(self.tenants.weights(tenant).values()) <= 1.0

    def yields(self, other: str, tenant: str) -> bool:
        """Whether `other` is so far beyond its share that the tenant may have one of its slots."""
        if other == tenant or not self.tenants.beyond(other):
            return False
        return self._level(tenant) < self.tenants.level(other)

    def must_yield(self, tenant: str, left: int) -> bool:
        """Whether the tenant is beyond its share, and `left` are fewer than it should leave."""
        tenants = self.tenants
        if not tenants.beyond(tenant):
            return False
        return left < self._kept(tenant, tenants.level(tenant), tenants.weights(tenant))
