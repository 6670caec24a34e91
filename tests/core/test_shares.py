"""Slots and places among tenants: within a share always, beyond it what the others leave."""

import asyncio
from typing import Any

import pytest
from harness import Cluster, ref, simulate
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Fleet, Worker
from router.core.shares import ACTIVE_S, TENANTS_MAX, Shares, Tenants


def shares(capacity: int, *tenants: str, **weights: float) -> Shares:
    found = Shares(capacity)
    found.tenants.weigh(weights)
    for tenant in tenants:
        found.tenants.arrived(tenant, 0.0)
    return found


def opened(found: Shares, tenant: str, most: int = 100) -> int:
    """Take slots for as long as it may; how many."""
    in_use = sum(found._here.counts.values())
    taken = 0
    while taken < most and found.may_open(tenant, found._here.capacity - in_use - taken):
        found.opened(tenant)
        taken += 1
    return taken


def test_alone_a_tenant_may_have_everything() -> None:
    assert opened(shares(8, "a"), "a") == 8


def test_a_flood_leaves_one_slot_to_who_is_active() -> None:
    found = shares(8, "a", "b")
    assert opened(found, "a") == 7
    assert opened(found, "b") == 1


def test_what_was_used_of_late_is_left_up_to_a_share() -> None:
    found = shares(8, "a", "b")
    assert opened(found, "b", 3) == 3
    for _ in range(3):
        found.closed("b")
    assert opened(found, "a") == 4, "three of late and one more are left to b"
    assert opened(found, "b") == 4


def test_what_was_used_long_ago_is_not_left() -> None:
    found = shares(8, "a", "b")
    opened(found, "b", 3)
    for _ in range(3):
        found.closed("b")
    found.tenants.arrived("b", 10 * ACTIVE_S)
    found.tenants.arrived("a", 10 * ACTIVE_S)
    assert opened(found, "a") == 7, "one, since what is remembered is next to nothing"
    found.tenants.arrived("a", 20 * ACTIVE_S)
    assert opened(found, "a") == 1, "b is not active any more"


def test_weights_are_shares() -> None:
    found = shares(8, "a", "b", b=3.0)
    assert opened(found, "b", 6) == 6
    assert found.entitled("a")
    assert not found.entitled("b")
    assert not found.tenants.beyond("b")
    assert opened(found, "b") == 1
    assert found.tenants.beyond("b")
    assert opened(found, "a") == 1


def test_with_more_tenants_than_slots_each_may_have_one() -> None:
    found = shares(2, *"abcd")
    for tenant in "cd":
        assert opened(found, tenant) == 1
    assert not found.may_open("a", 0)
    found.closed("c")
    assert found.may_open("a", 1)


def fleet(workers: int, *tenants: str, slots: int = 8, places: int = 64) -> list[Worker]:
    found = Fleet("base")
    for number in range(workers):
        found.add(Worker(str(number), max_ongoing=places, slots=slots))
    for tenant in tenants:
        found.tenants.arrived(tenant, 0.0)
    return list(found)


def use(found: Shares, **counts: int) -> Shares:
    for tenant, count in counts.items():
        for _ in range(count):
            found.opened(tenant)
    return found


@pytest.mark.parametrize(
    ("slots", "places", "left", "polite", "flood"),
    [
        # both at half of the slots, and one of them has most of the places: it may not have the rest
        ({"polite": 3, "flood": 4}, {"polite": 6, "flood": 50}, 1, True, False),
        ({"polite": 4, "flood": 3}, {"polite": 6, "flood": 50}, 1, True, False),
        # of late and its root: 4 + 2, of which 4 are in use, and one for itself
        ({"polite": 4, "flood": 1}, {"flood": 50}, 3, True, True),
        ({"polite": 4, "flood": 2}, {"flood": 50}, 2, True, False),
        # as much as the one has of slots has the other of places
        ({"polite": 6, "flood": 1}, {"polite": 6, "flood": 48}, 1, False, True),
    ],
)
def test_who_has_most_of_one_thing_leaves_the_other(
    slots: dict[str, int], places: dict[str, int], left: int, polite: bool, flood: bool
) -> None:
    (worker,) = fleet(1, "polite", "flood")
    use(worker.places, **places)
    found = use(worker.slots.shares, **slots)
    assert found.may_open("polite", left) == polite
    assert found.may_open("flood", left) == flood


def test_a_share_is_of_the_fleet() -> None:
    one, other = (worker.slots.shares for worker in fleet(2, "a", "b"))
    use(one, a=7)
    assert one.may_open("a", 1), "half of all slots, and it has none elsewhere"
    use(other, a=2)
    assert not one.may_open("a", 1)
    use(other, b=6)
    assert not other.may_open("a", 0)


def test_who_leaves_the_fleet_takes_what_is_in_use_there_along() -> None:
    found = Fleet("base")
    workers = [Worker(str(number), max_ongoing=4, slots=4) for number in range(2)]
    for worker in workers:
        found.add(worker)
        slot, _ = found.reserve(worker, ref("a"), "t")
        assert slot is not None
    assert found.tenants.level("t") == 1 / 4
    found.remove(workers[0])
    assert found.tenants.level("t") == 1 / 4
    found.release(workers[0], workers[0].slots.get(ref("a")), "t")
    found.release(workers[1], workers[1].slots.get(ref("a")), "t")
    assert found.tenants.level("t") == 0.0


@pytest.mark.parametrize(
    ("slots", "places", "yields", "must"),
    [
        ({"a": 4, "b": 4}, {}, False, False),
        ({"a": 4, "b": 4}, {"a": 50}, True, True),
        ({"a": 6, "b": 1}, {}, True, False),
        ({"a": 7, "b": 1}, {}, True, True),
        ({"a": 5, "b": 0}, {}, True, False),
        ({"a": 3, "b": 4}, {"a": 32}, False, False),
    ],
)
def test_who_is_beyond_its_share_yields_a_slot(
    slots: dict[str, int], places: dict[str, int], yields: bool, must: bool
) -> None:
    (worker,) = fleet(1, "a", "b")
    use(worker.places, **places)
    found = use(worker.slots.shares, **slots)
    assert found.yields("a", "b") == yields
    assert not found.yields("b", "a")
    assert found.must_yield("a", 8 - sum(slots.values())) == must
    assert not found.must_yield("b", 8 - sum(slots.values()))


def test_tenants_are_bounded() -> None:
    tenants = Tenants()
    for number in range(10 * TENANTS_MAX):
        tenants.arrived(str(number), 0.0)
    assert len(tenants.weights("")) == TENANTS_MAX + 1


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 30)), max_size=60),
)
def test_who_is_within_its_share_gets_what_is_left(
    capacity: int, events: list[tuple[str, bool, float]]
) -> None:
    found = shares(capacity)
    now = 0.0
    held: list[str] = []
    for tenant, opens, gap in events:
        now += gap
        found.tenants.arrived(tenant, now)
        left = capacity - len(held)
        if not opens and tenant in held:
            held.remove(tenant)
            found.closed(tenant)
        elif opens:
            may = found.may_open(tenant, left)
            assert not (may and not left), "more than there are"
            if left and found.entitled(tenant):
                assert may
            if may:
                held.append(tenant)
                found.opened(tenant)
    assert sum(found._here.counts.values()) == len(held) <= capacity


def test_a_flood_of_adapters_does_not_keep_out_another_tenant() -> None:
    """Every slot could be in use for 100 s; the polite tenant's first adapter is served at once."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=4, max_ongoing=64, policy="cost")
        loop = asyncio.get_running_loop()
        await cluster.use("p", tenant="polite")
        flood = [
            cluster.start(cluster.use(f"f{number}", hold_s=100, tenant="flood"))
            for number in range(8)
        ]
        await asyncio.sleep(5)
        started = loop.time()
        await cluster.use("p", tenant="polite")
        await cluster.use("q", tenant="polite")
        assert loop.time() - started < 5
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        await asyncio.sleep(120)  # until nothing is loaded ahead any more
        cluster.assert_at_rest()

    simulate(main())


def test_a_slot_falls_idle_before_the_polite_tenant_asks_for_it() -> None:
    """The flood keeps every slot of its own in use, by ever new jobs: one is closed to them in time."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=8, max_ongoing=64, policy="cost", slot_patience_s=1000)

        async def flood(name: str) -> None:
            while True:
                await cluster.use(name, hold_s=5, tenant="flood")

        await cluster.use("p0", tenant="polite")
        tasks: list[asyncio.Task[Any]] = [
            cluster.start(flood(f"f{number % 7}"))
            for number in range(28)  # each adapter by four, so that no slot is ever idle by itself
        ]
        for number in range(4):
            await asyncio.sleep(9)
            tasks.append(cluster.start(cluster.use(f"p{number}", hold_s=100, tenant="polite")))
            await asyncio.sleep(2)
            assert cluster.workers[0].slots.shares._here.counts.get("polite", 0) == number + 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(120)
        cluster.assert_at_rest()

    simulate(main())
