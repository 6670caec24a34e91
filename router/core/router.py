"""`async with router.lease(job) as lease:` is the whole interface of the core.

Inside, in this order and in no other: admission (quota, the adapter brought to this host, a bounded
fair queue, the deadline), placement (which worker), residency (the adapter is made resident there), the
lease. Capacity is reserved at the moment of decision, before any await, and leaving the block releases
all of it, whatever happened.

Here is the order of things, and who is served when. What goes on beside it is told apart: what was
reserved for one job in lease.py, adapters on their way in fetches.py and loads.py and out in
departures.py, who has waited too long in claims.py, slots that must fall idle in headroom.py. No clock
is read but `loop.time()`, so the same code runs on a real loop and on the simulator's.
"""

import asyncio
import math
from collections.abc import Awaitable, Mapping
from typing import Final, NoReturn

from router.core.admission import AdmissionQueue, Waiter
from router.core.claims import Claims
from router.core.departures import Departures, Unloaded
from router.core.drain import DrainRate
from router.core.fetches import Fetches
from router.core.fleet import Fleet, Hold, Report, Worker
from router.core.headroom import Headroom
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, Outcome, Rejected
from router.core.lease import Grant, Lease
from router.core.loads import Loads
from router.core.placement import Decision, Drop, Policy, Reason, nobody
from router.core.ports import Loader, NoObserver, Observer
from router.core.quotas import Charge, Quotas, Shortage
from router.core.replicas import Replicas
from router.core.residency import RESIDENT, Slot
from router.core.timing import GAIN, Tier

RETRY_AFTER_MAX_S: Final = 60.0
# By these names the hot path has them at a tenth of the cost (Python 3.11).
NO_ADAPTER: Final = AdapterUse.NONE
HIT: Final = AdapterUse.HIT
JOINED: Final = AdapterUse.LOADING
COLD: Final = AdapterUse.COLD
# Where other routers were quicker a job is placed anew, after longer and longer pauses.
CONTENTION_PAUSE_S: Final = 0.005
CONTENTION_PAUSE_MAX_S: Final = 0.25
AGAIN_MIN_S: Final = 0.001  # a timer that fires sooner would find the clock where it was
# How many that would rather wait are passed over when a worker has room.
REFUSALS_MAX: Final = 32


class Router:
    """Routes the jobs of one base model over one fleet. To be made inside a running loop.

    `max_queued` bounds how many wait for capacity and `queue_timeout_s` for how long. Who has waited
    for a slot for `slot_patience_s` gets one that is closed to new users until it falls idle.
    `locality_tokens` is the policy's own unless given. `weights` are the tenants' shares under
    contention. `quotas` are what accounts may use a minute; routers may share them.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        loader: Loader,
        *,
        max_queued: int = 1024,
        queue_timeout_s: float = 60.0,
        slot_patience_s: float = 1.0,
        locality_tokens: float | None = None,
        weights: Mapping[str, float] | None = None,
        quotas: Quotas | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.queue_timeout_s = queue_timeout_s
        self._policy = policy
        self._loader = loader
        self._observer = observer or NoObserver()
        self._queue: AdmissionQueue[Grant] = AdmissionQueue(
            limit=max_queued,
            locality_tokens=policy.locality_tokens if locality_tokens is None else locality_tokens,
            weights=weights,
        )
        fleet.tenants.weigh(weights or {})
        self._quotas = quotas or Quotas({}, self.loop.time())
        self._drain_rate = DrainRate()
        self._fetches = Fetches(fleet, loader, self._observer)
        self._loads = Loads(fleet, loader, self._observer, self._load_ended)
        self._departures = Departures(
            fleet, loader, self._observer, wanted=self._wanted, ended=self._drain
        )
        self._claims = Claims(
            fleet, self._queue, self._decide, self._drain, patience_s=slot_patience_s
        )
        self._headroom = Headroom(fleet)
        self._pausing: dict[str, Job] = {}  # by their ids: whom other routers were quicker than
        self._again: asyncio.TimerHandle | None = None
        self._again_at = math.inf
        self._replicas = Replicas(fleet, self.warm) if policy.replicates else None
        self._ticking: asyncio.TimerHandle | None = None
        self._closed = False

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
        """When the jobs that wait now will have been served, at the rate at which they are."""
        rate = self._drain_rate.per_s
        if rate <= 0.0:
            return 1.0
        return float(min(max(1, math.ceil((len(self._queue) + 1) / rate)), RETRY_AFTER_MAX_S))

    def set_observer(self, observer: Observer) -> None:
        """Tell another observer from now on."""
        self._observer = self._fetches.observer = observer
        self._loads.observer = self._departures.observer = observer

    # For those who know the workers.

    def add_worker(self, worker: Worker) -> None:
        """A worker is ready for jobs."""
        self.fleet.add(worker)
        self._drain(worker)

    def remove_worker(self, worker: Worker) -> None:
        """A worker is gone: its loads fail now, with the worker as the reason."""
        self.fleet.remove(worker)
        self._loads.cancel(worker)
        self._departures.cancel(worker)
        self._claims.forget(worker)
        self._serve_open()  # an adapter that it alone held may go elsewhere now

    def hold(self, worker: Worker, why: Hold, *, held: bool) -> None:
        """Stop or resume sending jobs and loads to a worker; what runs there goes on.

        It is sent some again once no reason holds it any more.
        """
        self.fleet.hold(worker, why, held=held)
        self._drain(worker)

    def observe(self, worker: Worker, report: Report) -> None:
        """Take in what a worker says of itself; it may have room sooner than was thought."""
        self.fleet.observe(worker, report, self.loop.time())
        if self._queue:
            self._drain(worker)
        if worker.slots.departing:
            self._departures.look(worker)

    def disown(self, worker: Worker, adapter: AdapterRef) -> None:
        """The worker answered that it has no such adapter: the next job for it loads it again."""
        self.fleet.disown(worker, adapter)
        self._drain(worker)

    def warm(self, worker: Worker, adapter: AdapterRef) -> bool:
        """Begin to load an adapter that nobody waits for.

        False where it is there, has no slot, or is retired.
        """
        if self._closed or not worker.accepting or worker.slots.get(adapter) is not None:
            return False
        if adapter in self.fleet.retired:
            return False
        if not worker.can_serve(adapter):
            return False
        self._loads.begin(worker, self.fleet.begin_load(worker, adapter))
        return True

    def loaded(self, worker: Worker, adapter: AdapterRef) -> Awaitable[None] | None:
        """Ends when the adapter is resident there, or with `LoadError`; None where it has no slot."""
        slot = worker.slots.get(adapter)
        return None if slot is None else self._loads.resident(worker, slot)

    def pin(self, adapter: AdapterRef, *, pinned: bool) -> None:
        """Never evict the adapter from where it is or comes to be, or evict it again as any other.

        One that was retired is restored by being pinned.
        """
        if pinned:
            self.restore(adapter)
        self.fleet.pin(adapter, pinned=pinned)
        for worker in tuple(self.fleet):
            self._drain(worker)

    def retire(self, adapter: AdapterRef) -> None:
        """Have a version leave every worker, each as soon as nobody there uses it (departures.py).

        A job that still comes for it is served as ever, and then it leaves.
        """
        self._departures.retire(adapter)
        if self._replicas is not None:
            self._replicas.retired(adapter)
        for worker in tuple(self.fleet):
            self._drain(worker)

    def restore(self, adapter: AdapterRef) -> None:
        """Take `retire` back, or `unload` of what was in use: it leaves in its turn, as any other."""
        self._departures.restore(adapter)

    async def unload(self, adapter: AdapterRef) -> dict[str, Unloaded]:
        """Drop an adapter that stays served from the workers that hold it; the next job loads it again.

        Returns what came of it, by the worker's id; nothing where nobody holds it. Does not wait for
        those who use it: where somebody does, it leaves by itself later.
        """
        return await self._departures.unload(adapter)

    def close(self) -> None:
        """Turn away all who wait and whoever comes; leases that are held go on to their end."""
        self._closed = self._loads.closed = True
        self._claims.close()
        self._departures.close()
        for timer in (self._again, self._ticking):
            if timer is not None:
                timer.cancel()
        for waiter in tuple(self._queue):
            self._refuse(waiter, self._shutting_down())
        for done in self._fetches.pending:
            done.set_exception(self._shutting_down())

    async def aclose(self) -> None:
        """Close, and end the loads, unloads and fetches that are still under way."""
        self.close()
        under_way = (*self._loads.tasks, *self._departures.tasks, *self._fetches.tasks)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    # Admission: before there is anything to wait for.

    def _enter(self, job: Job) -> Charge:
        """Let a job in, or raise `Rejected`; return what it reserved of its accounts' quotas."""
        if self._closed:
            raise self._shutting_down()
        now = self.loop.time()
        fleet, adapter = self.fleet, job.adapter
        if not job.contentions:  # else it has come before, and was refused because of other routers
            if adapter is not None:
                fleet.demand.arrived(adapter, now)
            self._policy.arrived(job, fleet, now)
        self._tick_on()
        if job.refuse_cold and adapter is not None and not fleet.resident(adapter):
            self._refuse_cold(adapter)
        tokens = job.prompt_tokens + fleet.learned.expected_output(job.max_output_tokens)
        accounts = (job.tenant, *job.accounts)
        charge = self._quotas.reserve(accounts, tokens, now, again=job.counted)
        if isinstance(charge, Shortage):
            name, wait_s = charge.account, charge.wait_s
            whose = f"tenant `{name}`" if name == job.tenant else f"account `{name}`"
            raise Rejected(
                Outcome.OVER_QUOTA,
                f"{whose} is over its quota; there is room again in {wait_s:.3g} s",
                wait_s,
            )
        job.counted = True
        fleet.tenants.arrived(job.tenant, now)
        return charge

    def _refuse_cold(self, adapter: AdapterRef) -> NoReturn:
        """Fail fast: whoever asked for it can go elsewhere."""
        staged = self.fleet.staged(adapter) or self._loader.staged(adapter)
        load_s = self.fleet.learned.load_s(Tier.DISK if staged else Tier.STORE)
        raise Rejected(
            Outcome.COLD_REFUSED,
            f"adapter {adapter.name} is not resident, and a cold load was refused; it would take "
            f"about {load_s:.3g} s",
            load_s,
        )

    def _decide(self, job: Job, now: float) -> Decision:
        """The policy's decision, within what the job asks for. Raises `Rejected` where it cannot be."""
        decision = self._policy.place(job, self.fleet, now)
        if job.refuse_cold and job.adapter is not None:
            return self._without_load(job, job.adapter, decision)
        return decision

    def _without_load(self, job: Job, adapter: AdapterRef, decision: Decision) -> Decision:
        """The decision for a job that refuses to wait for a load: a worker that has its adapter.

        It waits for one of those, where all are overloaded. Raises `Rejected` where there is none.
        """
        resident = self.fleet.resident(adapter)
        if not resident:
            self._refuse_cold(adapter)
        if decision.worker is None or decision.worker in resident:
            return decision
        if not any(worker.accepting for worker in resident):
            self._refuse_cold(adapter)
        now = self.loop.time()
        able = [
            worker
            for worker in resident
            if worker.ready_index >= 0
            and worker.can_serve(adapter, job.tenant)
            and self._policy.opens_at(worker, now) <= now
        ]
        able = [worker for worker in able if worker.id not in job.avoid] or able
        roomy = [worker for worker in able if self._policy.has_memory(job, worker, self.fleet)]
        if not roomy:
            full = tuple((worker.id, Drop.NO_MEMORY) for worker in able)
            return Decision(None, Reason.ALL_OVERLOADED, decision.dropped + full)
        worker = min(roomy, key=lambda worker: worker.in_flight)
        return Decision(worker, Reason.HOLDER, decision.dropped, decision.considered)

    # Fetching.

    async def _fetched(self, job: Job) -> None:
        """Wait until the adapter is on this host. Raises `LoadError` and `Rejected`."""
        adapter = job.adapter
        assert adapter is not None
        if self._fetches.waiting >= self._queue.limit:  # a bound of their own: they keep nobody out
            raise self._queue_full()
        done = self._fetches.fetched(adapter)
        timer = None
        if job.deadline is not None:
            until = max(self.loop.time(), self._last_moment(job, job.deadline))
            timer = self.loop.call_at(until, self._fetch_too_late, done, adapter)
        try:
            await done
        finally:
            self._fetches.left(adapter, done)
            if timer is not None:
                timer.cancel()

    def _fetch_too_late(self, done: "asyncio.Future[None]", adapter: AdapterRef) -> None:
        if not done.done():
            message = f"the deadline has passed while adapter {adapter.name} was fetched"
            done.set_exception(Rejected(Outcome.DEADLINE, message, self.retry_after_s))

    # Admission: the queue.

    def _admit(self, job: Job) -> Grant | None:
        """Grant at once where a worker can take the job and nobody is to be let first."""
        if self._closed:
            raise self._shutting_down()
        queue = self._queue
        if not queue:
            return self._try_grant(job)
        if self._again_at <= self.loop.time():
            self._serve_open()  # those who wait for this moment go first
        if not self.fleet.ready:
            self._observer.waits(job, Decision(None, nobody(self.fleet, job.adapter)))
            return None
        # Who waits now could not be placed a moment ago, so it is passed by, not pushed aside.
        if (grant := self._try_grant(job)) is None:
            return None
        if queue:
            queue.charge(job, queue.tag_of(job, self._tokens(job)))
            self._drain_rate.served(self.loop.time())
        return grant

    def _tokens(self, job: Job) -> float:
        return job.prompt_tokens + self.fleet.learned.expected_output(job.max_output_tokens)

    def _last_moment(self, job: Job, deadline: float) -> float:
        """When the job must be on a worker, if its first token is to be in time."""
        lora = job.adapter is not None
        return deadline - self.fleet.learned.times.prefill_s(job.prompt_tokens, lora=lora)

    async def _wait(self, job: Job) -> Grant:
        now = self.loop.time()
        queue = self._queue
        tag = queue.tag_of(job, self._tokens(job))
        until = now + self.queue_timeout_s
        if job.contends_since is not None:  # it had its turn
            tag = queue.clock
            until = max(now, job.contends_since + self.queue_timeout_s)
        outcome = Outcome.QUEUE_TIMEOUT
        if job.deadline is not None and (last := self._last_moment(job, job.deadline)) < until:
            until, outcome = max(now, last), Outcome.DEADLINE
            if (rate := self._drain_rate.fresh(now)) > 0.0:
                # By the order of the queue; or, whatever others have in it, by its tenant's own jobs
                # there at the rate that is its tenant's due.
                own_rate = rate * self.fleet.tenants.share(job.tenant)
                wait_s = min(
                    (queue.ahead_of(tag) + 1) / rate, (queue.waiting_of(job.tenant) + 1) / own_rate
                )
                if now + wait_s > last:
                    raise Rejected(
                        outcome,
                        f"no capacity: it would wait about {wait_s:.3g} s, and miss its deadline",
                        self.retry_after_s,
                    )
        if queue.full:
            self._make_room(tag)
        granted: asyncio.Future[Grant] = self.loop.create_future()
        waiter = Waiter(job, granted, now)
        queue.join(waiter, tag)
        self._claims.waits()
        if self._replicas is not None and job.adapter is not None:
            self._replicas.waits(job.adapter)
        timer = self.loop.call_at(until, self._expire, waiter, outcome, until - now)
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

    def _make_room(self, tag: float) -> None:
        """The queue is full: who comes last gives way, be it the newcomer. Raises `Rejected` then."""
        last = self._queue.last
        if last is None or last.tag <= tag:
            raise self._queue_full()
        self._refuse(last, self._queue_full())

    def _queue_full(self) -> Rejected:
        waiting = max(len(self._queue), self._fetches.waiting)
        message = f"no capacity: {waiting} requests are waiting already"
        return Rejected(Outcome.QUEUE_FULL, message, self.retry_after_s)

    def _expire(self, waiter: Waiter[Grant], outcome: Outcome, waited_s: float) -> None:
        message = f"no capacity: waited {waited_s:.3g} s for a worker"
        self._refuse(waiter, Rejected(outcome, message, self.retry_after_s))

    def _refuse(self, waiter: Waiter[Grant], rejection: Rejected) -> None:
        if not waiter.granted.done():
            waiter.granted.set_exception(rejection)
        self._leave(waiter)

    def _leave(self, waiter: Waiter[Grant]) -> None:
        """Somebody gave up, or was served."""
        self._queue.leave(waiter)
        if not self._queue:
            self._drain_rate.pause()
        self._claims.left(waiter)

    async def _pause(self, job: Job, doublings: int) -> float:
        """Let other routers be done, the longer the oftener they were quicker; how long that was."""
        pause_s = min(CONTENTION_PAUSE_S * (1 << min(doublings, 10)), CONTENTION_PAUSE_MAX_S)
        over: asyncio.Future[None] = self.loop.create_future()

        def end() -> None:
            if not over.done():
                over.set_result(None)

        timer = self.loop.call_later(pause_s, end)
        self._pausing[job.id] = job
        try:
            await over
        finally:
            timer.cancel()
            del self._pausing[job.id]
        return pause_s

    def _contends(self, job: Job) -> None:
        """Let the job be placed anew, as other routers were there first; not for ever."""
        now = self.loop.time()
        job.contentions += 1
        if job.contends_since is None:
            job.contends_since = now
        if now - job.contends_since >= self.queue_timeout_s:
            message = "no capacity: other routers of these workers were there first, time and again"
            raise Rejected(Outcome.QUEUE_TIMEOUT, message, self.retry_after_s)

    def _shutting_down(self) -> Rejected:
        return Rejected(Outcome.SHUTTING_DOWN, "the router is shutting down", 1.0)

    # Serving those who wait.

    def _drain(self, worker: Worker) -> None:
        """Something changed at this worker: serve those who wait for it.

        Only those: before the change nobody could be placed anywhere.
        """
        queue = self._queue
        refused: dict[int, None] = {}
        while worker.ready_index >= 0 and queue:
            now = self.loop.time()
            opens_at = self._policy.opens_at(worker, now)
            if opens_at > now:
                self._ask_again(opens_at)
                return
            waiter = queue.next_for(worker, refused)
            if waiter is None:
                return
            if waiter.granted.done():  # cancelled, or refused: it has not run since to leave
                self._leave(waiter)
                continue
            try:
                grant = self._try_grant(waiter.job)
            except Rejected as rejection:
                self._refuse(waiter, rejection)
                continue
            if grant is None:  # the policy would rather wait for another worker
                refused[waiter.seq] = None
                if len(refused) == REFUSALS_MAX:
                    return
                continue
            queue.serve(waiter, grant)
            self._drain_rate.served(now)
            self._leave(waiter)

    def _ask_again(self, at: float) -> None:
        """Serve who waits at that time, when a worker that is full now will have room."""
        # A clock that counts milliseconds, as uvloop's does, would be asked until it has moved.
        at = max(at, self.loop.time() + AGAIN_MIN_S)
        if math.isinf(at) or self._closed or self._again_at <= at:
            return
        if self._again is not None:
            self._again.cancel()
        self._again_at = at  # kept here: not every loop's handle tells it
        self._again = self.loop.call_at(at, self._serve_open)

    def _serve_open(self) -> None:
        """Time alone has given some workers room: serve for each of them."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
            self._again_at = math.inf
        for worker in tuple(self.fleet.ready):
            if not self._queue:
                return
            self._drain(worker)

    # Residency.

    def _load_ended(self, worker: Worker, slot: Slot, error: LoadError | None) -> None:
        if self._replicas is not None:
            if error is None:
                self._replicas.loaded(slot.adapter)
            else:
                self._replicas.failed(slot.adapter, self.loop.time())
        # A slot may have fallen idle, or be free again.
        self._drain(worker)
        if worker.slots.departing:
            self._departures.look(worker)

    def _wanted(self, adapter: AdapterRef) -> int:
        """How many jobs wait for the adapter, for whatever reason."""
        pausing = sum(job.adapter == adapter for job in self._pausing.values())
        return self._queue.waiting_for(adapter) + self._fetches.waiting_for(adapter) + pausing

    # Placement, and the reservation in the same step.

    def _try_grant(self, job: Job) -> Grant | None:
        """Place the job and reserve for it; None where it must wait.

        Raises `Rejected` where it would miss its deadline, or wait for a load that it refuses.
        """
        now = self.loop.time()
        fleet, adapter = self.fleet, job.adapter
        decision = self._decide(job, now)
        worker = decision.worker
        if worker is None:
            self._observer.waits(job, decision)
            if decision.again_at is not None:
                self._ask_again(decision.again_at)
            return None
        first_token_s = decision.first_token_s
        if job.deadline is not None and first_token_s is not None:
            late_s = now + first_token_s - job.deadline
            if late_s > 0.0:
                fleet.learned.doubt()
                worker.pace += GAIN * (1.0 - worker.pace)
                raise Rejected(
                    Outcome.DEADLINE,
                    f"no capacity: its first token would come about {late_s:.3g} s too late",
                    self.retry_after_s,
                )
        cached_tokens = 0
        if job.prefix:
            cached_tokens = fleet.prefixes.cached_tokens(adapter, job.prefix).get(worker.id, 0)
        slot, begin = fleet.reserve(worker, adapter, job.tenant)
        if slot is not None and slot.users == 1 and not fleet.tenants.alone:
            self._headroom.keep(worker)
        context_tokens = fleet.begin_work(worker, job, cached_tokens, now)
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
            self._loads.begin(worker, slot)
        return Grant(worker, slot, use, decision, context_tokens, job.tenant)

    def _release(self, grant: Grant) -> None:
        self.fleet.release(grant.worker, grant.slot, grant.tenant)
        self._headroom.released(grant.worker)
        self.fleet.end_work(grant.worker, grant.context_tokens)
        self._drain(grant.worker)
        # After those who wait: to be evicted for one of them is to leave, too.
        if grant.slot is not None and grant.slot.departs:
            self._departures.look(grant.worker)

    # Adapters before they are asked for.

    def _tick_on(self) -> None:
        """Plan holders from time to time, for as long as there is traffic."""
        if self._replicas is not None and self._ticking is None and not self._closed:
            self._ticking = self.loop.call_later(self._replicas.period_s, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        assert self._replicas is not None
        if self._replicas.plan(self._queue.waiting_for, self.loop.time()) or self._queue:
            self._tick_on()
