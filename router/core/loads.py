"""Loads of adapters into workers' slots: one for each slot, however many jobs wait for it.

A load is a task of the router's own: who leaves does not cancel it for the others. Whatever becomes of
it, its slot does not stay promised, and each who waits is told.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from router.core.fleet import Fleet, LoadRefusedError, Worker
from router.core.job import LoadError, LoadFault
from router.core.ports import Loader, Observer
from router.core.residency import LOADING, Slot
from router.core.timing import Tier


class Loads:
    """Those under way for one fleet. `ended` is told of each, once the ledger knows of its end."""

    def __init__(
        self,
        fleet: Fleet,
        loader: Loader,
        observer: Observer,
        ended: Callable[[Worker, Slot, LoadError | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fleet = fleet
        self._loader = loader
        self._on_end = ended
        self._tasks: dict[tuple[str, Slot], asyncio.Task[int]] = {}
        self.observer = observer
        self.closed = False  # what is cancelled now is so because the router shuts down

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def tasks(self) -> tuple[asyncio.Task[int], ...]:
        """Those under way."""
        return tuple(self._tasks.values())

    def begin(self, worker: Worker, slot: Slot) -> None:
        """Load the adapter of a slot that was promised to it."""
        victim = slot.victim.adapter if slot.victim else None
        now = self._loop.time()
        tier = self._fleet.tier(worker, slot.adapter)
        slot.ready_at = now + self._fleet.learned.load_s(tier)
        task = self._loop.create_task(self._loader.load(worker, slot.adapter, victim))
        self._tasks[worker.id, slot] = task
        # A callback, not an await around it: it runs for a task cancelled before its start too.
        task.add_done_callback(partial(self._ended, worker, slot, now, tier))

    def cancel(self, worker: Worker) -> None:
        """The worker is gone: its loads fail now, with that as the reason."""
        for (worker_id, _), task in tuple(self._tasks.items()):
            if worker_id == worker.id:
                task.cancel()

    async def resident(self, worker: Worker, slot: Slot) -> None:
        """Wait until the load that is under way has ended; raise what it raised."""
        if slot.phase is LOADING:
            waiter: asyncio.Future[None] = self._loop.create_future()
            slot.waiters.append(waiter)
            await waiter
        if slot.error is not None:
            # A new exception for each who waited: a shared one would gather all their tracebacks.
            raise LoadError(slot.error.fault, str(slot.error), worker.id)

    def _ended(
        self, worker: Worker, slot: Slot, started: float, tier: Tier, task: asyncio.Task[int]
    ) -> None:
        reason = "the router is shutting down" if self.closed else f"worker {worker.id} is gone"
        error = failure_of(task, f"{reason}: the load of {slot.adapter.name} ended")
        now = self._loop.time()
        load_s = now - started
        fleet, observer = self._fleet, self.observer
        if error is None:
            fleet.stage(slot.adapter)
            fleet.learned.loaded(tier, load_s)
            slot.reload_s = load_s
            evicted = fleet.finish_load(worker, slot, task.result(), now)
            if evicted is not None:
                observer.evicted(worker, evicted.adapter)
        else:
            slot.error = error
            fleet.fail_load(worker, slot)
            if isinstance(error, LoadRefusedError) and error.report is not None:
                fleet.observe(worker, error.report, now)
        del self._tasks[worker.id, slot]
        observer.load_ended(worker, slot.adapter, load_s, error)
        slot.wake()
        self._on_end(worker, slot, error)


def failure_of(task: "asyncio.Task[int]", cancelled: str) -> LoadError | None:
    """What a load or an unload that is over failed with, if it did; `cancelled` says why it was."""
    if task.cancelled():
        return LoadError(LoadFault.WORKER, cancelled)
    failure = task.exception()
    if failure is None or isinstance(failure, LoadError):
        return failure
    # Whatever it was, the slot must not stay promised.
    return LoadError(LoadFault.WORKER, f"{type(failure).__name__}: {failure}")
