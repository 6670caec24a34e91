"""Adapters that leave a worker without a successor: retired versions, and what an operator unloads.

The rule: a slot that departs is unloaded as soon as nobody uses its adapter, here or by another router,
and nobody waits for it. Until then it serves whoever comes, and it is the first to be evicted. A
retired adapter departs wherever it is or comes to be, is not pinned, and is not loaded ahead; once no
worker holds it and nobody waits for it it is forgotten, so that whoever still asks for it by its digest
has an adapter like any other. Hence there are never more of them than slots and waiting jobs.

An unload is a call that takes time and may fail: then the adapter stays. What is retired is tried again
after pauses that double up to `PAUSE_MAX_S`, and what another router uses when it does so no more; what
was to be unloaded once is not. So the engine is never behind the ledger, nor the ledger the engine.

Cost: a job's end looks at one flag. While anything departs each period walks the slots that do.
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Final

import msgspec

from router.core.fleet import Fleet, LoadRefusedError, Worker
from router.core.job import AdapterRef
from router.core.loads import failure_of
from router.core.ports import Loader, Observer
from router.core.residency import LEAVING, Slot

PERIOD_S: Final = 1.0
PAUSE_MIN_S: Final = 1.0
PAUSE_MAX_S: Final = 60.0


class Unload(StrEnum):
    """What came of unloading an adapter from one worker."""

    UNLOADED = "unloaded"
    IN_USE = "in_use"  # somebody uses it, or it is on its way: it leaves when that is over
    FAILED = "failed"  # it is there still


class Unloaded(msgspec.Struct, frozen=True):
    """The same, and why, where it did not leave."""

    result: Unload
    message: str = ""


IN_USE: Final = Unloaded(Unload.IN_USE, "it is in use, and leaves when it is idle")


class Departures:
    """Those of one fleet.

    `wanted` says how many jobs wait for an adapter; `ended` is told of a worker whose slot is free, or
    taken again, once the ledger knows.
    """

    def __init__(
        self,
        fleet: Fleet,
        loader: Loader,
        observer: Observer,
        *,
        wanted: Callable[[AdapterRef], int],
        ended: Callable[[Worker], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fleet = fleet
        self._loader = loader
        self._wanted = wanted
        self._on_end = ended
        self._tasks: dict[Slot, tuple[Worker, asyncio.Task[int]]] = {}
        self._waiters: dict[Slot, list[asyncio.Future[Unloaded]]] = {}
        # Which could not be unloaded: until when they are left alone, and for how long that is.
        self._put_off: dict[Slot, tuple[float, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.observer = observer
        self.closed = False

    @property
    def tasks(self) -> tuple["asyncio.Task[int]", ...]:
        """The unloads under way."""
        return tuple(task for _, task in self._tasks.values())

    # What is to leave.

    def retire(self, adapter: AdapterRef) -> None:
        """Have it leave every worker, now and whenever it comes to one."""
        fleet = self._fleet
        fleet.pin(adapter, pinned=False)
        fleet.targets.pop(adapter, None)
        fleet.demand.forget(adapter)
        fleet.retired[adapter] = None
        for worker, slot in self._slots_of(adapter):
            worker.slots.depart(slot)
            self.look(worker)
        self._forget(adapter)
        self._look_again()

    def restore(self, adapter: AdapterRef) -> None:
        """Let it stay again; an unload that is under way goes on, and the next job loads it anew."""
        self._fleet.retired.pop(adapter, None)
        for worker, slot in self._slots_of(adapter):
            if slot.departs:
                worker.slots.stay(slot)

    async def unload(self, adapter: AdapterRef) -> dict[str, Unloaded]:
        """Have it leave the workers that hold it, once; what came of it, by worker."""
        done: dict[str, Unloaded] = {}
        waited_for: dict[str, asyncio.Future[Unloaded]] = {}
        for worker, slot in self._slots_of(adapter):
            worker.slots.depart(slot)
            self._put_off.pop(slot, None)
            self.look(worker)
            if slot.phase is LEAVING:
                waiter: asyncio.Future[Unloaded] = self._loop.create_future()
                self._waiters.setdefault(slot, []).append(waiter)
                waited_for[worker.id] = waiter
            else:
                done[worker.id] = IN_USE
        self._look_again()
        for worker_id, waiter in waited_for.items():
            done[worker_id] = await waiter
        return done

    def _slots_of(self, adapter: AdapterRef) -> list[tuple[Worker, Slot]]:
        slots = ((worker, worker.slots.get(adapter)) for worker in self._fleet)
        return [(worker, slot) for worker, slot in slots if slot is not None]

    # When it leaves.

    def look(self, worker: Worker) -> None:
        """Something has changed there: unload what departs and may."""
        if self.closed or self._fleet.get(worker.id) is not worker:
            return
        now = self._loop.time()
        for slot in tuple(worker.slots.departing.values()):
            until, _ = self._put_off.get(slot, (0.0, 0.0))
            if until <= now and worker.slots.can_unload(slot) and not self._wanted(slot.adapter):
                self._begin(worker, slot)

    def _begin(self, worker: Worker, slot: Slot) -> None:
        self._fleet.begin_unload(worker, slot)
        task = self._loop.create_task(self._loader.unload(worker, slot.adapter))
        self._tasks[slot] = worker, task
        # A callback, not an await around it: it runs for a task cancelled before its start too.
        task.add_done_callback(partial(self._ended, worker, slot))

    def _ended(self, worker: Worker, slot: Slot, task: "asyncio.Task[int]") -> None:
        del self._tasks[slot]
        fleet, adapter, now = self._fleet, slot.adapter, self._loop.time()
        reason = "the router is shutting down" if self.closed else f"worker {worker.id} is gone"
        error = failure_of(task, f"{reason}: the unload of {adapter.name} ended")
        if error is None:
            self._put_off.pop(slot, None)
            fleet.finish_unload(worker, slot, task.result())
            told = Unloaded(Unload.UNLOADED)
        elif isinstance(error, LoadRefusedError):
            fleet.fail_unload(worker, slot)
            self._put_off[slot] = now + PAUSE_MIN_S, 0.0
            if error.report is not None:
                fleet.observe(worker, error.report, now)
            told = Unloaded(Unload.IN_USE, str(error))
        else:
            fleet.fail_unload(worker, slot)
            _, before_s = self._put_off.get(slot, (0.0, 0.0))
            pause_s = min(max(2.0 * before_s, PAUSE_MIN_S), PAUSE_MAX_S)
            self._put_off[slot] = now + pause_s, pause_s
            if adapter not in fleet.retired:
                worker.slots.stay(slot)
            told = Unloaded(Unload.FAILED, str(error))
        self.observer.unload_ended(worker, adapter, error)
        for waiter in self._waiters.pop(slot, ()):
            if not waiter.done():
                waiter.set_result(told)
        self._forget(adapter)
        self._on_end(worker)
        self._look_again()

    def cancel(self, worker: Worker) -> None:
        """The worker is gone: its unloads end now, with that as the reason."""
        for of, task in tuple(self._tasks.values()):
            if of is worker:
                task.cancel()

    def close(self) -> None:
        """Begin nothing any more."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()

    # From time to time, while anything departs.

    def _look_again(self) -> None:
        if self._timer is not None or self.closed:
            return
        if self._fleet.retired or any(worker.slots.departing for worker in self._fleet):
            self._timer = self._loop.call_later(PERIOD_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        departing: dict[Slot, None] = {}
        for worker in tuple(self._fleet):
            if worker.slots.departing:
                self.look(worker)
                departing.update(dict.fromkeys(worker.slots.departing.values()))
        self._put_off = {slot: pause for slot, pause in self._put_off.items() if slot in departing}
        for adapter in tuple(self._fleet.retired):
            self._forget(adapter)
        self._look_again()

    def _forget(self, adapter: AdapterRef) -> None:
        """It is retired no more, if it is nowhere and nobody waits for it."""
        if not self._wanted(adapter) and not self._slots_of(adapter):
            self._fleet.retired.pop(adapter, None)
