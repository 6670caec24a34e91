"""Where jobs wait when nobody can take them: fair by tokens, bounded in number, in adapter's reach.

Each job has a tag, and the least tag is served first (self-clocked fair queueing, Golestani 1994):

    tag = max(clock, last tag of its tenant and priority) + tokens × 16^priority / weight

`clock` is the tag of whoever was served last in order. So a tenant that floods pushes its own tags
ahead, and one that asks for less than its share goes next. A class of priority (vLLM's: less is more
urgent) is worth 16 times the next: not absolute, so the last class is served too, after so much more
of the others' work. Alone, a tenant is served first come first served.

Two exceptions to the order, both bounded:
  - a job whose adapter is at hand may go before one that needs a load, if its tag is not more than
    `locality_tokens` behind, or 1/32 of that behind another tenant's: that is the most that locality
    costs anybody;
  - a job that cannot be placed for want of a slot is passed by, until the router closes a slot to new
    users for it (see router.py). So no adapter starves under continuing load.
The queue orders and bounds; it neither places nor times out, which is the router's part.

Cost: joining and leaving are O(log n). Whom a worker can serve is O(slots): never a scan over all.
"""

import asyncio
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

from router.core.fleet import Worker
from router.core.job import AdapterRef, Job
from router.core.residency import Slot

GrantT = TypeVar("GrantT")
PRIORITY_BASE: Final = 16.0
PRIORITY_MOST: Final = 3  # classes either way
ACROSS_TENANTS: Final = 1 / 32
LOOKED_AT_MAX: Final = 256
FLOWS_MAX: Final = 4096
STALE_MIN: Final = 64


class Waiter(Generic[GrantT]):
    """One job that waits. `granted` ends with its grant, or with the exception that it gets."""

    __slots__ = (
        "claim_until",
        "cost",
        "granted",
        "job",
        "joined_at",
        "seq",
        "tag",
        "tried",
        "unit",
        "waits",
    )

    def __init__(self, job: Job, granted: "asyncio.Future[GrantT]", joined_at: float) -> None:
        self.job = job
        self.granted = granted
        self.joined_at = joined_at
        self.seq = 0
        self.tag = 0.0
        self.cost = 0.0  # what its flow is charged
        self.unit = 1.0  # of its flow's tags, for each token
        self.claim_until = 0.0
        self.tried: list[Slot] = []  # slots that were closed for it
        self.waits = False


def _class(job: Job) -> int:
    return min(max(job.priority, -PRIORITY_MOST), PRIORITY_MOST)


class _Order(Generic[GrantT]):
    """Waiters by tag; who has left is passed over, and taken out when they become many."""

    __slots__ = ("_heap", "_sign", "_stale")

    def __init__(self, *, latest_first: bool = False) -> None:
        self._heap: list[tuple[float, int, Waiter[GrantT]]] = []
        self._sign = -1 if latest_first else 1
        self._stale = 0

    def push(self, waiter: Waiter[GrantT]) -> None:
        heappush(self._heap, (self._sign * waiter.tag, self._sign * waiter.seq, waiter))

    def first(self) -> Waiter[GrantT] | None:
        heap = self._heap
        while heap:
            waiter = heap[0][2]
            if waiter.waits:
                return waiter
            heappop(heap)
            self._stale -= 1
        return None

    def left(self) -> None:
        """One of them has left."""
        self._stale += 1
        if self._stale > STALE_MIN and self._stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].waits]
            heapify(self._heap)
            self._stale = 0

    def in_order(self) -> Iterator[Waiter[GrantT]]:
        """From the first on, each at the cost of O(log n): a consumer that stops early pays little.

        The queue must not change meanwhile.
        """
        heap = self._heap
        taken: list[tuple[float, int, Waiter[GrantT]]] = []
        try:
            while heap:
                entry = heappop(heap)
                if entry[2].waits:
                    taken.append(entry)
                    yield entry[2]
                else:
                    self._stale -= 1
        finally:
            for entry in taken:
                heappush(heap, entry)


class AdmissionQueue(Generic[GrantT]):
    """Waiting jobs, at most `limit` of them. `weights` are the tenants' shares, 1 where not named."""

    def __init__(
        self, *, limit: int, locality_tokens: float, weights: Mapping[str, float] | None = None
    ) -> None:
        self.limit = limit
        self.locality_tokens = locality_tokens
        self._weights = weights or {}
        self._order: _Order[GrantT] = _Order()
        self._latest: _Order[GrantT] = _Order(latest_first=True)
        self._by_adapter: dict[AdapterRef | None, _Order[GrantT]] = {}
        self._counts: dict[AdapterRef | None, int] = {}
        self._of_tenant: dict[str, int] = {}
        self._flows: dict[tuple[str, int], float] = {}
        self._clock = 0.0
        self._seq = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiter[GrantT]]:
        return self._order.in_order()

    @property
    def full(self) -> bool:
        """Whether one more would exceed the limit."""
        return self._length >= self.limit

    @property
    def first(self) -> Waiter[GrantT] | None:
        """Whose turn it is."""
        return self._order.first()

    @property
    def last(self) -> Waiter[GrantT] | None:
        """Whose turn comes last."""
        return self._latest.first()

    def waiting_for(self, adapter: AdapterRef | None) -> int:
        """How many wait for an adapter."""
        return self._counts.get(adapter, 0)

    def waiting_of(self, tenant: str) -> int:
        """How many wait of a tenant."""
        return self._of_tenant.get(tenant, 0)

    # Tags.

    def tag_of(self, job: Job, tokens: float) -> float:
        """The tag that a job of so many tokens would have now."""
        return self._begin(job) + tokens * self._unit(job)

    def _begin(self, job: Job) -> float:
        return max(self._flows.get((job.tenant, _class(job)), 0.0), self._clock)

    def _unit(self, job: Job) -> float:
        weight = self._weights.get(job.tenant, 1.0)
        return float(PRIORITY_BASE ** _class(job)) / weight

    def charge(self, job: Job, tag: float) -> None:
        """Count a job against its tenant; for those who pass without waiting, too."""
        flows = self._flows
        flows[job.tenant, _class(job)] = tag
        if len(flows) > FLOWS_MAX:  # who is behind the clock owes nothing
            self._flows = {name: last for name, last in flows.items() if last > self._clock}

    def ahead_of(self, tag: float) -> float:
        """About how many of those who wait go before one with that tag."""
        last = self._latest.first()
        if last is None or last.tag <= self._clock:
            return float(self._length)
        share = (tag - self._clock) / (last.tag - self._clock)
        return self._length * min(max(share, 0.0), 1.0)

    # Coming and going.

    def join(self, waiter: Waiter[GrantT], tag: float) -> None:
        """Wait by one's tag; the queue is not full."""
        assert not self.full
        waiter.cost = tag - self._begin(waiter.job)
        waiter.unit = self._unit(waiter.job)
        self.charge(waiter.job, tag)
        self._seq += 1
        waiter.seq = self._seq
        waiter.tag = tag
        waiter.waits = True
        self._length += 1
        self._order.push(waiter)
        self._latest.push(waiter)
        adapter = waiter.job.adapter
        same = self._by_adapter.get(adapter)
        if same is None:
            same = self._by_adapter[adapter] = _Order()
        same.push(waiter)
        self._counts[adapter] = self._counts.get(adapter, 0) + 1
        tenant = waiter.job.tenant
        self._of_tenant[tenant] = self._of_tenant.get(tenant, 0) + 1

    def leave(self, waiter: Waiter[GrantT]) -> None:
        """Stop waiting, for whatever reason; leaving twice is harmless."""
        if not waiter.waits:
            return
        waiter.waits = False
        self._length -= 1
        if not waiter.granted.done() or waiter.granted.cancelled() or waiter.granted.exception():
            self._refund(waiter)
        adapter = waiter.job.adapter
        left = self._counts[adapter] - 1
        if left:
            self._counts[adapter] = left
            self._by_adapter[adapter].left()
        else:
            del self._counts[adapter], self._by_adapter[adapter]
        tenant = waiter.job.tenant
        left = self._of_tenant[tenant] - 1
        if left:
            self._of_tenant[tenant] = left
        else:
            del self._of_tenant[tenant]
        self._order.left()
        self._latest.left()
        if not self._length:  # nobody contends: what was used before counts no more
            self._flows.clear()
            self._clock = 0.0

    def _refund(self, waiter: Waiter[GrantT]) -> None:
        """It was not served: its tenant owes nothing for it."""
        flow = (waiter.job.tenant, _class(waiter.job))
        if (last := self._flows.get(flow)) is not None:
            self._flows[flow] = max(last - waiter.cost, self._clock)

    def serve(self, waiter: Waiter[GrantT], grant: GrantT) -> None:
        """Hand a waiter its grant."""
        passed = 0.0 if waiter is self._order.first() else self.locality_tokens * ACROSS_TENANTS
        self._clock = max(self._clock, waiter.tag - passed)
        waiter.granted.set_result(grant)
        self.leave(waiter)

    def next_for(self, worker: Worker, refused: Mapping[int, None]) -> Waiter[GrantT] | None:
        """Who is to go to the worker: by tag, or by an adapter at hand (see above); no refused one."""
        local = self._local(worker, refused)
        slots = worker.slots
        if slots.free <= 0 and not slots.idle:
            return local
        for looked_at, waiter in enumerate(self._order.in_order()):
            if looked_at == LOOKED_AT_MAX:
                break
            if local is not None:
                bound = self.locality_tokens * waiter.unit
                if local.job.tenant != waiter.job.tenant:
                    bound *= ACROSS_TENANTS
                if local.tag <= waiter.tag + bound:
                    return local
            if waiter.seq not in refused and worker.can_serve(
                waiter.job.adapter, waiter.job.tenant
            ):
                return waiter
        return local

    def _local(self, worker: Worker, refused: Mapping[int, None]) -> Waiter[GrantT] | None:
        """The first of those whose adapter the worker holds, or is loading."""
        slots, waiting = worker.slots, self._by_adapter
        best: Waiter[GrantT] | None = None
        wanted: list[AdapterRef | None]
        if len(waiting) <= len(slots):
            wanted = [
                adapter for adapter in waiting if adapter is None or slots.get(adapter) is not None
            ]
        else:
            wanted = [slot.adapter for slot in slots]
            if None in waiting:
                wanted.append(None)  # the base model alone
        for adapter in wanted:
            order = waiting.get(adapter)
            if order is None:
                continue
            first = order.first()
            if refused and first is not None and first.seq in refused:
                first = next((one for one in order.in_order() if one.seq not in refused), None)
            if first is None or not worker.can_serve(adapter, first.job.tenant):
                continue
            if best is None or (first.tag, first.seq) < (best.tag, best.seq):
                best = first
        return best
