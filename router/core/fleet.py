"""The workers of one base model, and what the router knows of each: its own count first.

Truth is kept in this order:
  1. what this router has in flight, counted at the moment of decision, before any await;
  2. what the worker pushes (`Report`), which is late by nature: it corrects the ledger only.
So a burst cannot pile onto one worker in the time that a report takes.

Two indexes keep placement cheap: the holders of each adapter, and the workers that are not
overloaded. Both change by a constant amount of work when a job comes or goes.
"""

from collections.abc import Iterator, Sequence
from random import Random

import msgspec

from router.core.job import AdapterRef
from router.core.residency import COLD, Slot, SlotCache


class Report(msgspec.Struct, frozen=True, gc=False):
    """What a worker said of itself, last. `seq` rises with every change of its adapters."""

    seq: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    gpu: tuple[AdapterRef, ...] = ()
    host: tuple[AdapterRef, ...] = ()


class Worker:
    """One engine: what is in flight there, its slots, its last report."""

    __slots__ = (
        "accepting",
        "completed",
        "id",
        "in_flight",
        "max_ongoing",
        "ready_index",
        "report",
        "seq_floor",
        "seq_settled",
        "slots",
    )

    def __init__(self, worker_id: str, *, max_ongoing: int, slots: int) -> None:
        assert max_ongoing > 0, max_ongoing
        self.id = worker_id
        self.max_ongoing = max_ongoing
        self.slots = SlotCache(slots)
        self.in_flight = 0
        self.completed = 0
        self.accepting = True
        self.report = Report()
        self.seq_floor = 0
        self.seq_settled = -1
        self.ready_index = -1

    @property
    def overloaded(self) -> bool:
        """Whether it has `max_ongoing_requests` in flight."""
        return self.in_flight >= self.max_ongoing

    def can_serve(self, adapter: AdapterRef | None) -> bool:
        """Whether the adapter is held here or a slot can be had for it."""
        return adapter is None or self.slots.can_serve(adapter)

    def __repr__(self) -> str:
        return f"<Worker {self.id} in_flight={self.in_flight} slots={len(self.slots)}>"


class Fleet:
    """All workers of one base model. Changes only through the methods here."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._workers: dict[str, Worker] = {}
        self._holders: dict[AdapterRef, dict[str, Worker]] = {}
        self._ready: list[Worker] = []

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        """The worker of that id, or None where it is not, or no longer, of the fleet."""
        return self._workers.get(worker_id)

    @property
    def ready(self) -> Sequence[Worker]:
        """Workers that accept jobs and are not overloaded, in no order that means anything."""
        return self._ready

    def holders(self, adapter: AdapterRef) -> Sequence[Worker]:
        """Workers where the adapter is resident or loading, in the order in which they got it."""
        held = self._holders.get(adapter)
        return tuple(held.values()) if held else ()

    # Members come and go.

    def add(self, worker: Worker) -> None:
        """A worker joins; its id must be new."""
        assert worker.id not in self._workers, worker.id
        self._workers[worker.id] = worker
        for slot in worker.slots:
            self._index(worker, slot)
        self._settle(worker)

    def remove(self, worker: Worker) -> None:
        """A worker leaves at once. Leases on it still end by `release`, which then only counts."""
        del self._workers[worker.id]
        worker.accepting = False
        self._settle(worker)
        for slot in worker.slots:
            self._unindex(worker, slot)

    def set_accepting(self, worker: Worker, *, accepting: bool) -> None:
        """Stop or resume new jobs for a worker; what runs there is untouched."""
        if self._workers.get(worker.id) is not worker:
            return  # it has left; a late word of it must not bring it back
        worker.accepting = accepting
        self._settle(worker)

    # A job comes and goes.

    def reserve(self, worker: Worker, adapter: AdapterRef | None) -> tuple[Slot | None, bool]:
        """Take a place on the worker, and a use of the adapter's slot.

        Returns the slot and whether the caller must now load the adapter into it.
        """
        worker.in_flight += 1
        if worker.in_flight >= worker.max_ongoing:
            self._settle(worker)
        if adapter is None:
            return None, False
        slot = worker.slots.get(adapter)
        begin = slot is None
        if slot is None:
            slot = worker.slots.begin_load(adapter)
            self._index(worker, slot)
            if slot.victim is not None:
                self._unindex(worker, slot.victim)
        worker.slots.acquire(slot)
        return slot, begin

    def release(self, worker: Worker, slot: Slot | None) -> None:
        """Give back what `reserve` took."""
        assert worker.in_flight > 0, worker
        worker.in_flight -= 1
        worker.completed += 1
        if worker.ready_index < 0:
            self._settle(worker)
        if slot is not None and slot.phase is not COLD:
            worker.slots.release(slot)

    # An adapter comes and goes.

    def finish_load(self, worker: Worker, slot: Slot, seq: int) -> Slot | None:
        """The adapter is resident as of the worker's state `seq`. Returns the evicted slot."""
        worker.seq_floor = max(worker.seq_floor, seq)
        return worker.slots.finish_load(slot)

    def fail_load(self, worker: Worker, slot: Slot) -> None:
        """The adapter did not come; whatever it was to replace is a holder again."""
        assert slot.error is not None
        victim = slot.victim
        worker.slots.fail_load(slot, slot.error)
        self._unindex(worker, slot)
        if victim is not None and self._workers.get(worker.id) is worker:
            self._index(worker, victim)

    def observe(self, worker: Worker, report: Report) -> None:
        """Take in a worker's report; its word on adapters counts unless a load has overtaken it."""
        worker.report = report
        if report.seq == worker.seq_settled:  # nothing has moved since the ledger agreed with it
            return
        if self._workers.get(worker.id) is not worker or report.seq < worker.seq_floor:
            return
        held = dict.fromkeys((*report.gpu, *report.host))
        settled = True
        for slot in tuple(worker.slots):
            if slot.adapter not in held:
                if worker.slots.forget(slot):
                    self._unindex(worker, slot)
                else:  # in use, or on its way: to be looked at again
                    settled = False
        for adapter in report.gpu:
            if adopted := worker.slots.adopt(adapter):
                self._index(worker, adopted)
            elif worker.slots.get(adapter) is None:
                settled = False
        worker.seq_settled = report.seq if settled else -1

    def disown(self, worker: Worker, adapter: AdapterRef) -> None:
        """The worker said that it does not hold an adapter that the ledger has as resident."""
        slot = worker.slots.get(adapter)
        if slot is not None and worker.slots.disown(slot):
            self._unindex(worker, slot)

    # The indexes.

    def _index(self, worker: Worker, slot: Slot) -> None:
        self._holders.setdefault(slot.adapter, {})[worker.id] = worker

    def _unindex(self, worker: Worker, slot: Slot) -> None:
        held = self._holders.get(slot.adapter)
        # By identity: a worker that is started again has the id of the one that is gone.
        if held is None or held.get(worker.id) is not worker:
            return
        del held[worker.id]
        if not held:
            del self._holders[slot.adapter]

    def _settle(self, worker: Worker) -> None:
        """Put the worker into the list of those that are ready, or take it out, in O(1)."""
        wanted = worker.accepting and not worker.overloaded
        index = worker.ready_index
        if wanted and index < 0:
            worker.ready_index = len(self._ready)
            self._ready.append(worker)
        elif not wanted and index >= 0:
            last = self._ready.pop()
            if last is not worker:
                self._ready[index] = last
                last.ready_index = index
            worker.ready_index = -1


def two_of(workers: Sequence[Worker], rng: Random) -> tuple[Worker, Worker]:
    """Two different workers, every ordered pair as likely; there must be two."""
    count = len(workers)
    first = int(rng.random() * count)
    second = int(rng.random() * (count - 1))
    if second >= first:
        second += 1
    return workers[first], workers[second]


def less_busy_of_two(workers: Sequence[Worker], rng: Random) -> Worker | None:
    """Power of two choices: draw two different workers, take the one with less in flight.

    Mitzenmacher, "The power of two choices in randomized load balancing" (2001): two draws give
    most of what looking at all gives, and many routers doing it do not herd.
    """
    if len(workers) < 2:  # noqa: PLR2004
        return workers[0] if workers else None
    one, other = two_of(workers, rng)
    if one.in_flight == other.in_flight:
        # Equally busy: rather the one with more slots left, so that adapters spread before they evict.
        return other if other.slots.occupied < one.slots.occupied else one
    return other if other.in_flight < one.in_flight else one
