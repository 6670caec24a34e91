"""What must hold at every step of any schedule that Hypothesis finds.

A schedule is a list of jobs with their times, some of which are cancelled, over workers that come and
go and loads that fail. After every event of the simulation the invariants are checked.
"""

import asyncio
from collections import Counter

from harness import Cluster, FakeLoader, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.fleet import Worker
from router.core.job import AdapterRef, LoadError, LoadFault, Rejected
from router.core.residency import Phase

JOBS = st.lists(
    st.tuples(
        st.floats(0, 20),  # when it comes
        st.sampled_from([None, "a", "b", "c", "d", "e", "bad"]),
        st.floats(0, 5),  # how long it runs
        st.one_of(st.none(), st.floats(0, 8)),  # when it is cancelled, after it came
    ),
    max_size=60,
)
CHURN = st.lists(
    st.tuples(st.floats(0, 20), st.integers(0, 2), st.sampled_from(["remove", "drain", "add"])),
    max_size=6,
)


def check(cluster: Cluster, workers: list[Worker]) -> None:
    fleet = cluster.router.fleet
    for worker in workers:
        slots = list(worker.slots)
        assert worker.slots.occupied <= worker.slots.capacity, "more adapters than slots"
        assert 0 <= worker.in_flight <= worker.max_ongoing, "over the threshold"
        assert sum(slot.users for slot in slots) <= worker.in_flight
        for slot in slots:
            if slot.phase is Phase.EVICTING:
                assert slot.users == 0, "evicting what is in use"
            assert slot.users >= 0
        in_ready = worker in fleet.ready
        member = fleet.get(worker.id) is worker
        assert in_ready == (member and worker.accepting and not worker.overloaded)
        for slot in slots:
            held = worker in fleet.holders(slot.adapter)
            assert held == (member and slot.phase in {Phase.LOADING, Phase.RESIDENT})
    assert cluster.router.queued <= 8


@settings(max_examples=150, deadline=None)
@given(
    jobs=JOBS,
    churn=CHURN,
    slots=st.integers(1, 3),
    max_ongoing=st.integers(1, 4),
    max_overtakes=st.integers(0, 5),
    policy=st.sampled_from(["affinity", "round_robin"]),
)
def test_invariants_hold_at_every_step(
    jobs: list[tuple[float, str | None, float, float | None]],
    churn: list[tuple[float, int, str]],
    slots: int,
    max_ongoing: int,
    max_overtakes: int,
    policy: str,
) -> None:
    async def main() -> None:
        failure = LoadError(LoadFault.ADAPTER_INVALID, "bad")
        loader = FakeLoader(0.5, fails=lambda a: failure if a.name == "bad" else None)
        cluster = Cluster(
            3,
            slots=slots,
            max_ongoing=max_ongoing,
            loader=loader,
            policy=policy,
            max_queued=8,
            queue_timeout_s=6,
            max_overtakes=max_overtakes,
        )
        everyone = list(cluster.workers)
        outcomes: Counter[str] = Counter()
        in_use: Counter[tuple[str, AdapterRef]] = Counter()

        async def one(at_s: float, adapter: str | None, hold_s: float) -> None:
            await asyncio.sleep(at_s)
            try:
                async with cluster.router.lease(cluster.job(adapter)) as lease:
                    check(cluster, everyone)
                    if (wanted := lease.job.adapter) is not None:
                        slot = lease.worker.slots.get(wanted)
                        assert slot is not None
                        assert slot.phase is Phase.RESIDENT, "a lease without its adapter"
                        in_use[lease.worker.id, wanted] += 1
                    await asyncio.sleep(hold_s)
                    if wanted is not None:
                        held = lease.worker.slots.get(wanted)
                        assert held is not None
                        assert held.phase is Phase.RESIDENT, "evicted while in use"
                outcomes["completed"] += 1
            except Rejected as error:
                outcomes[error.outcome.value] += 1
            except LoadError:
                outcomes["load_failed"] += 1
            finally:
                check(cluster, everyone)

        async def change(at_s: float, number: int, what: str) -> None:
            await asyncio.sleep(at_s)
            worker = everyone[number]
            member = cluster.router.fleet.get(worker.id) is worker
            if what == "remove" and member:
                cluster.router.remove_worker(worker)
            elif what == "drain" and member:
                cluster.router.set_accepting(worker, accepting=not worker.accepting)
            elif what == "add" and not member:
                fresh = Worker(worker.id, max_ongoing=max_ongoing, slots=slots)
                everyone.append(fresh)
                everyone[number] = fresh
                cluster.router.add_worker(fresh)
            check(cluster, everyone)

        loop = asyncio.get_running_loop()
        tasks = []
        for at_s, adapter, hold_s, cancel_s in jobs:
            task = loop.create_task(one(at_s, adapter, hold_s))
            if cancel_s is not None:
                loop.call_at(at_s + cancel_s, task.cancel)
            tasks.append(task)
        await asyncio.gather(*(change(*step) for step in churn))
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)
        for task in tasks:
            if not task.cancelled():
                assert task.exception() is None
        check(cluster, everyone)
        ended = sum(outcomes.values())
        assert ended == sum(not task.cancelled() for task in tasks), "a job without an outcome"
        assert cluster.router.queued == 0
        assert cluster.router.loading == 0
        for worker in everyone:
            assert worker.in_flight == 0, "a lease was not released"
            assert all(slot.users == 0 for slot in worker.slots)

    simulate(main())
