"""`async with router.lease(job) as lease:` is the whole interface of the core.

Inside, in this order and in no other: admission (a bounded queue), placement (which worker),
residency (the adapter is made resident there), the lease. Capacity is reserved at the moment of
decision, before any await, and leaving the block releases all of it, whatever happened.

This is the only module of the core that waits. It reads no clock but `loop.time()`, so the same
code runs on a real loop and on the simulator's.
"""

import asyncio
import math
from functools import partial
from types import TracebackType
from typing import Final, Self

from router.core.admission import AdmissionQueue, Waiter
from router.core.fleet import Fleet, Report, Worker
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, LoadFault, Outcome, Rejected
from router.core.placement import Decision, Policy
from router.core.ports import Loader, NoObserver, Observer
from router.core.residency import LOADING, RESIDENT, Slot

RETRY_AFTER_MAX_S: Final = 60.0
# By these names the hot path has them at a tenth of the cost (Python 3.11).
NO_ADAPTER: Final = AdapterUse.NONE
HIT: Final = AdapterUse.HIT
JOINED: Final = AdapterUse.LOADING
COLD: Final = AdapterUse.COLD
RATE_WINDOW: Final = 32  # grants that the drain rate looks back over


class Grant:
    """What was reserved for one job."""

    __slots__ = ("decision", "slot", "use", "worker")

    def __init__(
        self, worker: Worker, slot: Slot | None, use: AdapterUse, decision: Decision
    ) -> None:
        self.worker = worker
        self.slot = slot
        self.use = use
        self.decision = decision


class Lease:
    """One job's place on one worker. Made by `Router.lease`, entered once.

    Entering raises `Rejected` where there is no capacity, and `LoadError` where the adapter could
    not be made resident; nothing is held then. `queued_s` and `load_s` are what it waited for, in
    vain or not.
    """

    __slots__ = ("_grant", "_router", "job", "load_s", "queued_s")

    def __init__(self, router: "Router", job: Job) -> None:
        self._router = router
        self.job = job
        self._grant: Grant | None = None
        self.queued_s = 0.0
        self.load_s = 0.0

    @property
    def worker(self) -> Worker:
        """The worker that the job was placed on."""
        assert self._grant is not None, "the lease is not held"
        return self._grant.worker

    @property
    def use(self) -> AdapterUse:
        """Where the adapter stood when the job was placed."""
        assert self._grant is not None, "the lease is not held"
        return self._grant.use

    @property
    def decision(self) -> Decision:
        """Why that worker."""
        assert self._grant is not None, "the lease is not held"
        return self._grant.decision

    async def __aenter__(self) -> Self:
        router = self._router
        grant = router._admit(self.job)  # noqa: SLF001  (two halves of one mechanism)
        if grant is None:
            started = router.loop.time()
            try:
                grant = await router._wait(self.job)  # noqa: SLF001
            finally:
                self.queued_s = router.loop.time() - started
        slot = grant.slot
        if slot is not None and slot.phase is not RESIDENT:
            started = router.loop.time()
            try:
                await router._resident(grant)  # noqa: SLF001
            except BaseException:
                router._release(grant)  # noqa: SLF001
                raise
            finally:
                self.load_s = router.loop.time() - started
        self._grant = grant
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        grant, self._grant = self._grant, None
        assert grant is not None, "a lease is left once"
        self._router._release(grant)  # noqa: SLF001


class Router:
    """Routes the jobs of one base model over one fleet. To be made inside a running loop.

    `max_queued` bounds how many wait for capacity, `queue_timeout_s` for how long, and
    `max_overtakes` how often one that waits for a slot may be passed by (see admission.py).
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        loader: Loader,
        *,
        max_queued: int = 1024,
        queue_timeout_s: float = 60.0,
        max_overtakes: int = 256,
        observer: Observer | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.queue_timeout_s = queue_timeout_s
        self._policy = policy
        self._loader = loader
        self._observer = observer or NoObserver()
        self._queue: AdmissionQueue[Grant] = AdmissionQueue(
            limit=max_queued, max_overtakes=max_overtakes
        )
        # One task a load: no waiter's leaving may cancel what the others wait for.
        self._loads: dict[tuple[str, Slot], asyncio.Task[int]] = {}
        self._closed = False
        self._released = 0
        self._rate_since = self.loop.time()
        self._rate_per_s = 0.0

    # For those who have a job.

    def lease(self, job: Job) -> Lease:
        """A place for the job: `async with router.lease(job) as lease:`."""
        return Lease(self, job)

    @property
    def queued(self) -> int:
        """How many jobs wait for capacity."""
        return len(self._queue)

    @property
    def loading(self) -> int:
        """How many loads are under way."""
        return len(self._loads)

    @property
    def retry_after_s(self) -> float:
        """When the jobs that wait now will have been served, at the rate of the last few."""
        if self._rate_per_s <= 0.0:
            return 1.0
        drained_s = (len(self._queue) + 1) / self._rate_per_s
        return float(min(max(1, math.ceil(drained_s)), RETRY_AFTER_MAX_S))

    def set_observer(self, observer: Observer) -> None:
        """Tell another observer from now on."""
        self._observer = observer

    # For those who know the workers.

    def add_worker(self, worker: Worker) -> None:
        """A worker is ready for jobs."""
        self.fleet.add(worker)
        self._drain(worker)

    def remove_worker(self, worker: Worker) -> None:
        """A worker is gone: its loads fail now, with the worker as the reason."""
        self.fleet.remove(worker)
        for (worker_id, _), task in tuple(self._loads.items()):
            if worker_id == worker.id:
                task.cancel()

    def set_accepting(self, worker: Worker, *, accepting: bool) -> None:
        """Stop or resume sending jobs to a worker; what runs there goes on."""
        self.fleet.set_accepting(worker, accepting=accepting)
        self._drain(worker)

    def observe(self, worker: Worker, report: Report) -> None:
        """Take in what a worker says of itself.

        Nobody who waits becomes placeable by it: what it adds had a free slot, what it drops was idle.
        """
        self.fleet.observe(worker, report)

    def disown(self, worker: Worker, adapter: AdapterRef) -> None:
        """The worker answered that it has no such adapter: the next job for it loads it again."""
        self.fleet.disown(worker, adapter)
        self._drain(worker)

    def close(self) -> None:
        """Turn away all who wait and whoever comes; leases that are held go on to their end."""
        self._closed = True
        for waiter in tuple(self._queue):
            self._queue.leave(waiter)
            if not waiter.granted.done():
                waiter.granted.set_exception(self._shutting_down())

    async def aclose(self) -> None:
        """Close, and end the loads that are still under way."""
        self.close()
        loads = tuple(self._loads.values())
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    # Admission.

    def _admit(self, job: Job) -> Grant | None:
        """Grant at once where a worker can take the job and nobody is to be let first."""
        if self._closed:
            raise self._shutting_down()
        self._policy.arrived(job, self.fleet, self.loop.time())
        queue = self._queue
        if not queue:
            return self._try_grant(job)
        # Who waits now could not be placed a moment ago, so it is passed by, not pushed aside.
        if queue.held() or not self.fleet.ready or (grant := self._try_grant(job)) is None:
            return None
        queue.passed()
        return grant

    async def _wait(self, job: Job) -> Grant:
        queue = self._queue
        if queue.full:
            raise Rejected(
                Outcome.QUEUE_FULL,
                f"no capacity: {len(queue)} requests are waiting already",
                self.retry_after_s,
            )
        now = self.loop.time()
        until = now + self.queue_timeout_s
        if job.deadline is not None:
            until = max(now, min(until, job.deadline))
        granted: asyncio.Future[Grant] = self.loop.create_future()
        waiter = Waiter(job, granted)
        queue.join(waiter)
        timer = self.loop.call_at(until, self._expire, waiter, until - now)
        try:
            return await granted
        except BaseException:
            self._leave(waiter)
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                # Granted and cancelled in the same step: nobody else will give it back.
                self._release(granted.result())
            raise
        finally:
            timer.cancel()

    def _expire(self, waiter: Waiter[Grant], waited_s: float) -> None:
        if waiter.granted.done():
            return
        message = f"no capacity: waited {waited_s:.3g} s for a worker"
        rejection = Rejected(Outcome.QUEUE_TIMEOUT, message, self.retry_after_s)
        waiter.granted.set_exception(rejection)
        self._leave(waiter)

    def _leave(self, waiter: Waiter[Grant]) -> None:
        """Somebody gave up; who was held behind that one alone may go now."""
        queue = self._queue
        freed = queue.held() and queue.oldest is waiter
        queue.leave(waiter)
        if freed:
            self._serve_all()

    def _shutting_down(self) -> Rejected:
        return Rejected(Outcome.SHUTTING_DOWN, "the router is shutting down", 1.0)

    def _drain(self, worker: Worker) -> None:
        """Something changed at this worker: serve those who wait for it.

        Only those: before the change nobody could be placed anywhere. The exception is a queue that
        was held, behind whose oldest others may have become placeable on any worker.
        """
        queue = self._queue
        if not queue:
            return
        if queue.held():
            self._serve_all()
        else:
            self._serve(worker)

    def _serve_all(self) -> None:
        """Serve the whole queue, oldest first, for as long as there is room and nobody holds it."""
        for waiter in tuple(self._queue):
            if not self.fleet.ready:
                return
            if waiter.granted.done():
                continue
            grant = self._try_grant(waiter.job)
            if grant is not None:
                self._queue.served(waiter, grant)
            elif self._queue.held():
                return

    def _serve(self, worker: Worker) -> None:
        """Serve those whom this worker has the adapter or a slot for, oldest first."""
        queue = self._queue
        refused: dict[int, None] = {}
        while worker.ready_index >= 0 and queue and not queue.held():
            waiter = queue.next_for(worker, refused)
            if waiter is None:
                return
            grant = self._try_grant(waiter.job)
            if grant is None:  # the policy would rather wait
                refused[waiter.seq] = None
            else:
                queue.served(waiter, grant)

    # Placement, and the reservation in the same step.

    def _try_grant(self, job: Job) -> Grant | None:
        decision = self._policy.place(job, self.fleet, self.loop.time())
        worker = decision.worker
        if worker is None:
            return None
        slot, begin = self.fleet.reserve(worker, job.adapter)
        if slot is None:
            use = NO_ADAPTER
        elif begin:
            use = COLD
        else:
            use = HIT if slot.phase is RESIDENT else JOINED
        evicting = slot.victim.adapter if begin and slot is not None and slot.victim else None
        self._observer.decided(job, decision, evicting)
        if begin:
            assert slot is not None
            self._begin_load(worker, slot)
        return Grant(worker, slot, use, decision)

    def _release(self, grant: Grant) -> None:
        self.fleet.release(grant.worker, grant.slot)
        self._measure_rate()
        self._drain(grant.worker)

    def _measure_rate(self) -> None:
        now = self.loop.time()
        if not self._released:  # a window begins when something happens, not in the silence before
            self._rate_since = now
        self._released += 1
        if self._released > RATE_WINDOW:
            if now > self._rate_since:
                self._rate_per_s = (self._released - 1) / (now - self._rate_since)
            self._released = 0

    # Residency.

    def _begin_load(self, worker: Worker, slot: Slot) -> None:
        victim = slot.victim.adapter if slot.victim else None
        task = self.loop.create_task(self._loader.load(worker, slot.adapter, victim))
        self._loads[worker.id, slot] = task
        # A callback, not an await around it: it runs for a task cancelled before its start too.
        task.add_done_callback(partial(self._load_ended, worker, slot, self.loop.time()))

    def _load_ended(
        self, worker: Worker, slot: Slot, started: float, task: asyncio.Task[int]
    ) -> None:
        error: LoadError | None
        if task.cancelled():
            reason = (
                "the router is shutting down" if self._closed else f"worker {worker.id} is gone"
            )
            error = LoadError(LoadFault.WORKER, f"{reason}: the load of {slot.adapter.name} ended")
        elif (failure := task.exception()) is None:
            error = None
        elif isinstance(failure, LoadError):
            error = failure
        else:  # whatever it was, the slot must not stay promised
            error = LoadError(LoadFault.WORKER, f"{type(failure).__name__}: {failure}")
        if error is None:
            evicted = self.fleet.finish_load(worker, slot, task.result())
            if evicted is not None:
                self._observer.evicted(worker, evicted.adapter)
        else:
            slot.error = error
            self.fleet.fail_load(worker, slot)
        del self._loads[worker.id, slot]
        self._observer.load_ended(worker, slot.adapter, self.loop.time() - started, error)
        slot.wake()
        # A slot may have fallen idle, or be free again.
        self._drain(worker)

    async def _resident(self, grant: Grant) -> None:
        """Wait until the load that is under way has ended; raise what it raised."""
        slot = grant.slot
        assert slot is not None
        if slot.phase is LOADING:
            waiter: asyncio.Future[None] = self.loop.create_future()
            slot.waiters.append(waiter)
            await waiter
        if slot.error is not None:
            # A new exception for each who waited: a shared one would gather all their tracebacks.
            raise LoadError(slot.error.fault, str(slot.error), grant.worker.id)
