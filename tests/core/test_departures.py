"""Adapters that leave workers: retired versions and what is unloaded, a table of moments each."""

import asyncio

import pytest
from harness import Cluster, FakeLoader, ref, settle, simulate

from router.core.departures import PAUSE_MAX_S, PERIOD_S, Unload, Unloaded
from router.core.fleet import Hold, LoadRefusedError, Report
from router.core.job import LoadError, LoadFault, Rejected
from router.core.residency import Phase

BROKEN = LoadError(LoadFault.WORKER, "the engine does not answer")


def phase(cluster: Cluster, name: str, worker: int = 0) -> Phase:
    slot = cluster.workers[worker].slots.get(ref(name))
    return Phase.COLD if slot is None else slot.phase


def results(done: dict[str, Unloaded]) -> dict[str, str]:
    return {worker: one.result.value for worker, one in done.items()}


def test_an_idle_version_leaves_at_once_and_is_forgotten() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        await cluster.use("old")
        cluster.router.retire(ref("old"))
        assert phase(cluster, "old") is Phase.LEAVING
        assert cluster.router.fleet.holders(ref("old")) == ()
        assert cluster.workers[0].slots.free == 1, "its own slot is not free yet"
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.COLD
        assert cluster.workers[0].slots.free == 2
        assert not cluster.router.fleet.retired
        assert cluster.log.unloads == [("w0", "old", None)]
        cluster.assert_at_rest()

    simulate(main())


def test_a_version_in_use_serves_to_the_end_of_its_last_job_and_then_leaves() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        holding = cluster.start(cluster.use("old", hold_s=5))
        await asyncio.sleep(2)
        cluster.router.retire(ref("old"))
        late = cluster.start(cluster.use("old", hold_s=10))  # it was resolved a moment ago
        await holding
        assert phase(cluster, "old") is Phase.RESIDENT
        await late
        assert phase(cluster, "old") is Phase.LEAVING
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.COLD

    simulate(main())


def test_a_load_under_way_ends_for_who_waits_for_it_and_then_leaves() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        waiting = cluster.start(cluster.use("old", hold_s=1))
        await settle()
        assert phase(cluster, "old") is Phase.LOADING
        cluster.router.retire(ref("old"))
        assert await waiting == "w0"
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.COLD
        warmed = cluster.router.warm(cluster.workers[0], ref("new"))
        assert warmed
        cluster.router.retire(ref("new"))  # nobody waits for it
        await asyncio.sleep(3)
        assert phase(cluster, "new") is Phase.COLD

    simulate(main())


def test_who_waits_in_the_queue_for_it_is_served_before_it_leaves() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1)
        await cluster.use("old")
        holding = cluster.start(cluster.use(None, hold_s=3))
        await settle()
        waiting = cluster.start(cluster.use("old"))
        await settle()
        cluster.router.retire(ref("old"))
        assert phase(cluster, "old") is Phase.RESIDENT
        await asyncio.gather(holding, waiting)
        assert len(cluster.loader.calls) == 1, "it was not loaded again"
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.COLD
        assert not cluster.router.fleet.retired

    simulate(main())


def test_a_job_for_a_version_that_is_leaving_waits_for_the_end_and_loads_it_anew() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1)
        await cluster.use("old")
        cluster.loader.unload_s = 4
        cluster.router.retire(ref("old"))
        pinned = cluster.start(cluster.use("old", hold_s=1))
        await settle()
        assert cluster.router.queued == 1
        assert cluster.workers[0].slots.occupied == 1
        assert await pinned == "w0"
        assert [name for _, name, _ in cluster.loader.calls] == ["old", "old"]
        await asyncio.sleep(10)
        assert phase(cluster, "old") is Phase.COLD, "retired still: somebody waited for it"

    simulate(main())


def test_a_job_goes_elsewhere_while_the_version_leaves() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2)
        first = await cluster.use("old")
        cluster.loader.unload_s = 60
        done = cluster.start(cluster.router.unload(ref("old")))
        await settle()
        assert await cluster.use("old") != first
        assert results(await done) == {first: "unloaded"}

    simulate(main())


def test_a_retired_adapter_is_the_first_to_be_evicted_and_no_pin_keeps_it() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=2)
        cluster.loader.unloads = [BROKEN] * 50
        cluster.router.pin(ref("old"), pinned=True)
        await cluster.use("stays")
        await cluster.use("old")
        cluster.router.retire(ref("old"))
        assert ref("old") not in cluster.router.fleet.pins
        await asyncio.sleep(1)
        await cluster.use("new")
        assert cluster.log.evictions == [("w0", "old")], "though it was used last"
        assert cluster.resident(0) == {"stays", "new"}
        await asyncio.sleep(2 * PERIOD_S)
        assert not cluster.router.fleet.retired

    simulate(main())


def test_a_retired_adapter_is_not_loaded_ahead() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, policy="cost")
        cluster.loader.unloads = [BROKEN]
        await cluster.use("old")
        cluster.router.retire(ref("old"))
        assert not any(cluster.router.warm(worker, ref("old")) for worker in cluster.workers)
        assert cluster.router.fleet.demand.rate(ref("old"), 0.0) == 0.0
        assert ref("old") not in cluster.router.fleet.targets

    simulate(main())


def test_a_rollback_takes_it_back() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2)
        first = cluster.start(cluster.use("old", hold_s=5))
        await asyncio.sleep(2)
        cluster.router.retire(ref("old"))
        cluster.router.restore(ref("old"))
        await first
        await asyncio.sleep(60)
        assert cluster.loader.unloaded == []
        cluster.router.retire(ref("old"))
        cluster.router.restore(
            ref("old")
        )  # on its way out: the next job loads it anew, and it stays
        await cluster.use("old")
        await asyncio.sleep(60)
        assert len(cluster.router.fleet.resident(ref("old"))) == 1
        assert len(cluster.loader.unloaded) == 1

    simulate(main())


def test_a_pin_takes_a_retirement_back() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        holding = cluster.start(cluster.use("a", hold_s=5))
        await asyncio.sleep(2)
        cluster.router.retire(ref("a"))
        cluster.router.pin(ref("a"), pinned=True)
        await holding
        await asyncio.sleep(10)
        assert phase(cluster, "a") is Phase.RESIDENT

    simulate(main())


def test_what_cannot_be_unloaded_stays_and_is_tried_again_more_and_more_seldom() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        await cluster.use("old")
        cluster.loader.unloads = [BROKEN] * 9
        cluster.router.retire(ref("old"))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.RESIDENT
        assert await cluster.use("old") == "w0", "and serves meanwhile"
        started = loop.time()
        while phase(cluster, "old") is not Phase.COLD:
            await asyncio.sleep(0.5)
        assert len(cluster.loader.unloaded) == 10
        assert 1 + 2 + 4 + 8 + 16 + 32 < loop.time() - started < 6 * (PAUSE_MAX_S + 2 * PERIOD_S)

    simulate(main())


REFUSALS = [
    pytest.param(
        Report(seq=1, gpu=(ref("old"),), others=1, used=(ref("old"),)), id="with its state"
    ),
    pytest.param(None, id="without"),
]


@pytest.mark.parametrize("told", REFUSALS)
def test_what_another_router_uses_leaves_when_the_worker_says_that_it_does_no_more(
    told: Report | None,
) -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        [worker] = cluster.workers
        await cluster.use("old")
        cluster.loader.unloads = [LoadRefusedError("another router uses it", told)]
        done = await cluster.router.unload(ref("old"))
        assert done == {"w0": Unloaded(Unload.IN_USE, "another router uses it")}
        assert phase(cluster, "old") is Phase.RESIDENT
        used = Report(seq=2, gpu=(ref("old"),), others=1, used=(ref("old"),))
        cluster.router.observe(worker, used)
        await asyncio.sleep(30)
        assert len(cluster.loader.unloaded) == 1
        cluster.router.observe(worker, Report(seq=3, gpu=(ref("old"),)))
        assert phase(cluster, "old") is Phase.LEAVING
        await asyncio.sleep(1)
        assert phase(cluster, "old") is Phase.COLD

    simulate(main())


def test_an_unload_says_what_became_of_it_on_each_worker() -> None:
    async def main() -> None:
        cluster = Cluster(workers=4, max_ongoing=1)
        users = [cluster.start(cluster.use("a", hold_s=5)) for _ in range(3)]
        await asyncio.sleep(2)
        users[1].cancel()
        users[2].cancel()
        await settle()
        cluster.loader.unloads = [None, BROKEN]
        done = await cluster.router.unload(ref("a"))
        assert sorted(results(done).values()) == ["failed", "in_use", "unloaded"]
        assert {one.message for one in done.values()} >= {"", str(BROKEN)}
        await asyncio.sleep(60)
        left = [worker.id for worker in cluster.workers if worker.slots.get(ref("a"))]
        assert [results(done)[worker] for worker in left] == ["failed"], "once, and not again"
        assert await cluster.router.unload(ref("nobody's")) == {}
        assert len(await cluster.router.unload(ref("a"))) == 1
        await cluster.use("a")
        assert len(cluster.loader.calls) == 4, "it stays served"

    simulate(main())


def test_two_that_unload_it_at_once_wait_for_one_unload() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        await cluster.use("a")
        done = await asyncio.gather(*(cluster.router.unload(ref("a")) for _ in range(3)))
        assert [results(one) for one in done] == [{"w0": "unloaded"}] * 3
        assert len(cluster.loader.unloaded) == 1

    simulate(main())


@pytest.mark.parametrize("how", ["removed", "closed"])
def test_an_unload_ends_with_its_worker_and_with_its_router(how: str) -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        [worker] = cluster.workers
        await cluster.use("a")
        cluster.loader.unload_s = 1000
        done = cluster.start(cluster.router.unload(ref("a")))
        await settle()
        if how == "removed":
            cluster.router.remove_worker(worker)
        else:
            await cluster.router.aclose()
        assert results(await done) == {"w0": "failed"}
        assert asyncio.get_running_loop().time() < 10

    simulate(main())


def test_a_report_of_before_the_unload_brings_nothing_back() -> None:
    class Numbered(FakeLoader):
        async def load(self, *given: object) -> int:
            await super().load(*given)  # type: ignore[arg-type]
            return 1

        async def unload(self, *given: object) -> int:
            await super().unload(*given)  # type: ignore[arg-type]
            return 2

    async def main() -> None:
        cluster = Cluster(workers=1, loader=Numbered())
        [worker] = cluster.workers
        await cluster.use("a")
        unloading = cluster.start(cluster.router.unload(ref("a")))
        await settle()
        cluster.router.observe(worker, Report(seq=1, gpu=(ref("a"),)))
        assert phase(cluster, "a") is Phase.LEAVING
        cluster.router.observe(worker, Report(seq=2))
        assert phase(cluster, "a") is Phase.LEAVING, "its own call says when"
        await unloading
        cluster.router.observe(worker, Report(seq=1, gpu=(ref("a"),)))
        assert phase(cluster, "a") is Phase.COLD
        cluster.router.observe(worker, Report(seq=3, gpu=(ref("a"),)))
        assert phase(cluster, "a") is Phase.RESIDENT, "somebody has loaded it by hand"

    simulate(main())


def test_what_a_worker_says_it_holds_of_a_retired_version_leaves_too() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2)
        cluster.loader.unloads = [BROKEN]
        first = await cluster.use("old")
        cluster.router.retire(ref("old"))
        [other] = [worker for worker in cluster.workers if worker.id != first]
        cluster.router.observe(other, Report(seq=1, gpu=(ref("old"),)))
        await asyncio.sleep(10)
        assert not other.slots.get(ref("old"))
        assert not cluster.router.fleet.retired

    simulate(main())


def test_one_reason_not_to_accept_does_not_lift_another() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        [worker] = cluster.workers
        router = cluster.router
        for why in (Hold.DRAIN, Hold.SILENT):
            router.hold(worker, why, held=True)
        router.hold(worker, Hold.SILENT, held=False)
        assert not worker.accepting
        assert not router.warm(worker, ref("a"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await cluster.use("a")
        router.hold(worker, Hold.DRAIN, held=False)
        assert await cluster.use("a") == "w0"

    simulate(main())


def test_what_runs_on_a_drained_worker_ends_there_and_its_pins_are_loaded_elsewhere() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, policy="cost")
        router = cluster.router
        router.pin(ref("a"), pinned=True)
        holding = cluster.start(cluster.use("a", hold_s=20))
        await asyncio.sleep(2)
        [holder] = router.fleet.holders(ref("a"))
        router.hold(holder, Hold.DRAIN, held=True)
        await asyncio.sleep(5)
        assert len(router.fleet.holders(ref("a"))) == 2
        assert await cluster.use("a") != holder.id
        assert await holding == holder.id

    simulate(main())


def test_a_worker_that_is_drained_before_it_joins_gets_nothing() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1)
        [worker] = cluster.workers
        cluster.router.remove_worker(worker)
        cluster.router.fleet.hold(worker, Hold.DRAIN, held=True)
        cluster.router.add_worker(worker)
        with pytest.raises(Rejected):
            async with cluster.router.lease(cluster.job(deadline=1.0)):
                pass

    simulate(main())
