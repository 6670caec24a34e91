"""A router over made-up workers, in virtual time: what the core's tests drive."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from heapq import heappop, heappush
from random import Random
from typing import Any, TypeVar

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job, LoadError
from router.core.placement import Decision
from router.core.policies import POLICIES
from router.core.quotas import Quota, Quotas
from router.core.residency import Eviction
from router.core.router import Router
from sim.environment import Environment, Moment
from sim.loop import SimLoop, run

T = TypeVar("T")


class WatchedMoment(Moment):
    """One that the loop does not take from the queue by itself: it leaves it to `step`."""

    __slots__ = ()


class Watched(Environment):
    """Calls `check` whenever all that was ready has run, before time moves on."""

    check: Callable[[], None] = staticmethod(lambda: None)

    def at(
        self,
        moment: float,
        callback: Callable[[Moment], None],
        rank: int = 1,
        value: object = None,
    ) -> Moment:
        happens = WatchedMoment(callback, value)
        heappush(self._queue, (moment, rank, next(self._eid), happens))  # type: ignore[misc]
        return happens

    def step(self) -> None:
        self.check()
        queue: Any = self._queue
        if type(queue[0][3]) is WatchedMoment:
            self._now, _, _, happens = heappop(queue)
            happens.callback(happens)
        else:
            super().step()


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the simulator's loop."""
    return run(Watched(), main)


def after_every_event(check: Callable[[], None]) -> None:
    """Have `check` called after each event of the simulation that is running."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    assert isinstance(loop.env, Watched)
    loop.env.check = check


def ref(name: str) -> AdapterRef:
    return AdapterRef("base", name)


class FakeLoader:
    """Loads in `load_s` and unloads in `unload_s`; `fails` decides which loads do not.

    `engines` are what the workers hold, and `unloads` how each of the coming unloads is to fail.
    """

    def __init__(
        self,
        load_s: float = 1.0,
        fails: Callable[[AdapterRef], LoadError | None] | None = None,
        fetch_s: float = 0.0,
    ) -> None:
        self.load_s = load_s
        self.times: dict[str, float] = {}
        self.fails = fails or (lambda _: None)
        self.fetch_s = fetch_s
        self.fetched: dict[AdapterRef, None] = {}
        self.calls: list[tuple[str, str, str | None]] = []
        self.unload_s = 0.5
        self.unloads: list[LoadError | None] = []
        self.unloaded: list[tuple[str, str]] = []
        self.engines: dict[Worker, dict[AdapterRef, None]] = {}

    def staged(self, adapter: AdapterRef) -> bool:
        return self.fetch_s <= 0.0 or adapter in self.fetched

    async def fetch(self, adapter: AdapterRef) -> None:
        await asyncio.sleep(self.fetch_s)
        if error := self.fails(adapter):
            raise error
        self.fetched[adapter] = None

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        self.calls.append((worker.id, adapter.name, evict.name if evict else None))
        await asyncio.sleep(self.times.get(adapter.name, self.load_s))
        if error := self.fails(adapter):
            raise error
        held = self.engines.setdefault(worker, {})
        held[adapter] = None
        if evict is not None:
            held.pop(evict, None)
        return 0

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        self.unloaded.append((worker.id, adapter.name))
        await asyncio.sleep(self.unload_s)
        if self.unloads and (error := self.unloads.pop(0)):
            raise error
        slot = worker.slots.get(adapter)
        assert slot is None or not slot.users, "unloaded while it was used"
        self.engines.setdefault(worker, {}).pop(adapter, None)
        return 0


class Log:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.waited: list[tuple[str, Decision]] = []
        self.evictions: list[tuple[str, str]] = []
        self.loads: list[tuple[str, str, LoadError | None]] = []
        self.fetches: list[tuple[str, float, LoadError | None]] = []
        self.unloads: list[tuple[str, str, LoadError | None]] = []

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        self.decisions.append(decision)

    def waits(self, job: Job, decision: Decision) -> None:
        self.waited.append((job.id, decision))

    def load_ended(
        self, worker: Worker, adapter: AdapterRef, load_s: float, error: LoadError | None
    ) -> None:
        self.loads.append((worker.id, adapter.name, error))

    def evicted(self, worker: Worker, adapter: AdapterRef) -> None:
        self.evictions.append((worker.id, adapter.name))

    def fetch_ended(self, adapter: AdapterRef, fetch_s: float, error: LoadError | None) -> None:
        self.fetches.append((adapter.name, fetch_s, error))

    def unload_ended(self, worker: Worker, adapter: AdapterRef, error: LoadError | None) -> None:
        self.unloads.append((worker.id, adapter.name, error))


class Cluster:
    """A router with `workers` workers; to be made inside the loop."""

    def __init__(
        self,
        workers: int = 2,
        *,
        slots: int = 2,
        max_ongoing: int = 64,
        loader: FakeLoader | None = None,
        policy: str = "affinity",
        eviction: Eviction = Eviction.LRU,
        seed: int = 0,
        quotas: Mapping[str, Quota] | Quotas | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        self.loader = loader or FakeLoader()
        self.log = Log()
        self.policy = POLICIES[policy](Random(seed))
        if not isinstance(quotas, Quotas):
            quotas = Quotas(quotas or {}, asyncio.get_running_loop().time())
        self.quotas = quotas
        self.router = Router(
            Fleet("base"),
            self.policy,
            self.loader,
            observer=self.log,
            quotas=self.quotas,
            **settings,
        )
        self.workers = [
            Worker(f"w{number}", max_ongoing=max_ongoing, slots=slots, eviction=eviction)
            for number in range(workers)
        ]
        for worker in self.workers:
            self.router.add_worker(worker)
        self._jobs = 0

    def job(self, adapter: str | None = None, **fields: Any) -> Job:  # noqa: ANN401
        self._jobs += 1
        return Job(str(self._jobs), ref(adapter) if adapter else None, **fields)

    async def use(self, adapter: str | None, hold_s: float = 0.0, **fields: Any) -> str:  # noqa: ANN401
        """Take a lease, hold it, leave it; the worker's id."""
        async with self.router.lease(self.job(adapter, **fields)) as lease:
            await asyncio.sleep(hold_s)
            return lease.worker.id

    def start(self, work: Awaitable[T]) -> "asyncio.Task[T]":
        async def awaited() -> T:
            return await work

        return asyncio.get_running_loop().create_task(awaited())

    def resident(self, worker: int) -> set[str]:
        return {slot.adapter.name for slot in self.workers[worker].slots}

    def assert_at_rest(self) -> None:
        assert self.router.queued == 0
        assert self.router.loading == 0
        for worker in self.workers:
            assert worker.in_flight == 0
            assert all(slot.users == 0 for slot in worker.slots)
            assert worker.slots.idle == len(worker.slots)


async def settle() -> None:
    """Let everything that is ready now run."""
    for _ in range(20):
        await asyncio.sleep(0)
