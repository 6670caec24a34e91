"""Several routers over the same workers: cores and a real worker's arbitration, in virtual time.

Each core hears of each worker late, as by a pushed state, and decides by what it knows; the worker's
service (engine_worker/service.py) over a made-up engine refuses what would break a bound. Whatever the
schedule, flips of versions and unloads that fail among it: no bound is broken, nothing that is used is
dropped, every request ends well, every count returns to nothing, and the ledgers are what the engines
hold.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import pytest
from adapter_files import write_adapter
from harness import FakeLoader, after_every_event, ref, simulate
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine_worker.protocol import (
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    State,
    UnloadRequest,
    WireError,
)
from engine_worker.service import StateFeed, Tiers, WorkerError, WorkerService
from router.core.claims import PATIENCES
from router.core.demand import MEMORY_S
from router.core.fleet import Fleet, LoadRefusedError, Report, Worker
from router.core.job import AdapterRef, Job, LoadError, LoadFault
from router.core.policies import POLICIES
from router.core.residency import Phase
from router.core.router import Router

LATE_S = 0.02
LOAD_S = 0.3
UNLOAD_S = 0.2
LIMIT = 3


class Engine:
    """Holds what it is told to, and fails the test where that is more than its slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[AdapterId, None] = {}
        self.using: list[AdapterId | None] = []
        self.loads = 0
        self.peak = 0
        self.unloads = 0
        self.fails_every = 0  # of the unloads, one in so many

    async def add(self, adapter: AdapterId, path: str, evict: Sequence[AdapterId]) -> Tiers:
        self.loads += 1
        await asyncio.sleep(LOAD_S)
        for victim in evict:
            assert victim not in self.using, f"{victim} was evicted while it was used"
            self.held.pop(victim, None)
        self.held[adapter] = None
        assert len(self.held) <= self.slots
        return await self.residency()

    async def remove(self, adapter: AdapterId) -> None:
        self.unloads += 1
        await asyncio.sleep(UNLOAD_S)
        if self.fails_every and self.unloads % self.fails_every == 0:
            raise WorkerError(500, "busy")
        assert adapter not in self.using, f"{adapter} was unloaded while it was used"
        self.held.pop(adapter, None)

    async def residency(self) -> Tiers:
        return tuple(self.held), ()

    async def run(self, adapter: AdapterId | None, hold_s: float) -> None:
        assert adapter is None or adapter in self.held
        self.using.append(adapter)
        self.peak = max(self.peak, len(self.using))
        await asyncio.sleep(hold_s)
        self.using.remove(adapter)


class SharedWorker:
    def __init__(self, slots: int) -> None:
        self.engine = Engine(slots)
        self.feed = StateFeed()
        info = Info("test", "1", "base", slots, 16, 1, max_ongoing_requests=LIMIT)
        now = asyncio.get_running_loop().time
        self.service = WorkerService(self.engine, info, self.feed, token=None, now=now)


def report_of(state: State) -> Report:
    def refs(adapters: tuple[AdapterId, ...]) -> tuple[AdapterRef, ...]:
        return tuple(ref(adapter.name.removeprefix("base:")) for adapter in adapters)

    return Report(seq=state.seq, gpu=refs(state.gpu), others=state.others, used=refs(state.used))


def wire(adapter: AdapterRef | None) -> AdapterId | None:
    return None if adapter is None else AdapterId(adapter.model_id, adapter.version)


class SharedLoader(FakeLoader):
    """Has a worker's service load, as the pool does."""

    def __init__(self, router_id: str, workers: dict[str, SharedWorker], folder: Path) -> None:
        super().__init__()
        self.router_id = router_id
        self.workers = workers
        self.folder = folder

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        leaves = worker.slots.get(evict) if evict is not None else None
        drain_s = PATIENCES * 1.0 if leaves is not None and leaves.foreign else 0.0
        evicted, loaded = wire(evict), wire(adapter)
        assert loaded is not None
        request = LoadRequest(loaded, str(self.folder), (evicted,) if evicted else (), drain_s)
        await asyncio.sleep(0.001)
        try:
            body = await self.workers[worker.id].service.load(
                msgspec.json.encode(request), self.router_id
            )
        except WorkerError as error:
            answer = msgspec.json.decode(error.body(), type=WireError)
            assert answer.state is not None
            raise LoadRefusedError(str(error), report_of(answer.state)) from None
        await asyncio.sleep(0.001)
        return msgspec.json.decode(body, type=LoadReply).seq

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        leaves = wire(adapter)
        assert leaves is not None
        await asyncio.sleep(0.001)
        try:
            body = await self.workers[worker.id].service.unload(
                msgspec.json.encode(UnloadRequest(leaves)), self.router_id
            )
        except WorkerError as error:
            answer = msgspec.json.decode(error.body(), type=WireError)
            if answer.state is None:
                raise LoadError(LoadFault.WORKER, str(error)) from None
            raise LoadRefusedError(str(error), report_of(answer.state)) from None
        await asyncio.sleep(0.001)
        return msgspec.json.decode(body, type=LoadReply).seq


class SharedRouter:
    """One core, and the streams of state that it follows."""

    def __init__(
        self, router_id: str, shared: dict[str, SharedWorker], folder: Path, policy: str
    ) -> None:
        self.id = router_id
        self.shared = shared
        self.router = Router(
            Fleet("base"),
            POLICIES[policy](Random(1)),
            SharedLoader(router_id, shared, folder),
            queue_timeout_s=600,
        )
        self.refused = 0
        self.following = []
        for number, (worker_id, one) in enumerate(shared.items()):
            worker = Worker(worker_id, max_ongoing=LIMIT, slots=one.engine.slots, rank=number)
            self.router.add_worker(worker)
            self.following.append(asyncio.create_task(self.follow(worker, one)))

    async def follow(self, worker: Worker, one: SharedWorker) -> None:
        decode = msgspec.json.Decoder(State).decode
        loop = asyncio.get_running_loop()
        async for line in one.service.lines(self.id):
            loop.call_later(LATE_S, self.router.observe, worker, report_of(decode(line)))

    async def serve(self, job: Job, hold_s: float) -> str:
        """As the front end does; the worker that answered."""
        while True:
            async with self.router.lease(job) as lease:
                headers = {"x-lorayard-router": self.id}
                adapter = wire(job.adapter)
                if adapter is not None:
                    headers["x-lorayard-adapter"] = adapter.name
                await asyncio.sleep(0.001)
                one = self.shared[lease.worker.id]
                try:
                    async with one.service.admitted(headers):
                        await one.engine.run(adapter, hold_s)
                        return lease.worker.id
                except WorkerError as error:
                    self.refused += 1
                    code = error.headers()["X-Lorayard-Refused"]
                    lease.refused(full=code == "full")

    async def stop(self) -> None:
        for task in self.following:
            task.cancel()
        await asyncio.gather(*self.following, return_exceptions=True)
        await self.router.aclose()


class Bench:
    def __init__(
        self,
        folder: Path,
        *,
        routers: int = 3,
        workers: int = 2,
        slots: int = 2,
        policy: str = "cost",
    ) -> None:
        self.shared = {f"w{number}": SharedWorker(slots) for number in range(workers)}
        self.routers = [
            SharedRouter(f"r{number}", self.shared, folder, policy) for number in range(routers)
        ]
        self._jobs = 0

    async def ask(self, router: int, adapter: str | None, at: float, hold_s: float) -> str:
        await asyncio.sleep(at)
        self._jobs += 1
        job = Job(str(self._jobs), ref(adapter) if adapter else None)
        return await self.routers[router].serve(job, hold_s)

    def check_reach(self) -> None:
        """Who has a slot to give is within reach of an adapter that nobody holds, and no other is."""
        for router in self.routers:
            fleet = router.router.fleet
            reach = [worker for worker in fleet.ready if worker.slots.spare]
            assert list(fleet.within_reach(ref("nowhere"))) == reach

    async def flip(self, adapter: str, at: float, what: str) -> None:
        """Every process hears of it, each in its time."""
        await asyncio.sleep(at)
        for one in self.routers:
            if what == "retire":
                one.router.retire(ref(adapter))
            elif what == "restore":
                one.router.restore(ref(adapter))
            else:
                await one.router.unload(ref(adapter))
            await asyncio.sleep(0.01)

    async def agreed(self) -> None:
        """Nothing is on its way any more, and all say that the same is where it is."""
        await asyncio.sleep(300)
        for router in self.routers:
            assert not router.router.fleet.retired
            for worker in router.router.fleet:
                one = self.shared[worker.id]
                held = {ref(adapter.name.removeprefix("base:")) for adapter in one.engine.held}
                assert {slot.adapter for slot in worker.slots} == held
                assert {slot.phase for slot in worker.slots} <= {Phase.RESIDENT}
                assert set(one.service._arbiter.held) == set(one.engine.held)

    async def close(self) -> None:
        for worker in self.shared.values():
            occupancy = worker.service._arbiter.occupancy()
            assert occupancy.ongoing == 0
            assert occupancy.ongoing_peak <= LIMIT
            assert worker.engine.peak <= LIMIT
        for router in self.routers:
            assert router.router.queued == 0
            assert all(worker.in_flight == 0 for worker in router.router.fleet)
            await router.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "a")


ASKED = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([None, *"abcdef"]),
        st.floats(0, 5),
        st.floats(0, 3),
    ),
    max_size=40,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ASKED, st.sampled_from(["affinity", "cost"]), st.integers(1, 3))
def test_every_request_of_every_router_ends_well(
    folder: Path, asked: list[tuple[int, str | None, float, float]], policy: str, slots: int
) -> None:
    async def main() -> None:
        bench = Bench(folder, slots=slots, policy=policy)
        after_every_event(bench.check_reach)
        async with asyncio.timeout(500):
            await asyncio.gather(*(bench.ask(*one) for one in asked))
        await bench.close()

    simulate(main())


FLIPS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.floats(0, 6),
        st.sampled_from(["retire", "retire", "unload", "restore"]),
    ),
    max_size=6,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ASKED,
    FLIPS,
    st.sampled_from(["affinity", "cost"]),
    st.integers(1, 3),
    st.sampled_from([0, 2, 3]),
)
@example([(0, "b", 0.0, 1.0)], [("b", 1.5, "retire")], "cost", 1, 0)  # it was in use of late
def test_what_is_retired_leaves_all_workers_and_nothing_that_is_used(
    folder: Path,
    asked: list[tuple[int, str | None, float, float]],
    flips: list[tuple[str, float, str]],
    policy: str,
    slots: int,
    fails_every: int,
) -> None:
    async def main() -> None:
        bench = Bench(folder, slots=slots, policy=policy)
        for worker in bench.shared.values():
            worker.engine.fails_every = fails_every
        after_every_event(bench.check_reach)
        async with asyncio.timeout(500):
            await asyncio.gather(
                *(bench.ask(*one) for one in asked), *(bench.flip(*one) for one in flips)
            )
        await bench.agreed()
        for adapter in "abc":
            last = max((flip for flip in flips if flip[0] == adapter), default=None, key=_at)
            # Who comes after it was forgotten has an adapter like any other.
            late = any(name == adapter and at > last[1] for _, name, at, _ in asked if last)
            if last is not None and last[2] == "retire" and not late:
                for worker in bench.shared.values():
                    assert wire(ref(adapter)) not in worker.engine.held
        await bench.close()

    simulate(main())


def _at(flip: tuple[str, float, str]) -> float:
    return flip[1]


def test_a_version_that_all_routers_use_leaves_when_the_last_has_done(folder: Path) -> None:
    async def main() -> list[float]:
        bench = Bench(folder, routers=3, workers=2, slots=2)
        loop = asyncio.get_running_loop()
        left_at: list[float] = []
        jobs = [bench.ask(router, "a", 0.1 * router, 5.0 + router) for router in range(3)]
        asking = [asyncio.create_task(job) for job in jobs]
        await asyncio.sleep(2)
        await bench.flip("a", 0.0, "retire")
        while any(worker.engine.held for worker in bench.shared.values()):
            assert loop.time() < 60
            await asyncio.sleep(0.1)
            if all(task.done() for task in asking) and not left_at:
                left_at.append(loop.time())
        left_at.append(loop.time())
        await asyncio.gather(*asking)
        await bench.agreed()
        await bench.close()
        return left_at

    used_until, left_at = simulate(main())
    assert left_at - used_until < 3


@pytest.mark.parametrize("policy", ["affinity", "cost"])
def test_a_cold_burst_over_all_routers_is_one_load_a_worker(folder: Path, policy: str) -> None:
    async def main() -> list[int]:
        bench = Bench(folder, routers=4, policy=policy)
        await asyncio.sleep(0.1)
        asked = (bench.ask(number % 4, "a", 0.0, 0.01) for number in range(64))
        await asyncio.gather(*asked)
        await bench.close()
        return [worker.engine.loads for worker in bench.shared.values()]

    loads = simulate(main())
    assert max(loads) == 1


def test_adapters_in_constant_use_by_others_make_room(folder: Path) -> None:
    async def main() -> float:
        bench = Bench(folder, routers=2, workers=1, slots=1)
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        async def occupy(at: float) -> None:
            await asyncio.sleep(at)
            while not over.is_set():
                await bench.ask(0, "a", 0.0, 1.0)

        occupying = asyncio.gather(occupy(0.0), occupy(0.5))
        await asyncio.sleep(2.0)
        started = loop.time()
        await bench.ask(1, "b", 0.0, 0.1)
        took_s = loop.time() - started
        over.set()
        await occupying
        await bench.close()
        return took_s

    assert simulate(main()) < 5.0


@pytest.mark.parametrize("policy", ["affinity", "cost", "round_robin"])
def test_a_slot_that_others_have_let_go_of_is_found_in_a_large_fleet(policy: str) -> None:
    async def main() -> str:
        router = Router(Fleet("base"), POLICIES[policy](Random(0)), FakeLoader(0.1))
        for number in range(64):
            worker = Worker(f"w{number}", max_ongoing=8, slots=1, rank=number)
            router.add_worker(worker)
            for others in (0, 1, 2):
                used = (ref("a"),) if others else ()
                router.observe(worker, Report(seq=1, gpu=(ref("a"),), others=others, used=used))
        router.observe(worker, Report(seq=1, gpu=(ref("a"),)))
        async with asyncio.timeout(0.5), router.lease(Job("1", ref("b"))) as lease:
            return lease.worker.id

    assert simulate(main()) == "w63"


def test_a_job_that_is_refused_is_no_new_demand() -> None:
    async def main() -> float:
        router = Router(Fleet("base"), POLICIES["cost"](Random(0)), FakeLoader(0.0))
        worker = Worker("w0", max_ongoing=8, slots=1)
        router.add_worker(worker)
        job = Job("1", ref("a"))
        for _ in range(20):
            async with router.lease(job) as lease:
                lease.refused(full=True)
            router.observe(worker, Report(seq=1, gpu=(ref("a"),)))
        loop = asyncio.get_running_loop()
        return router.fleet.demand.rate(ref("a"), loop.time()) * MEMORY_S

    assert simulate(main()) <= 1.0


@pytest.mark.parametrize("policy", ["affinity", "cost"])
def test_a_tenant_beyond_its_share_leaves_a_place_that_other_routers_have_not_taken(
    policy: str,
) -> None:
    async def main() -> None:
        fleet = Fleet("base")
        worker = Worker("w0", max_ongoing=4, slots=1)
        fleet.add(worker)
        for tenant in ("a", "b"):
            fleet.tenants.arrived(tenant, 0.0)
        fleet.observe(worker, Report(others=1))
        for _ in range(2):
            fleet.reserve(worker, None, "a")
        made = POLICIES[policy](Random(0))
        assert made.place(Job("1", None, tenant="b"), fleet, 0.0).worker is worker
        assert made.place(Job("2", None, tenant="a"), fleet, 0.0).worker is None

    simulate(main())
