"""Who has waited too long for a slot, or for memory, gets one that nobody new is sent to.

A job that finds no slot is passed by, since others cannot use what it lacks either. After `patience_s`
one slot is closed to new users until it falls idle, or one worker kept until the job fits, and is its.
So no adapter and no long prompt starves under continuing load, and the rest of the fleet works on.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from router.core.admission import AdmissionQueue, Waiter
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job, Rejected
from router.core.placement import Decision, Drop, Reason
from router.core.residency import RESIDENT, Slot

# How many of those who wait too long for a slot are looked at in one go.
AT_ONCE: Final = 16
# After so many patiences another slot is closed instead: this one has a long answer in it.
PATIENCES: Final = 4


class Claims:
    """The claims of those who wait in a queue. `serve` is called with a worker that has room again."""

    def __init__(
        self,
        fleet: Fleet,
        queue: AdmissionQueue[Any],
        decide: Callable[[Job, float], Decision],
        serve: Callable[[Worker], None],
        *,
        patience_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fleet = fleet
        self._queue = queue
        self._decide = decide
        self._serve = serve
        self._patience_s = patience_s
        self._slots: dict[int, tuple[Worker, Slot]] = {}  # that were closed, by the waiter for whom
        self._workers: dict[int, Worker] = {}  # that are kept for one that needs much memory
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def waits(self) -> None:
        """Somebody waits: look at the queue when its patience may have ended."""
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(self._patience_s, self._lose_patience)

    def left(self, waiter: Waiter[Any]) -> None:
        """The waiter was served, or gave up: what was claimed for it is anybody's."""
        worker = self._workers.get(waiter.seq)
        if worker is None and waiter.seq in self._slots:
            worker = self._slots[waiter.seq][0]
        if worker is not None:
            self._give_up(waiter)
            self._serve(worker)

    def forget(self, worker: Worker) -> None:
        """The worker is gone, and its slots with it."""
        for seq, (claimed, _) in tuple(self._slots.items()):
            if claimed is worker:
                del self._slots[seq]

    def close(self) -> None:
        """Claim nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _lose_patience(self) -> None:
        """Close a slot for each of those who have waited too long for one, in their order."""
        self._timer = None
        if not self._queue:
            return
        now = self._loop.time()
        self._fleet.tenants.tick(now)
        looked_at: dict[AdapterRef | None, None] = {}
        wanting: list[Waiter[Any]] = []
        for waiter in self._queue:
            adapter = waiter.job.adapter
            if adapter in looked_at:
                continue
            if now - waiter.joined_at >= self._patience_s:
                wanting.append(waiter)
            looked_at[adapter] = None
            if len(looked_at) == AT_ONCE:
                break
        for waiter in wanting:
            if not waiter.waits:
                continue  # served on the way
            claim = self._slots.get(waiter.seq)
            if claim is not None and claim[0].slots.closed is claim[1] and now < waiter.claim_until:
                continue
            self._give_up(waiter)
            try:
                decision = self._decide(waiter.job, now)
            except Rejected:
                continue  # it is told when a worker has room, or by its deadline
            if decision.worker is not None:  # what other tenants need has changed with time alone
                self._serve(decision.worker)
            elif decision.reason is Reason.NO_SLOT:
                self._claim(waiter)
            elif any(drop is Drop.NO_MEMORY for _, drop in decision.dropped):
                self._claim_memory(waiter)
        self.waits()

    def _claim(self, waiter: Waiter[Any]) -> None:
        """Close the slot that will fall idle soonest, as far as one can tell: of the fewest users.

        One of the tenant's own, or of another that uses more than its share where this one does not.
        """
        best: tuple[int, bool, bool, int, int] | None = None
        chosen: tuple[Worker, Slot] | None = None
        for worker in self._fleet.ready:
            if worker.slots.closed is not None or worker.id in waiter.job.avoid:
                continue
            tenant, shares = waiter.job.tenant, worker.slots.shares
            for slot in worker.slots:
                if slot.users and slot.tenant != tenant and not shares.yields(slot.tenant, tenant):
                    continue
                if slot.phase is RESIDENT and (slot.users or slot.foreign) and not slot.pinned:
                    # One that was closed for it before, and has not fallen idle, comes last; and
                    # before it one that other routers use. One that departs anyway comes first.
                    rank = (
                        waiter.tried.count(slot),
                        slot.foreign,
                        not slot.departs,
                        slot.users,
                        -len(self._fleet.holders(slot.adapter)),
                    )
                    if best is None or rank < best:
                        best, chosen = rank, (worker, slot)
        if chosen is not None:
            self._fleet.close_slot(*chosen)
            self._slots[waiter.seq] = chosen
            waiter.tried.append(chosen[1])
            waiter.claim_until = self._loop.time() + PATIENCES * self._patience_s
            if not chosen[1].users:
                self._serve(chosen[0])

    def _claim_memory(self, waiter: Waiter[Any]) -> None:
        """Send nobody else to the worker with the most memory left, until this one fits."""
        job = waiter.job
        of = self._fleet.ready
        if job.refuse_cold and job.adapter is not None:
            of = [worker for worker in self._fleet.resident(job.adapter) if not worker.overloaded]
        able = [worker for worker in of if worker.kept_for is None]
        if able:
            worker = min(able, key=lambda worker: worker.context_tokens - worker.kv_tokens)
            worker.kept_for = waiter.job
            self._workers[waiter.seq] = worker

    def _give_up(self, waiter: Waiter[Any]) -> None:
        """Open the slot that was closed for it, and the worker that was kept."""
        kept = self._workers.pop(waiter.seq, None)
        if kept is not None and kept.kept_for is waiter.job:
            kept.kept_for = None
        claim = self._slots.pop(waiter.seq, None)
        if claim is not None:
            self._fleet.open_slot(*claim)
