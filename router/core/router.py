"""`async with router.lease(job) as lease:` is the whole interface of the core.

Inside, in this order and in no other: admission (quota, the adapter brought to this host, a bounded
fair queue, the deadline), placement (which worker), residency (the adapter is made resident there), the
lease. Capacity is reserved at the moment of decision, before any await, and leaving the block releases
all of it, whatever happened.

This is the only module of the core that waits. It reads no clock but `loop.time()`, so the same
code runs on a real loop and on the simulator's.
"""

import asyncio
import math
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Final, NoReturn, Self

from router.core.admission import AdmissionQueue, Waiter
from router.core.drain import DrainRate
from router.core.fleet import Fleet, LoadRefusedError, Report, Worker
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, LoadFault, Outcome, Rejected
from router.core.placement import Decision, Drop, Policy, Reason, nobody
from router.core.ports import Loader, NoObserver, Observer
from router.core.quotas import Quota, Quotas
from router.core.replicas import Replicas
from router.core.residency import LOADING, RESIDENT, Slot
from router.core.timing import GAIN, Tier

RETRY_AFTER_MAX_S: Final = 60.0
# By these names the hot path has them at a tenth of the cost (Python 3.11).
NO_ADAPTER: Final = AdapterUse.NONE
HIT: Final = AdapterUse.HIT
JOINED: Final = AdapterUse.LOADING
COLD: Final = AdapterUse.COLD
# How many of those who wait too long for a slot are looked at in one go.
CLAIMS_AT_ONCE: Final = 16
# After so many patiences another slot is closed instead: this one has a long answer in it.
CLAIM_PATIENCES: Final = 4
AGAIN_MIN_S: Final = 0.001
# Where other routers were quicker a job is placed anew: so often at once, then after longer pauses.
CONTENTIONS_AT_ONCE: Final = 3
CONTENTION_PAUSE_S: Final = 0.005
CONTENTION_PAUSE_MAX_S: Final = 0.25
# How many that would rather wait are passed over when a worker has room.
REFUSALS_MAX: Final = 32


class Grant:
    """What was reserved for one job. `context_tokens` is what its worker counts it for."""

    __slots__ = ("context_tokens", "decision", "slot", "tenant", "use", "worker")

    def __init__(
        self,
        worker: Worker,
        slot: Slot | None,
        use: AdapterUse,
        decision: Decision,
        context_tokens: float,
        tenant: str,
    ) -> None:
        self.worker = worker
        self.slot = slot
        self.use = use
        self.decision = decision
        self.context_tokens = context_tokens
        self.tenant = tenant


class Lease:
    """One job's place on one worker. Made by `Router.lease`, entered once.

    Entering raises `Rejected` where there is no capacity, and `LoadError` where the adapter could
    not be made resident; nothing is held then. `queued_s` and `load_s` are what it waited for, in
    vain or not. Who holds it may say when the first token came, and how many there were at the end:
    predictions and quotas become truer by it.
    """

    __slots__ = (
        "_first_token_at",
        "_grant",
        "_output_tokens",
        "_prompt_tokens",
        "_reserved",
        "_router",
        "job",
        "load_s",
        "queued_s",
    )

    def __init__(self, router: "Router", job: Job) -> None:
        self._router = router
        self.job = job
        self._grant: Grant | None = None
        self._reserved = 0.0
        self._first_token_at: float | None = None
        self._prompt_tokens: int | None = None
        self._output_tokens: int | None = None
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

    def first_token(self) -> None:
        """The first token is out, now."""
        if self._first_token_at is None:
            self._first_token_at = self._router.loop.time()

    def answered(self, output_tokens: int, prompt_tokens: int | None = None) -> None:
        """The answer is complete and had so many tokens; the prompt too, where the engine said so."""
        self._output_tokens = output_tokens
        self._prompt_tokens = prompt_tokens

    async def __aenter__(self) -> Self:
        router, job = self._router, self.job
        self._reserved = router._enter(job)  # noqa: SLF001  (two halves of one mechanism)
        try:
            if router._must_fetch(job):  # noqa: SLF001
                started = router.loop.time()
                try:
                    await router._fetched(job)  # noqa: SLF001
                finally:
                    self.load_s = router.loop.time() - started
            while self._grant is None:
                if job.contentions > CONTENTIONS_AT_ONCE:
                    self.queued_s += await router._pause(job.contentions)  # noqa: SLF001
                try:
                    self._grant = await self._placed()
                except LoadError as error:
                    if error.fault is not LoadFault.CONTENDED:
                        raise
                    router._contends(job)  # noqa: SLF001
        except BaseException:
            router._settle(job, self._reserved, 0.0)  # noqa: SLF001
            raise
        return self

    async def _placed(self) -> Grant:
        """Be given a worker, and wait until the adapter is there. Raises `Rejected` and `LoadError`."""
        router, job = self._router, self.job
        grant = router._admit(job)  # noqa: SLF001
        if grant is None:
            started = router.loop.time()
            try:
                grant = await router._wait(job)  # noqa: SLF001
            finally:
                self.queued_s += router.loop.time() - started
        slot = grant.slot
        if slot is not None and slot.phase is not RESIDENT:
            started = router.loop.time()
            try:
                await router._resident(grant)  # noqa: SLF001
            except BaseException:
                router._release(grant)  # noqa: SLF001
                raise
            finally:
                self.load_s += router.loop.time() - started
        return grant

    def refused(self, *, full: bool) -> None:
        """The worker refused the request because of other routers: it is full, or has not the adapter.

        The lease is still held; who leaves it and takes another goes before those who wait. Raises
        `Rejected` where that has gone on for `queue_timeout_s`.
        """
        grant, router = self._grant, self._router
        assert grant is not None, "the lease is not held"
        if full:
            router.fleet.found_full(grant.worker)
        elif grant.slot is not None:
            router.fleet.found_gone(grant.worker, grant.slot)
        router._contends(self.job)  # noqa: SLF001

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        grant, self._grant = self._grant, None
        assert grant is not None, "a lease is left once"
        router = self._router
        tokens = self._output_tokens
        if tokens:  # an embedding and a refusal teach nothing of how long answers are
            router.fleet.learned.answered(tokens)
            if self._first_token_at is not None and tokens > 1:
                step_s = (router.loop.time() - self._first_token_at) / (tokens - 1)
                router.fleet.learn_pace(grant.worker, step_s)
        used = self._reserved
        if kind is not None:
            # A client that hangs up has had its prompt computed; who was failed pays nothing.
            gone = issubclass(kind, asyncio.CancelledError)
            used = float(self.job.prompt_tokens) if gone else 0.0
        if tokens is not None:
            prompt = self._prompt_tokens
            used = float(tokens + (self.job.prompt_tokens if prompt is None else prompt))
        router._settle(self.job, self._reserved, used)  # noqa: SLF001
        router._release(grant)  # noqa: SLF001


class Router:
    """Routes the jobs of one base model over one fleet. To be made inside a running loop.

    `max_queued` bounds how many wait for capacity and `queue_timeout_s` for how long. Who has waited
    for a slot for `slot_patience_s` gets one that is closed to new users until it falls idle.
    `locality_tokens` is the policy's own unless given. `weights` are the tenants' shares under
    contention, `quotas` their limits a minute.
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
        quotas: Mapping[str, Quota] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.queue_timeout_s = queue_timeout_s
        self.slot_patience_s = slot_patience_s
        self._policy = policy
        self._loader = loader
        self._observer = observer or NoObserver()
        self._queue: AdmissionQueue[Grant] = AdmissionQueue(
            limit=max_queued,
            locality_tokens=policy.locality_tokens if locality_tokens is None else locality_tokens,
            weights=weights,
        )
        fleet.tenants.weigh(weights or {})
        self._quotas = Quotas(quotas or {}, self.loop.time())
        self._drain_rate = DrainRate()
        # One task a load, and one a fetch: no waiter's leaving may cancel what the others wait for.
        self._loads: dict[tuple[str, Slot], asyncio.Task[int]] = {}
        self._fetches: dict[AdapterRef, asyncio.Task[None]] = {}
        self._fetch_waiters: dict[AdapterRef, dict[asyncio.Future[None], None]] = {}
        self._fetching = 0  # jobs that wait for one
        # Slots that were closed, by the waiter for whom.
        self._claims: dict[int, tuple[Worker, Slot]] = {}
        self._kept: dict[int, Worker] = {}  # workers that are kept for one that needs much memory
        self._patience: asyncio.TimerHandle | None = None
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
        for seq, (claimed, _) in tuple(self._claims.items()):
            if claimed is worker:
                del self._claims[seq]
        self._serve_open()  # an adapter that it alone held may go elsewhere now

    def set_accepting(self, worker: Worker, *, accepting: bool) -> None:
        """Stop or resume sending jobs to a worker; what runs there goes on."""
        self.fleet.set_accepting(worker, accepting=accepting)
        self._drain(worker)

    def observe(self, worker: Worker, report: Report) -> None:
        """Take in what a worker says of itself; it may have room sooner than was thought."""
        self.fleet.observe(worker, report, self.loop.time())
        if self._queue:
            self._drain(worker)

    def disown(self, worker: Worker, adapter: AdapterRef) -> None:
        """The worker answered that it has no such adapter: the next job for it loads it again."""
        self.fleet.disown(worker, adapter)
        self._drain(worker)

    def warm(self, worker: Worker, adapter: AdapterRef) -> bool:
        """Begin to load an adapter that nobody waits for. False where it is there, or has no slot."""
        if self._closed or not worker.accepting or worker.slots.get(adapter) is not None:
            return False
        if not worker.can_serve(adapter):
            return False
        self._begin_load(worker, self.fleet.begin_load(worker, adapter))
        return True

    def pin(self, adapter: AdapterRef, *, pinned: bool) -> None:
        """Never evict the adapter from where it is or comes to be, or evict it again as any other."""
        self.fleet.pin(adapter, pinned=pinned)
        for worker in tuple(self.fleet):
            self._drain(worker)

    def close(self) -> None:
        """Turn away all who wait and whoever comes; leases that are held go on to their end."""
        self._closed = True
        for timer in (self._patience, self._again, self._ticking):
            if timer is not None:
                timer.cancel()
        for waiter in tuple(self._queue):
            self._refuse(waiter, self._shutting_down())
        for waiters in self._fetch_waiters.values():
            for future in waiters:
                if not future.done():
                    future.set_exception(self._shutting_down())

    async def aclose(self) -> None:
        """Close, and end the loads and fetches that are still under way."""
        self.close()
        under_way = (*self._loads.values(), *self._fetches.values())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    # Admission: before there is anything to wait for.

    def _enter(self, job: Job) -> float:
        """Let a job in, or raise `Rejected`; return the tokens that it reserved of its quota."""
        if self._closed:
            raise self._shutting_down()
        now = self.loop.time()
        fleet, adapter = self.fleet, job.adapter
        if adapter is not None:
            fleet.demand.arrived(adapter, now)
        self._policy.arrived(job, fleet, now)
        self._tick_on()
        if job.refuse_cold and adapter is not None and not fleet.resident(adapter):
            self._refuse_cold(adapter)
        tokens = job.prompt_tokens + fleet.learned.expected_output(job.max_output_tokens)
        if wait_s := self._quotas.reserve(job.tenant, tokens, now, again=job.is_again):
            raise Rejected(
                Outcome.OVER_QUOTA,
                f"tenant `{job.tenant}` is over its quota; there is room again in {wait_s:.3g} s",
                wait_s,
            )
        fleet.tenants.arrived(job.tenant, now)
        return tokens

    def _settle(self, job: Job, reserved: float, used: float) -> None:
        self._quotas.settle(job.tenant, reserved, used, self.loop.time())

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
        if not able:
            return Decision(None, Reason.ALL_OVERLOADED, decision.dropped, decision.considered)
        worker = min(able, key=lambda worker: worker.in_flight)
        return Decision(worker, Reason.HOLDER, decision.dropped, decision.considered)

    # Fetching: the adapter comes to this host before a worker is chosen, and holds up none.

    def _must_fetch(self, job: Job) -> bool:
        adapter = job.adapter
        if adapter is None or self.fleet.staged(adapter) or self.fleet.holders(adapter):
            return False
        if self._loader.staged(adapter):
            self.fleet.stage(adapter)
            return False
        return True

    async def _fetched(self, job: Job) -> None:
        """Wait until the adapter is on this host. Raises `LoadError` and `Rejected`."""
        adapter = job.adapter
        assert adapter is not None
        if self._fetching >= self._queue.limit:  # a bound of their own: they keep nobody out
            raise self._queue_full()
        if adapter not in self._fetches:
            task = self.loop.create_task(self._loader.fetch(adapter))
            self._fetches[adapter] = task
            task.add_done_callback(partial(self._fetch_ended, adapter))
        done: asyncio.Future[None] = self.loop.create_future()
        waiters = self._fetch_waiters.setdefault(adapter, {})
        waiters[done] = None
        timer = None
        if job.deadline is not None:
            until = max(self.loop.time(), self._last_moment(job, job.deadline))
            timer = self.loop.call_at(until, self._fetch_too_late, done, adapter)
        self._fetching += 1
        try:
            await done
        finally:
            self._fetching -= 1
            waiters.pop(done, None)
            if timer is not None:
                timer.cancel()

    def _fetch_too_late(self, done: "asyncio.Future[None]", adapter: AdapterRef) -> None:
        if not done.done():
            message = f"the deadline has passed while adapter {adapter.name} was fetched"
            done.set_exception(Rejected(Outcome.DEADLINE, message, self.retry_after_s))

    def _fetch_ended(self, adapter: AdapterRef, task: "asyncio.Task[None]") -> None:
        del self._fetches[adapter]
        error: LoadError | None
        if task.cancelled():
            error = LoadError(LoadFault.STORE_UNAVAILABLE, "the router is shutting down")
        elif (failure := task.exception()) is None:
            error = None
            self.fleet.stage(adapter)
        elif isinstance(failure, LoadError):
            error = failure
        else:
            error = LoadError(LoadFault.STORE_UNAVAILABLE, f"{type(failure).__name__}: {failure}")
        for done in self._fetch_waiters.pop(adapter, {}):
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:  # a new one for each: a shared one would gather all their tracebacks
                done.set_exception(LoadError(error.fault, str(error)))

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
                wait_s = (queue.ahead_of(tag) + 1) / rate
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
        self._be_patient()
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
        message = (
            f"no capacity: {max(len(self._queue), self._fetching)} requests are waiting already"
        )
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
        worker = self._kept.get(waiter.seq)
        if worker is None and waiter.seq in self._claims:
            worker = self._claims[waiter.seq][0]
        if worker is not None:
            self._give_up_claim(waiter)
            self._drain(worker)

    async def _pause(self, contentions: int) -> float:
        """Let other routers be done, the longer the oftener they were quicker; how long that was."""
        doublings = min(contentions - CONTENTIONS_AT_ONCE, 10)
        pause_s = min(CONTENTION_PAUSE_S * (1 << doublings), CONTENTION_PAUSE_MAX_S)
        over: asyncio.Future[None] = self.loop.create_future()

        def end() -> None:
            if not over.done():
                over.set_result(None)

        timer = self.loop.call_later(pause_s, end)
        try:
            await over
        finally:
            timer.cancel()
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

    # Those who wait too long for a slot.

    def _be_patient(self) -> None:
        if self._patience is None and not self._closed:
            self._patience = self.loop.call_later(self.slot_patience_s, self._lose_patience)

    def _lose_patience(self) -> None:
        """Close a slot for each of those who have waited too long for one, in their order."""
        self._patience = None
        if not self._queue:
            return
        now = self.loop.time()
        self.fleet.tenants.tick(now)
        looked_at: dict[AdapterRef | None, None] = {}
        wanting: list[Waiter[Grant]] = []
        for waiter in self._queue:
            adapter = waiter.job.adapter
            if adapter in looked_at:
                continue
            if now - waiter.joined_at >= self.slot_patience_s:
                wanting.append(waiter)
            looked_at[adapter] = None
            if len(looked_at) == CLAIMS_AT_ONCE:
                break
        for waiter in wanting:
            if not waiter.waits:
                continue  # served on the way
            claim = self._claims.get(waiter.seq)
            if claim is not None and claim[0].slots.closed is claim[1] and now < waiter.claim_until:
                continue
            self._give_up_claim(waiter)
            decision = self._policy.place(waiter.job, self.fleet, now)
            if decision.worker is not None:  # what other tenants need has changed with time alone
                self._drain(decision.worker)
            elif decision.reason is Reason.NO_SLOT:
                self._claim(waiter)
            elif any(drop is Drop.NO_MEMORY for _, drop in decision.dropped):
                self._claim_memory(waiter)
        self._be_patient()

    def _claim(self, waiter: Waiter[Grant]) -> None:
        """Close the slot that will fall idle soonest, as far as one can tell: of the fewest users.

        One of the tenant's own, or of another that uses more than its share where this one does not.
        """
        best: tuple[int, bool, int, int] | None = None
        chosen: tuple[Worker, Slot] | None = None
        for worker in self.fleet.ready:
            if worker.slots.closed is not None or worker.id in waiter.job.avoid:
                continue
            tenant, shares = waiter.job.tenant, worker.slots.shares
            entitled = shares.entitled(tenant)
            for slot in worker.slots:
                if (
                    slot.users
                    and slot.tenant != tenant
                    and not (entitled and shares.beyond(slot.tenant))
                ):
                    continue
                if slot.phase is RESIDENT and (slot.users or slot.foreign) and not slot.pinned:
                    # One that was closed for it before, and has not fallen idle, comes last; and
                    # before it one that other routers use.
                    rank = (
                        waiter.tried.count(slot),
                        slot.foreign,
                        slot.users,
                        -len(self.fleet.holders(slot.adapter)),
                    )
                    if best is None or rank < best:
                        best, chosen = rank, (worker, slot)
        if chosen is not None:
            self.fleet.close_slot(*chosen)
            self._claims[waiter.seq] = chosen
            waiter.tried.append(chosen[1])
            waiter.claim_until = self.loop.time() + CLAIM_PATIENCES * self.slot_patience_s
            if not chosen[1].users:
                self._drain(chosen[0])

    def _claim_memory(self, waiter: Waiter[Grant]) -> None:
        """Send nobody else to the worker with the most memory left, until this one fits."""
        able = [worker for worker in self.fleet.ready if worker.kept_for is None]
        if able:
            worker = min(able, key=lambda worker: worker.context_tokens - worker.kv_tokens)
            worker.kept_for = waiter.job
            self._kept[waiter.seq] = worker

    def _give_up_claim(self, waiter: Waiter[Grant]) -> None:
        """Open the slot that was closed for it, and the worker that was kept."""
        kept = self._kept.pop(waiter.seq, None)
        if kept is not None and kept.kept_for is waiter.job:
            kept.kept_for = None
        claim = self._claims.pop(waiter.seq, None)
        if claim is not None:
            self.fleet.open_slot(*claim)

    # Placement, and the reservation in the same step.

    def _try_grant(self, job: Job) -> Grant | None:
        """Place the job and reserve for it; None where it must wait.

        Raises `Rejected` where it would miss its deadline, or wait for a load that it refuses.
        """
        now = self.loop.time()
        fleet, adapter = self.fleet, job.adapter
        decision = self._policy.place(job, fleet, now)
        if job.refuse_cold and adapter is not None:
            decision = self._without_load(job, adapter, decision)
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
            self._begin_load(worker, slot)
        return Grant(worker, slot, use, decision, context_tokens, job.tenant)

    def _release(self, grant: Grant) -> None:
        self.fleet.release(grant.worker, grant.slot, grant.tenant)
        self.fleet.end_work(grant.worker, grant.context_tokens)
        self._drain(grant.worker)

    # Residency.

    def _begin_load(self, worker: Worker, slot: Slot) -> None:
        victim = slot.victim.adapter if slot.victim else None
        now = self.loop.time()
        tier = self.fleet.tier(worker, slot.adapter)
        slot.ready_at = now + self.fleet.learned.load_s(tier)
        task = self.loop.create_task(self._loader.load(worker, slot.adapter, victim))
        self._loads[worker.id, slot] = task
        # A callback, not an await around it: it runs for a task cancelled before its start too.
        task.add_done_callback(partial(self._load_ended, worker, slot, now, tier))

    def _load_ended(
        self, worker: Worker, slot: Slot, started: float, tier: Tier, task: asyncio.Task[int]
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
        now = self.loop.time()
        load_s = now - started
        if error is None:
            self.fleet.stage(slot.adapter)
            self.fleet.learned.loaded(tier, load_s)
            slot.reload_s = load_s
            evicted = self.fleet.finish_load(worker, slot, task.result(), now)
            if evicted is not None:
                self._observer.evicted(worker, evicted.adapter)
        else:
            slot.error = error
            self.fleet.fail_load(worker, slot)
            if isinstance(error, LoadRefusedError) and error.report is not None:
                self.fleet.observe(worker, error.report, now)
            if self._replicas is not None:
                self._replicas.failed(slot.adapter)
        del self._loads[worker.id, slot]
        self._observer.load_ended(worker, slot.adapter, load_s, error)
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
