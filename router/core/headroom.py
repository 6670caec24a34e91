"""Slots that fall idle in time, for tenants that leave others too few of them.

Answers hold a slot for seconds: who has a right to one, and asks, would get it too late. So as soon as
a worker has fewer slots left than a tenant beyond its share is to leave (shares.py), one of that
tenant's is closed to new users, one at a time; fallen idle it is open again, since the same rule keeps
it now. The slot that will be idle soonest is, as far as one can tell, that of the fewest users; one
that departs anyway is taken before it.
"""

from router.core.fleet import Fleet, Worker
from router.core.residency import RESIDENT, Slot


class Headroom:
    """The slots of a fleet that are closed for it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._closed: dict[Worker, Slot] = {}

    def keep(self, worker: Worker) -> None:
        """A slot has come into use, or idle: close one, where too few are left."""
        slots, fleet = worker.slots, self._fleet
        if slots.closed is not None or fleet.tenants.alone:
            return
        left = slots.capacity - slots.in_use
        yields: dict[str, bool] = {}
        best: tuple[bool, int, int] | None = None
        chosen: Slot | None = None
        for slot in slots:
            if slot.phase is not RESIDENT or not slot.users or slot.pinned:
                continue
            tenant = slot.tenant
            if tenant not in yields:
                yields[tenant] = slots.shares.must_yield(tenant, left)
            if yields[tenant]:
                rank = (not slot.departs, slot.users, -fleet.holder_count(slot.adapter))
                if best is None or rank < best:
                    best, chosen = rank, slot
        if chosen is not None:
            fleet.close_slot(worker, chosen)
            self._closed[worker] = chosen

    def released(self, worker: Worker) -> None:
        """A job has left the worker."""
        slot = self._closed.get(worker)
        if slot is not None and (not slot.users or worker.slots.closed is not slot):
            del self._closed[worker]
            self._fleet.open_slot(worker, slot)
        self.keep(worker)
