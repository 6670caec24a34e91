"""The peers' rules as tables: each threshold from both sides, and the same choice in any process."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from fleets import W, decide, fleet_of
from harness import ref

from router.core.fleet import Fleet, Hold
from router.core.job import Job
from router.core.placement import Decision, Drop, Reason
from router.core.policies import POLICIES
from router.core.policies.chwbl import Chwbl
from router.core.policies.dynamo import TRACKED_MAX, Dynamo, replica_counts
from router.core.policies.smg import REMEMBERED, Smg

PEERS = sorted(name for name in POLICIES if name not in {"affinity", "cost", "round_robin"})
ANY = {"w0", "w1", "w2"}

# What holds under every rule, because it is the router's: (workers, adapter, avoid, may be chosen).
BOUNDS = [
    ("an overloaded worker is left out", [W(4, ("a",)), W(3)], "a", (), {"w1"}),
    ("one that does not accept is left out", [W(0, ("a",), accepting=False), W(3)], "a", (), {"w1"}),
    ("one whose slots are all in use is left out",
     [W(2, ("x", "y"), ("x", "y")), W(3)], "a", (), {"w1"}),
    ("the base model needs no slot", [W(2, ("x", "y"), ("x", "y"))], None, (), {"w0"}),
    ("one that failed the job is left out", [W(0, ("a",)), W(3)], "a", ("w0",), {"w1"}),
    ("one that failed the job, without an adapter", [W(0), W(3)], None, ("w0",), {"w1"}),
    ("if all have failed it, any of them", [W(0), W(1)], "a", ("w0", "w1"), {"w0", "w1"}),
    ("one that failed it, if the other is full", [W(0, ("a",)), W(4)], "a", ("w0",), {"w0"}),
    ("everyone is overloaded", [W(4, ("a",)), W(4)], "a", (), None),
    ("no slot is to be had", [W(2, ("x", "y"), ("x", "y"))], "a", (), None),
    ("nobody accepts", [W(0, accepting=False)], "a", (), None),
    ("nobody at all", [], None, (), None),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    ("workers", "adapter", "avoid", "chosen"),
    [case[1:] for case in BOUNDS],
    ids=[case[0] for case in BOUNDS],
)
def test_the_routers_bounds_hold_for_every_policy(
    workers: list[W],
    adapter: str | None,
    avoid: tuple[str, ...],
    chosen: set[str] | None,
    policy: str,
    seed: int,
) -> None:
    fleet = fleet_of(*workers)
    decision = decide(fleet, adapter, seed, policy, avoid)
    if chosen is None:
        assert decision.worker is None
        assert decision.reason in {Reason.ALL_OVERLOADED, Reason.NO_SLOT, Reason.NO_WORKER}
    else:
        assert decision.worker is not None
        assert decision.worker.id in chosen


REASONS = [
    ([W(0, ("a",))], "a", Reason.HOLDER, ()),
    ([W(0)], "a", Reason.COLD, ()),
    ([W(0)], None, Reason.BASE, ()),
    ([W(4, ("a",)), W(0)], "a", Reason.SPILL, (("w0", Drop.OVERLOADED),)),
    ([W(0, ("a",), accepting=False), W(0)], "a", Reason.SPILL, (("w0", Drop.NOT_ACCEPTING),)),
    ([W(4, ("a",)), W(4)], "a", Reason.ALL_OVERLOADED, (("w0", Drop.OVERLOADED),)),
]


@pytest.mark.parametrize("policy", PEERS)
@pytest.mark.parametrize(("workers", "adapter", "reason", "dropped"), REASONS)
def test_a_decision_says_what_it_means_for_the_adapter(
    workers: list[W],
    adapter: str | None,
    reason: Reason,
    dropped: tuple[tuple[str, Drop], ...],
    policy: str,
) -> None:
    decision = decide(fleet_of(*workers), adapter, 0, policy)
    assert (decision.reason, decision.dropped) == (reason, dropped)


@pytest.mark.parametrize("policy", PEERS)
def test_a_worker_that_failed_the_job_is_named_unless_it_is_all_there_is(policy: str) -> None:
    fleet = fleet_of(W(0, ("a",)), W(0))
    assert decide(fleet, "a", 0, policy, ("w0",)).dropped == (("w0", Drop.AVOIDED),)
    alone = fleet_of(W(0, ("a",)))
    assert decide(alone, "a", 0, policy, ("w0",)) == Decision(alone.get("w0"), Reason.HOLDER)


# One decision of a policy without a past: (policy, workers, adapter, all that may be chosen).
CASES = [
    ("least_loaded", "the least in flight, though another holds it",
     [W(3, ("a",)), W(2), W(1)], "a", {"w2"}),
    ("least_loaded", "ties by the generator", [W(1), W(1), W(2)], None, {"w0", "w1"}),
    ("power_of_two", "of two, the less busy", [W(3, ("a",)), W(2)], "a", {"w1"}),
    ("power_of_two", "never the busiest, and not always the least busy",
     [W(3), W(2), W(1)], None, {"w1", "w2"}),
    ("power_of_two", "equally busy: it knows of no slots", [W(0, ("x", "y")), W(0)], "a",
     {"w0", "w1"}),

    ("ray_serve", "a holder below the limit, however idle the others", [W(3, ("a",)), W(0)], "a",
     {"w0"}),
    ("ray_serve", "the shorter queue of two holders", [W(3, ("a",)), W(2, ("a",)), W(0)], "a",
     {"w1"}),
    ("ray_serve", "at the limit, the fewest models",
     [W(4, ("a",)), W(0, ("x", "y")), W(2, ("x",)), W(3, ("y",))], "a", {"w2", "w3"}),
    ("ray_serve", "nobody holds it: the fewest models", [W(0, ("x",)), W(3)], "a", {"w1"}),
    ("ray_serve", "a load under way is a model", [W(1, loading=("x",)), W(3)], "a", {"w1"}),
    ("ray_serve", "those with the fewest are full: anybody", [W(0, ("x",)), W(4)], "a", {"w0"}),
    ("ray_serve", "both holders that are drawn may be full",
     [W(4, ("a",)), W(4, ("a",)), W(0, ("a", "x")), W(0)], "a", {"w2", "w3"}),

    ("llm_d", "resident 1.0 over a free slot 0.8", [W(0, ("a",)), W(0)], "a", {"w0"}),
    ("llm_d", "a free slot 0.8 over none", [W(0, ("x", "y")), W(0, ("x",))], "a", {"w1"}),
    ("llm_d", "a free slot 0.8 over waiting 0.6", [W(2, ("x",), loading=("a",)), W(0)], "a",
     {"w1"}),
    ("llm_d", "waiting 0.6 over a full worker 0", [W(2, ("x",), loading=("a",)), W(0, ("x", "y"))],
     "a", {"w0"}),
    ("llm_d", "waiting where a slot is free is a free slot", [W(1, loading=("a",)), W(0)], "a",
     {"w0", "w1"}),
    ("llm_d", "1.0 of adapter against 0.99 of KV", [W(0, ("a",), kv_usage=0.495), W(0, ("x", "y"))],
     "a", {"w0"}),
    ("llm_d", "1.0 of adapter against 1.01 of KV", [W(0, ("a",), kv_usage=0.505), W(0, ("x", "y"))],
     "a", {"w1"}),
    ("llm_d", "the longest queue costs 2, whatever the lengths",
     [W(0, ("a",), waiting=1), W(0, ("x", "y"))], "a", {"w1"}),
    ("llm_d", "a queue is measured between the fewest and the most: 2/5 of 2 are 0.8 < 1",
     [W(0, ("a",), waiting=2), W(0, ("x", "y")), W(0, waiting=5)], "a", {"w0"}),
    ("llm_d", "3/5 of 2 are 1.2 > 1",
     [W(0, ("a",), waiting=3), W(0, ("x", "y")), W(0, waiting=5)], "a", {"w1"}),
    ("llm_d", "what is in flight here is not what waits there", [W(3, ("a",)), W(0)], "a", {"w0"}),
    ("llm_d", "without an adapter, slots do not count", [W(0, ("x", "y")), W(0)], None,
     {"w0", "w1"}),
    ("llm_d", "ties by the generator", [W(3), W(0)], "a", {"w0", "w1"}),

    ("smg", "a holder, however idle the others", [W(70, ("a",), limit=99), W(6, limit=99)], "a",
     {"w0"}),
    ("smg", "more than 64 apart: the least loaded", [W(71, ("a",), limit=99), W(6, limit=99)], "a",
     {"w1"}),
    ("smg", "64 apart are not more", [W(64, ("a",), limit=99), W(0, limit=99)], "a", {"w0"}),
    ("smg", "1.5 times are not more", [W(210, ("a",), limit=999), W(140, limit=999)], "a", {"w0"}),
    ("smg", "more than 1.5 times", [W(211, ("a",), limit=999), W(140, limit=999)], "a", {"w1"}),
    ("smg", "one that does not accept is no measure",
     [W(70, ("a",), limit=99), W(6, limit=99), W(0, accepting=False)], "a", {"w0"}),
    ("smg", "the less busy of its holders", [W(3, ("a",)), W(2, ("a",)), W(0)], "a", {"w1"}),
    ("smg", "nobody had it: the least loaded", [W(3), W(2)], "a", {"w1"}),

    ("dynamo", "without a plan, who holds it", [W(3, ("a",)), W(0)], "a", {"w0"}),
    ("dynamo", "the least loaded of them", [W(3, ("a",)), W(2, ("a",)), W(0)], "a", {"w1"}),
    ("dynamo", "the base model: the least loaded", [W(3), W(2)], None, {"w1"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "workers", "adapter", "chosen"),
    [(case[0], *case[2:]) for case in CASES],
    ids=[f"{case[0]}: {case[1]}" for case in CASES],
)
def test_one_decision(policy: str, workers: list[W], adapter: str | None, chosen: set[str]) -> None:
    fleet = fleet_of(*workers)
    seen = {decide(fleet, adapter, seed, policy).worker for seed in range(64)}
    assert {worker.id for worker in seen if worker} == chosen


def home(fleet: Fleet, name: str, policy: str = "chwbl") -> str:
    """Where the adapter goes while nobody is busy."""
    worker = decide(fleet, name, 0, policy).worker
    assert worker is not None
    return worker.id


@pytest.mark.parametrize("policy", ["chwbl", "dynamo"])
def test_a_home_moves_only_with_its_worker(policy: str) -> None:
    names = [f"adapter-{number}" for number in range(300)]
    fleet = fleet_of(W(), W(), W(), W())
    before = {name: home(fleet, name, policy) for name in names}
    counts = Counter(before.values())
    assert len(counts) == 4
    assert min(counts.values()) > 40, "hashing spreads adapters about evenly"
    gone = fleet.get("w2")
    assert gone is not None
    fleet.remove(gone)
    after = {name: home(fleet, name, policy) for name in names}
    assert all(after[name] == before[name] for name in names if before[name] != "w2")
    assert {after[name] for name in names if before[name] == "w2"} == {"w0", "w1", "w3"}


@pytest.mark.parametrize(
    ("at_home", "elsewhere", "stays"),
    [
        (0, 0, True),  # ceil(1.25 x 1 / 4) = 1, and it would have 1
        (1, 0, False),  # ceil(1.25 x 2 / 4) = 1, and it would have 2
        (1, 1, True),  # ceil(1.25 x 5 / 4) = 2
        (2, 1, False),  # ceil(1.25 x 6 / 4) = 2
        (4, 4, True),  # ceil(1.25 x 17 / 4) = 6
        (5, 4, True),  # ceil(1.25 x 18 / 4) = 6
        (6, 4, False),  # ceil(1.25 x 19 / 4) = 6
    ],
)
def test_chwbl_leaves_home_above_the_bound(at_home: int, elsewhere: int, stays: bool) -> None:
    at = home(fleet_of(W(), W(), W(), W()), "a")
    fleet = fleet_of(*(
        W(at_home if f"w{number}" == at else elsewhere, limit=99) for number in range(4)
    ))  # fmt: skip
    assert (home(fleet, "a") == at) is stays


def test_chwbl_goes_on_in_the_rings_order_and_back() -> None:
    policy = Chwbl(Random(0))
    fleet = fleet_of(*(W(limit=99) for _ in range(4)))
    job = Job("1", ref("a"))
    first = policy.place(job, fleet, 0.0).worker
    assert first is not None
    fleet.reserve(first, None)
    second = policy.place(job, fleet, 0.0).worker
    assert second is not None
    assert second is not first
    fleet.release(first, None)
    assert policy.place(job, fleet, 0.0).worker is first, "its home again"
    fleet.hold(first, Hold.SILENT, held=True)
    assert policy.place(job, fleet, 0.0).worker is second


def test_chwbl_goes_to_the_first_that_can_where_none_is_within_the_bound() -> None:
    at = home(fleet_of(W(), W(), W()), "a")
    # The bound is ceil(1.25 x 4 / 3) = 2; those within it have every slot in use.
    fleet = fleet_of(*(
        W(3, limit=9) if f"w{number}" == at else W(0, slots=0) for number in range(3)
    ))  # fmt: skip
    assert home(fleet, "a") == at


def test_chwbl_spreads_jobs_without_an_adapter() -> None:
    fleet = fleet_of(W(), W(), W())
    policy = Chwbl(Random(0))
    seen = {policy.place(Job(str(n), None), fleet, 0.0).worker for n in range(50)}
    assert len(seen) == 3


def test_smg_remembers_who_had_an_adapter() -> None:
    policy = Smg(Random(0))
    fleet = fleet_of(W(1, limit=99), W(0, limit=99))
    w0, w1 = fleet
    job = Job("1", ref("a"))
    assert policy.place(job, fleet, 0.0).worker is w1
    for _ in range(64):
        fleet.reserve(w1, None)
    assert policy.place(job, fleet, 0.0).worker is w1, "though it is evicted there, and w0 idle"
    slot, _ = fleet.reserve(w0, ref("a"))
    assert slot is not None
    assert policy.place(job, fleet, 0.0).worker is w0, "the holder before who had it"


def test_smg_forgets_the_adapters_that_were_used_longest_ago() -> None:
    policy = Smg(Random(0))
    fleet = fleet_of(W())
    for number in range(REMEMBERED + 5):
        policy.place(Job("1", ref(str(number))), fleet, 0.0)
    assert len(policy._last) == REMEMBERED
    assert ref("4") not in policy._last


# Dynamo's plan.

COUNTS = [
    ("its share of all slots, rounded up", {"a": 1, "b": 3}, 8, 8, {"a": 2, "b": 6}),
    ("at most the number of workers", {"a": 1, "b": 3}, 8, 4, {"a": 2, "b": 4}),
    ("at least one", {"a": 1, "b": 1000}, 4, 2, {"a": 1, "b": 2}),
    ("rounded up past the budget: scaled down, the largest remainder up",
     {"a": 45, "b": 35, "c": 20}, 8, 8, {"a": 3, "b": 3, "c": 2}),
    ("equal remainders by name", {"b": 1, "a": 1, "c": 1}, 4, 4, {"a": 2, "b": 1, "c": 1}),
    ("more adapters than slots: the busiest", {"a": 1, "b": 2, "c": 3}, 2, 4, {"b": 1, "c": 1}),
    ("no load", {}, 4, 2, {}),
    ("no slots", {"a": 1}, 0, 2, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loads", "slots", "workers", "expected"),
    [case[1:] for case in COUNTS],
    ids=[case[0] for case in COUNTS],
)
def test_dynamo_replica_counts(
    loads: dict[str, int], slots: int, workers: int, expected: dict[str, int]
) -> None:
    counts = replica_counts({ref(name): load for name, load in loads.items()}, slots, workers)
    assert {adapter.name: count for adapter, count in counts.items()} == expected


def arrive(policy: Dynamo, fleet: Fleet, now: float, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for _ in range(count):
            policy.arrived(Job("1", ref(name)), fleet, now)


def tick(policy: Dynamo, fleet: Fleet, now: float) -> None:
    """Have the ticks until now computed, without an adapter's arrival."""
    policy.arrived(Job("1", None), fleet, now)


def test_dynamo_plans_every_three_seconds() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W(), W())
    arrive(policy, fleet, 0.0, {"a": 4})
    tick(policy, fleet, 2.999)
    assert policy.replicas(ref("a")) == ()
    tick(policy, fleet, 3.0)
    assert sorted(policy.replicas(ref("a"))) == ["w0", "w1"]


def test_dynamo_routes_in_its_order() -> None:
    def chosen(fleet: Fleet) -> str:
        policy = Dynamo(Random(0))
        # "a" has one replica of eight, "z" the rest.
        arrive(policy, fleet, 0.0, {"a": 1, "z": 99})
        tick(policy, fleet, 3.0)
        assert len(policy.replicas(ref("a"))) == 1
        worker = policy.place(Job("1", ref("a")), fleet, 3.0).worker
        assert worker is not None
        return worker.id

    at = home(fleet_of(W(), W(), W(), W()), "a", "dynamo")
    others = [f"w{number}" for number in range(4) if f"w{number}" != at]

    def fleet(own: W, holder: W) -> Fleet:
        return fleet_of(*(
            {at: own, others[0]: holder}.get(f"w{number}", W()) for number in range(4)
        ))  # fmt: skip

    assert chosen(fleet(W(3, ("a",)), W(0, ("a",)))) == at, "a replica that holds it"
    assert chosen(fleet(W(3), W(0, ("a",)))) == at, "a replica, which will load it"
    assert chosen(fleet(W(4), W(3, ("a",)))) == others[0], "another that holds it"
    assert chosen(fleet(W(4), W(0))) in others, "the next in its order"
    assert chosen(fleet(W(4), W(0))) == chosen(fleet(W(4), W(3))), "however busy"


def test_dynamo_takes_the_least_loaded_replica_that_holds_it() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W(2, ("a",)), W(1, ("a",)), W(0))
    arrive(policy, fleet, 0.0, {"a": 9})
    tick(policy, fleet, 3.0)
    assert sorted(policy.replicas(ref("a"))) == sorted(ANY)
    assert policy.place(Job("1", ref("a")), fleet, 3.0).worker is fleet.get("w1")


def test_dynamo_counts_ninety_seconds_and_smooths() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W())
    arrive(policy, fleet, 0.0, {"a": 10})
    known = policy._adapters[ref("a")]
    tick(policy, fleet, 3.0)
    assert known.estimate == 10.0, "the first measurement is taken as it is"
    arrive(policy, fleet, 4.0, {"a": 10})
    tick(policy, fleet, 6.0)
    assert known.estimate == pytest.approx(0.3 * 20 + 0.7 * 10)
    tick(policy, fleet, 87.0)
    assert sum(count for _, count in known.arrivals) == 20
    tick(policy, fleet, 90.0)
    assert sum(count for _, count in known.arrivals) == 10
    tick(policy, fleet, 93.0)
    assert sum(count for _, count in known.arrivals) == 10
    tick(policy, fleet, 96.0)
    assert not known.arrivals
    assert policy.replicas(ref("a")) == ("w0",), "the smoothed load lasts longer"
    tick(policy, fleet, 140.0)
    assert policy.replicas(ref("a")) == ()
    assert ref("a") not in policy._adapters, "no arrivals, no load, no holder"


def test_dynamo_scales_up_at_once_and_down_after_three_ticks() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(*(W(limit=99) for _ in range(4)))
    arrive(policy, fleet, 0.0, {"a": 1})
    tick(policy, fleet, 3.0)
    assert len(policy.replicas(ref("a"))) == 4
    sizes = []
    for number in range(2, 7):
        arrive(policy, fleet, number * 3 - 1, {"z": 1000})
        tick(policy, fleet, number * 3)
        sizes.append(len(policy.replicas(ref("a"))))
    assert sizes == [4, 4, 4, 1, 1]
    assert len(policy.replicas(ref("z"))) == 4


def test_dynamo_keeps_the_workers_that_an_adapter_has() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(*(W(slots=1) for _ in range(4)))
    arrive(policy, fleet, 0.0, {"a": 4, "b": 4})
    tick(policy, fleet, 3.0)
    before = {name: policy.replicas(ref(name)) for name in "ab"}
    assert sorted(before["a"] + before["b"]) == ["w0", "w1", "w2", "w3"], "no slot is given twice"
    tick(policy, fleet, 6.0)
    assert {name: policy.replicas(ref(name)) for name in "ab"} == before
    gone = fleet.get(before["a"][0])
    assert gone is not None
    fleet.remove(gone)
    tick(policy, fleet, 9.0)
    assert policy.replicas(ref("b")) == before["b"], "nobody takes what another has"
    assert gone.id not in policy.replicas(ref("a"))


def test_dynamo_gives_those_without_a_share_one_worker() -> None:
    fleet = fleet_of(W(0, ("c",), slots=1), W(slots=1))
    policy = Dynamo(Random(0))
    arrive(policy, fleet, 0.0, {"a": 3, "b": 2, "c": 1})
    tick(policy, fleet, 3.0)
    assert [len(policy.replicas(ref(name))) for name in "abc"] == [1, 1, 1]
    assert policy.replicas(ref("a")) != policy.replicas(ref("b"))


def test_dynamo_forgets_the_plan_of_a_fleet_that_is_gone() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W())
    arrive(policy, fleet, 0.0, {"a": 3})
    tick(policy, fleet, 3.0)
    for worker in tuple(fleet):
        fleet.hold(worker, Hold.SILENT, held=True)
    tick(policy, fleet, 6.0)
    assert policy.replicas(ref("a")) == ()


def test_dynamo_catches_up_a_bounded_number_of_ticks() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W())
    tick(policy, fleet, 0.0)
    tick(policy, fleet, 3e7)
    assert policy._tick == 30
    tick(policy, fleet, 3e7 + 3.0)
    assert policy._tick == 31


def test_dynamo_tracks_a_bounded_number_of_adapters() -> None:
    policy, fleet = Dynamo(Random(0)), fleet_of(W())
    for number in range(TRACKED_MAX + 5):
        policy.arrived(Job("1", ref(str(number))), fleet, 0.0)
    assert len(policy._adapters) == TRACKED_MAX


# Determinism.

SCRIPT = """
from random import Random
from fleets import W, fleet_of
from harness import ref
from router.core.job import Job
from router.core.policies import POLICIES
for name, make in sorted(POLICIES.items()):
    rng, policy = Random(5), make(Random(7))
    fleet = fleet_of(*(W(limit=40, slots=3) for _ in range(5)))
    running, line = [], []
    for number in range(600):
        if running and rng.random() < 0.4:
            fleet.release(*running.pop(int(rng.random() * len(running))))
        adapter = ref(f"a{int(rng.random() ** 2 * 30)}") if rng.random() < 0.9 else None
        job = Job(str(number), adapter)
        policy.arrived(job, fleet, number * 0.05)
        worker = policy.place(job, fleet, number * 0.05).worker
        line.append(worker.id if worker else "-")
        if worker:
            slot, begin = fleet.reserve(worker, adapter)
            if begin:
                fleet.finish_load(worker, slot, 0)
            running.append((worker, slot))
    print(name, *line)
"""


def test_every_policy_decides_the_same_in_any_process() -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), str(here.parent / "support")])

    def run(salt: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": paths}
        return subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    first = run("1")
    assert first == run("2")
    lines = {line.split()[0]: line.split()[1:] for line in first.splitlines()}
    assert sorted(lines) == sorted(POLICIES)
    assert len({tuple(line) for line in lines.values()}) == len(POLICIES), "each its own way"
    assert all(len(set(line) - {"-"}) == 5 for line in lines.values()), "all workers are used"


def test_two_instances_share_nothing() -> None:
    fleet = fleet_of(W(), W())
    one, other = Dynamo(Random(0)), Dynamo(Random(0))
    arrive(one, fleet, 0.0, {"a": 3})
    tick(one, fleet, 3.0)
    tick(other, fleet, 3.0)
    assert one.replicas(ref("a"))
    assert not other.replicas(ref("a"))
