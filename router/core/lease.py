"""One job's place on one worker: `async with router.lease(job) as lease:`.

Entering goes through admission, placement and residency in this order and in no other (router.py);
leaving releases every reservation, whatever happened. A lease is the router's other half: it holds what
belongs to one job, the router what belongs to all.
"""

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from router.core.fleet import Worker
from router.core.job import AdapterUse, Job, LoadError, LoadFault
from router.core.placement import Decision
from router.core.quotas import Charge
from router.core.residency import RESIDENT, Slot

if TYPE_CHECKING:
    from router.core.router import Router


# Where other routers were quicker a job is placed anew: so often at once, then after pauses.
CONTENTIONS_AT_ONCE: Final = 3


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
        "_charge",
        "_first_token_at",
        "_grant",
        "_output_tokens",
        "_prompt_tokens",
        "_router",
        "job",
        "load_s",
        "queued_s",
    )

    def __init__(self, router: "Router", job: Job) -> None:
        self._router = router
        self.job = job
        self._grant: Grant | None = None
        self._charge: Charge | None = None
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
        charge = self._charge = router._enter(job)  # noqa: SLF001  (two halves of one mechanism)
        try:
            if router._fetches.needed(job):  # noqa: SLF001
                started = router.loop.time()
                try:
                    await router._fetched(job)  # noqa: SLF001
                finally:
                    self.load_s = router.loop.time() - started
            while self._grant is None:
                if job.contentions > CONTENTIONS_AT_ONCE:
                    doublings = job.contentions - CONTENTIONS_AT_ONCE
                    self.queued_s += await router._pause(job, doublings)  # noqa: SLF001
                try:
                    self._grant = await self._placed()
                except LoadError as error:
                    if error.fault is not LoadFault.CONTENDED:
                        raise
                    router._contends(job)  # noqa: SLF001
        except BaseException:
            charge.settle(0.0, router.loop.time())
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
                await router._loads.resident(grant.worker, slot)  # noqa: SLF001
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
        charge = self._charge
        assert charge is not None
        used = charge.tokens
        if kind is not None:
            # A client that hangs up has had its prompt computed; who was failed pays nothing.
            gone = issubclass(kind, asyncio.CancelledError)
            used = float(self.job.prompt_tokens) if gone else 0.0
        if tokens is not None:
            prompt = self._prompt_tokens
            used = float(tokens + (self.job.prompt_tokens if prompt is None else prompt))
        charge.settle(used, router.loop.time())
        router._release(grant)  # noqa: SLF001
