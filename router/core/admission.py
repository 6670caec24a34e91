"""Where jobs wait when nobody can take them: one bounded queue, first come first served.

Two exceptions to the order, both bounded:
  - a job that cannot be placed for want of a slot lets later ones pass whose adapter is at hand;
  - but no more than `max_overtakes` times, and then everybody waits behind it (`held`). Slots fall
    idle as running requests end, so it is placed at last: no adapter starves under continuing load.
The queue orders and bounds; it neither places nor times out, which is the router's part.

Cost: joining and leaving are O(1). Whom a worker can serve is O(1) where it has a slot to give, and
O(slots) where it has not: never a scan over all that wait.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from router.core.fleet import Worker
from router.core.job import AdapterRef, Job

GrantT = TypeVar("GrantT")


class Waiter(Generic[GrantT]):
    """One job that waits. `granted` ends with its grant, or with the exception that it gets."""

    __slots__ = ("granted", "job", "overtaken", "seq")

    def __init__(self, job: Job, granted: "asyncio.Future[GrantT]") -> None:
        self.job = job
        self.granted = granted
        self.overtaken = 0
        self.seq = 0


class AdmissionQueue(Generic[GrantT]):
    """Waiting jobs, at most `limit` of them, oldest first."""

    def __init__(self, *, limit: int, max_overtakes: int) -> None:
        self.limit = limit
        self.max_overtakes = max_overtakes
        # OrderedDict, not dict: the first of a dict that shrinks at its front is found by a scan.
        self._waiters: OrderedDict[int, Waiter[GrantT]] = OrderedDict()
        self._by_adapter: dict[AdapterRef | None, OrderedDict[int, Waiter[GrantT]]] = {}
        self._seq = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter[GrantT]]:
        return iter(self._waiters.values())

    @property
    def full(self) -> bool:
        """Whether one more would exceed the limit."""
        return len(self._waiters) >= self.limit

    @property
    def oldest(self) -> Waiter[GrantT]:
        """Who has waited longest; the queue is not empty."""
        return next(iter(self._waiters.values()))

    def held(self) -> bool:
        """Whether the oldest was passed by so often that nobody may pass it any more."""
        return bool(self._waiters) and self.oldest.overtaken >= self.max_overtakes

    def join(self, waiter: Waiter[GrantT]) -> None:
        """Wait at the end of the queue, which is not full."""
        assert not self.full
        self._seq += 1
        waiter.seq = self._seq
        self._waiters[waiter.seq] = waiter
        self._by_adapter.setdefault(waiter.job.adapter, OrderedDict())[waiter.seq] = waiter

    def leave(self, waiter: Waiter[GrantT]) -> None:
        """Stop waiting, for whatever reason; leaving twice is harmless."""
        if self._waiters.pop(waiter.seq, None) is None:
            return
        same = self._by_adapter[waiter.job.adapter]
        del same[waiter.seq]
        if not same:
            del self._by_adapter[waiter.job.adapter]

    def served(self, waiter: Waiter[GrantT], grant: GrantT) -> None:
        """Hand a waiter its grant, and count it against the oldest if that is somebody else."""
        self.leave(waiter)
        self.passed(waiter.seq)
        waiter.granted.set_result(grant)

    def passed(self, seq: int | None = None) -> None:
        """A job was placed that came after the oldest one, or that never waited (`seq` None)."""
        if self._waiters and (seq is None or seq > self.oldest.seq):
            self.oldest.overtaken += 1

    def next_for(self, worker: Worker, refused: dict[int, None]) -> Waiter[GrantT] | None:
        """The oldest waiter that the worker has the adapter or a slot for, less the refused."""
        slots = worker.slots
        if slots.idle or slots.occupied < slots.capacity:
            for seq, waiter in self._waiters.items():
                if seq not in refused and worker.can_serve(waiter.job.adapter):
                    return waiter
            return None
        best: Waiter[GrantT] | None = None
        wanted = [None, *(slot.adapter for slot in slots if slots.can_serve(slot.adapter))]
        for adapter in wanted:
            for seq, waiter in self._by_adapter.get(adapter, {}).items():
                if seq not in refused:
                    if best is None or seq < best.seq:
                        best = waiter
                    break
        return best
