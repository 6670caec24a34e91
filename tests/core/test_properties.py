"""What must hold after every event of any schedule that Hypothesis finds.

A schedule is a list of jobs with their times, some of which are cancelled, have a deadline or avoid a
worker; over workers that come, go, stop accepting and report; with loads that take long and that fail,
and versions that are retired, restored and unloaded, which takes long and fails, too.
"""

import asyncio
from collections import Counter
from typing import NamedTuple

from harness import Cluster, FakeLoader, after_every_event, ref, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.fleet import Hold, Report, Worker
from router.core.job import AdapterRef, LoadError, LoadFault, Rejected
from router.core.policies import POLICIES
from router.core.quotas import Quota
from router.core.residency import Eviction, Phase

MAX_QUEUED = 8
NAMES = ("a", "b", "c", "d", "e", "bad")


class Planned(NamedTuple):
    """One job of a schedule; times in seconds, `cancel` and `deadline` after it came."""

    at: float
    adapter: str | None
    hold: float
    cancel: float | None
    deadline: float | None
    avoid: tuple[str, ...]
    tenant: str
    priority: int
    prompt_tokens: int
    refuse_cold: bool


class Change(NamedTuple):
    """Something that happens to one of the workers."""

    at: float
    worker: int
    what: str


JOBS = st.lists(
    st.builds(
        Planned,
        at=st.floats(0, 20),
        adapter=st.sampled_from([None, *NAMES]),
        hold=st.floats(0, 5),
        cancel=st.one_of(st.none(), st.floats(0, 8)),
        deadline=st.one_of(st.none(), st.none(), st.floats(-1, 8)),
        avoid=st.sampled_from([(), (), ("w0",), ("w0", "w1", "w2")]),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-4, 4),
        prompt_tokens=st.sampled_from([0, 100, 20_000]),
        refuse_cold=st.sampled_from([False, False, False, True]),
    ),
    max_size=60,
)
CHANGES = st.lists(
    st.builds(
        Change,
        at=st.floats(0, 20),
        worker=st.integers(0, 2),
        what=st.sampled_from(
            [
                *("remove", "drain", "add", "lost all", "has b", "close", "pin", "unpin", "warm"),
                *("retire", "retire", "restore", "unload"),
            ]
        ),
    ),
    max_size=8,
)


def check(cluster: Cluster, workers: list[Worker]) -> None:
    fleet = cluster.router.fleet
    for worker in workers:
        slots = list(worker.slots)
        member = fleet.get(worker.id) is worker
        assert worker.slots.occupied <= worker.slots.capacity, "more adapters than slots"
        assert 0 <= worker.in_flight <= worker.max_ongoing, "over the threshold"
        assert sum(slot.users for slot in slots) <= worker.in_flight
        for slot in slots:
            assert slot.users >= 0
            if slot.phase in {Phase.EVICTING, Phase.LEAVING}:
                assert slot.users == 0, "evicting, or unloading, what is in use"
            assert (slot.adapter in worker.slots.departing) == slot.departs
            assert slot.departs or slot.adapter not in fleet.retired or not member
            held = worker in fleet.holders(slot.adapter)
            usable = slot.phase in {Phase.LOADING, Phase.RESIDENT} and not slot.closed
            assert held == (member and usable)
        idle = [slot for slot in slots if slot.phase is Phase.RESIDENT and not slot.users]
        assert worker.slots.idle == sum(not slot.pinned for slot in idle)
        assert worker.slots.in_use == sum(slot.users > 0 for slot in slots)
        assert worker.slots.loading == sum(slot.phase is Phase.LOADING for slot in slots)
        victim = worker.slots.victim()
        if victim is not None and not victim.closed:
            departing = [slot for slot in idle if slot.departs and not slot.pinned]
            assert victim.departs or not departing, "what departs goes first"
        assert sum(slot.closed for slot in slots) == (worker.slots.closed is not None)
        ready = member and worker.accepting and not worker.overloaded
        assert (worker in fleet.ready) == ready
    for name in NAMES:
        for worker in fleet.holders(ref(name)):
            assert worker.slots.get(ref(name)) is not None, "a holder that holds nothing"
    for adapter in (None, *map(ref, NAMES)):
        holders = fleet.holders(adapter) if adapter else ()
        reach = [
            worker
            for worker in fleet.ready
            if adapter is None or worker in holders or worker.slots.idle or worker.slots.free > 0
        ]
        assert list(fleet.within_reach(adapter)) == reach
        for worker in fleet.ready:
            assert worker in reach or not worker.can_serve(adapter), "out of reach, and can serve"
    queue = cluster.router._queue
    waiting = list(queue)
    assert len(waiting) == len(queue) <= MAX_QUEUED
    tags = [(waiter.tag, waiter.seq) for waiter in waiting]
    assert tags == sorted(tags)
    tenants = Counter(waiter.job.tenant for waiter in waiting)
    assert {tenant: queue.waiting_of(tenant) for tenant in tenants} == tenants
    for waiter in waiting:
        if waiter.job.refuse_cold:
            continue  # it waits for who has its adapter, whoever else could load it
        # As the policy that the router has: it may know of arrivals, or have a plan.
        decision = cluster.policy.place(waiter.job, fleet, cluster.router.loop.time())
        assert decision.worker is None, (
            f"{waiter.job.id} waits, and {decision.worker} could take it"
        )


@settings(max_examples=300, deadline=None)
@given(
    jobs=JOBS,
    changes=CHANGES,
    slots=st.integers(0, 3),
    max_ongoing=st.integers(1, 4),
    patience_s=st.sampled_from([0.1, 1.0, 30.0]),
    load_s=st.sampled_from([0.0, 0.5, 4.0]),
    fetch_s=st.sampled_from([0.0, 0.0, 1.0]),
    eviction=st.sampled_from(Eviction),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_invariants_hold_after_every_event(
    jobs: list[Planned],
    changes: list[Change],
    slots: int,
    max_ongoing: int,
    patience_s: float,
    load_s: float,
    fetch_s: float,
    eviction: Eviction,
    policy: str,
) -> None:
    async def main() -> None:
        failure = LoadError(LoadFault.ADAPTER_INVALID, "bad")
        loader = FakeLoader(
            load_s, fetch_s=fetch_s, fails=lambda a: failure if a.name == "bad" else None
        )
        loader.times["c"] = 1.5
        loader.unload_s = load_s
        loader.unloads = [None, LoadError(LoadFault.WORKER, "no"), None]
        cluster = Cluster(
            3,
            slots=slots,
            max_ongoing=max_ongoing,
            loader=loader,
            policy=policy,
            eviction=eviction,
            max_queued=MAX_QUEUED,
            queue_timeout_s=6,
            slot_patience_s=patience_s,
            quotas={"b": Quota(requests_per_minute=30, tokens_per_minute=4000)},
        )
        everyone = list(cluster.workers)
        outcomes: Counter[str] = Counter()
        after_every_event(lambda: check(cluster, everyone))
        loop = asyncio.get_running_loop()

        async def one(plan: Planned) -> None:
            await asyncio.sleep(plan.at)
            deadline = None if plan.deadline is None else loop.time() + plan.deadline
            job = cluster.job(
                plan.adapter,
                deadline=deadline,
                avoid=plan.avoid,
                tenant=plan.tenant,
                priority=plan.priority,
                prompt_tokens=plan.prompt_tokens,
                refuse_cold=plan.refuse_cold,
            )
            try:
                async with cluster.router.lease(job) as lease:
                    assert_held(lease.worker, job.adapter)
                    lease.first_token()
                    await asyncio.sleep(plan.hold)
                    lease.answered(50)
                outcomes["completed"] += 1
            except Rejected as error:
                outcomes[error.outcome.value] += 1
            except LoadError:
                outcomes["load_failed"] += 1

        def assert_held(worker: Worker, adapter: AdapterRef | None) -> None:
            if adapter is not None:
                slot = worker.slots.get(adapter)
                assert slot is not None
                assert slot.phase is Phase.RESIDENT, "a lease without its adapter"
                assert slot.users >= 1

        async def change(plan: Change) -> None:
            await asyncio.sleep(plan.at)
            worker = everyone[plan.worker]
            member = cluster.router.fleet.get(worker.id) is worker
            match plan.what:
                case "remove" if member:
                    cluster.router.remove_worker(worker)
                case "drain":
                    cluster.router.hold(worker, Hold.SILENT, held=worker.accepting)
                case "add" if not member:
                    fresh = Worker(
                        worker.id, max_ongoing=max_ongoing, slots=slots, eviction=eviction
                    )
                    everyone.append(fresh)
                    everyone[plan.worker] = fresh
                    cluster.router.add_worker(fresh)
                case "lost all":
                    cluster.router.observe(worker, Report())
                case "has b":
                    cluster.router.observe(worker, Report(gpu=(ref("b"),)))
                case "pin" | "unpin":
                    cluster.router.pin(ref("a"), pinned=plan.what == "pin")
                case "warm" if member:
                    cluster.router.warm(worker, ref("d"))
                case "retire":
                    cluster.router.retire(ref(NAMES[plan.worker]))
                case "restore":
                    cluster.router.restore(ref(NAMES[plan.worker]))
                case "unload":
                    await cluster.router.unload(ref(NAMES[plan.worker]))
                case "close" if plan.worker == 0 and plan.at > 15:
                    cluster.router.close()
                case _:
                    pass

        tasks = [loop.create_task(one(plan)) for plan in jobs]
        for task, plan in zip(tasks, jobs, strict=True):
            if plan.cancel is not None:
                loop.call_at(plan.at + plan.cancel, task.cancel)
        await asyncio.gather(*(change(plan) for plan in changes))
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(120)  # until nothing is loaded ahead any more
        for task in tasks:
            if not task.cancelled():
                assert task.exception() is None
        ended = sum(outcomes.values())
        assert ended == sum(not task.cancelled() for task in tasks), "a job without an outcome"
        assert cluster.router.queued == 0
        assert cluster.router.loading == 0
        closed = any(plan.what == "close" for plan in changes)
        for worker in cluster.router.fleet:
            held = [slot.adapter.name for slot in worker.slots]
            assert closed or not worker.slots.departing, f"retired, and still there: {held}"
        assert closed or not cluster.router.fleet.retired
        for worker in everyone:
            assert worker.in_flight == 0, "a lease was not released"
            assert all(slot.users == 0 for slot in worker.slots)
            if cluster.router.fleet.get(worker.id) is worker:
                assert worker.slots.closed is None, "a slot was closed and is not open again"

    simulate(main())
