"""What the core learns: rates, prefixes, times, holders."""

import pytest
from fleets import W, fleet_of
from harness import ref
from hypothesis import given
from hypothesis import strategies as st

from router.core.demand import Demand
from router.core.drain import WINDOW, DrainRate
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Prefix
from router.core.prefixes import PrefixIndex, marks
from router.core.replicas import FADE, LOADS_AT_ONCE, Replicas
from router.core.timing import EngineTimes, Learned, Tier, new_pace


def test_a_rate_follows_arrivals_and_fades() -> None:
    demand = Demand(memory_s=10)
    for step in range(1000):
        demand.arrived(ref("a"), step / 4)
    assert demand.rate(ref("a"), 250) == pytest.approx(4, rel=0.05)
    assert demand.rate(ref("a"), 260) == pytest.approx(4 / 2.718, rel=0.05)
    assert demand.rate(ref("never"), 250) == 0


def test_the_least_recent_adapters_are_forgotten_first() -> None:
    demand = Demand(limit=2)
    for at, name in enumerate("abac"):
        demand.arrived(ref(name), float(at))
    assert len(demand) == 2
    assert demand.rate(ref("b"), 4.0) == 0
    assert demand.rate(ref("a"), 4.0) > 0


@given(st.integers(0, 100_000))
def test_marks_are_few_rising_and_dense_enough(blocks: int) -> None:
    found = list(marks(blocks))
    assert found == sorted(set(found))
    assert len(found) <= 2 * blocks.bit_length()
    if blocks:
        assert found[0] == 1
        assert 2 * blocks / 3 <= found[-1] <= blocks


def test_a_prefix_is_found_as_far_as_it_is_shared_and_per_adapter() -> None:
    index = PrefixIndex(limit=4)
    shared, own, other = Prefix(1, 100), Prefix(2, 200), Prefix(3, 200)
    index.sent(ref("a"), (shared, own), "w0")
    index.sent(ref("a"), (shared,), "w1")
    assert index.cached_tokens(ref("a"), (shared, own)) == {"w0": 200, "w1": 100}
    assert index.cached_tokens(ref("a"), (shared, other)) == {"w0": 100, "w1": 100}
    assert index.cached_tokens(ref("b"), (shared, own)) == {}
    index.forget("w0")
    assert index.cached_tokens(ref("a"), (shared, own)) == {"w1": 100}
    for key in range(10, 20):
        index.sent(None, (Prefix(key, 1),), "w0")
    assert len(index) == 4


def test_loads_and_answers_are_learned_by_tier() -> None:
    learned = Learned(EngineTimes(load_host_s=0.01, load_disk_s=0.1, fetch_s=1.0))
    assert learned.load_s(Tier.STORE) == pytest.approx(1.1)
    for _ in range(50):
        learned.loaded(Tier.DISK, 0.5)
        learned.answered(1000)
    assert learned.load_s(Tier.DISK) == pytest.approx(0.5, rel=0.01)
    assert learned.load_s(Tier.HOST) == 0.01
    assert learned.expected_output(0) > 900
    assert learned.expected_output(16) == 16


def test_a_pace_is_bounded_and_ignores_what_tells_nothing() -> None:
    pace = 1.0
    for _ in range(500):
        pace = new_pace(pace, 0.01, 100.0)
    assert 1 < pace <= 16
    assert new_pace(2.0, 0.0, 1.0) == new_pace(2.0, 1.0, 0.0) == 2.0


def test_the_drain_rate_is_that_of_contention() -> None:
    rate = DrainRate()
    for step in range(WINDOW + 1):
        rate.served(step / 10)
    assert rate.per_s == pytest.approx(10)
    rate.pause()
    rate.served(1e6)
    assert rate.per_s == pytest.approx(10), "the silence between is not counted"


class Plan:
    """A planner over a fleet, and the loads that it asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.loads: list[tuple[str, str]] = []
        self.replicas = Replicas(fleet, self.warm)
        self.now = 0.0

    def warm(self, worker: Worker, adapter: AdapterRef) -> bool:
        self.loads.append((worker.id, adapter.name))
        self.fleet.finish_load(worker, self.fleet.begin_load(worker, adapter), 0)
        return True

    def tick(self, waiting: int = 0) -> bool:
        self.now += 1.0
        return self.replicas.plan(lambda _: waiting, self.now)


def test_a_hot_adapter_gets_holders_at_once_and_loses_them_slowly() -> None:
    fleet = fleet_of(W(0, ("a",), limit=64, slots=4), W(0, limit=64), W(0, limit=64))
    first = fleet.get("w0")
    assert first is not None
    uses = [fleet.reserve(first, ref("a")) for _ in range(40)]
    plan = Plan(fleet)
    assert plan.tick()
    assert fleet.targets[ref("a")] == 3
    plan.tick()
    assert {worker for worker, _ in plan.loads} == {"w1", "w2"}
    for slot, _ in uses:
        fleet.release(first, slot)
    ticks = 0
    while ref("a") in fleet.targets:
        plan.tick()
        ticks += 1
    assert 5 <= ticks <= 10 / FADE
    while plan.tick():
        ticks += 1
    assert ticks < 100, "and then it is forgotten"


def test_a_cold_adapter_evicts_nobody() -> None:
    fleet = fleet_of(W(0, ("a",), slots=1, limit=64))
    [worker] = fleet
    fleet.users[ref("b")] = 1
    plan = Plan(fleet)
    plan.tick()
    assert plan.loads == []
    assert worker.slots.get(ref("a")) is not None


def test_churn_is_bounded() -> None:
    fleet = fleet_of(*[W(0, slots=16, limit=64)] * 8)
    for number in range(40):
        fleet.users[ref(f"a{number}")] = 1
    plan = Plan(fleet)
    plan.tick()
    assert len(plan.loads) == LOADS_AT_ONCE


def test_what_waits_is_loaded_where_a_slot_is_free() -> None:
    fleet = fleet_of(W(0, ("x",), slots=1), W(0, slots=1))
    plan = Plan(fleet)
    plan.replicas.waits(ref("a"))
    plan.replicas.waits(ref("a"))
    plan.replicas.waits(ref("b"))
    assert plan.loads == [("w1", "a")]
