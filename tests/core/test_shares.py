"""Slots and places among tenants: within a share always, beyond it what the others leave."""

import asyncio

from harness import Cluster, simulate
from hypothesis import given
from hypothesis import strategies as st

from router.core.shares import ACTIVE_S, TENANTS_MAX, Shares, Tenants


def shares(capacity: int, *tenants: str, **weights: float) -> Shares:
    found = Shares(capacity)
    found.tenants = Tenants()
    found.tenants.weigh(weights)
    for tenant in tenants:
        found.tenants.arrived(tenant, 0.0)
    return found


def opened(found: Shares, tenant: str, most: int = 100) -> int:
    """Take slots for as long as it may; how many."""
    in_use = sum(found._counts.values())
    taken = 0
    while taken < most and found.may_open(tenant, found._capacity - in_use - taken):
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
    assert opened(found, "a") == 6, "one, and what little is remembered"
    found.tenants.arrived("a", 20 * ACTIVE_S)
    assert opened(found, "a") == 2, "b is not active any more"


def test_weights_are_shares() -> None:
    found = shares(8, "a", "b", b=3.0)
    assert opened(found, "b", 6) == 6
    assert found.entitled("a")
    assert not found.entitled("b")
    assert not found.beyond("b")
    assert opened(found, "b") == 1
    assert found.beyond("b")
    assert opened(found, "a") == 1


def test_with_more_tenants_than_slots_each_may_have_one() -> None:
    found = shares(2, *"abcd")
    for tenant in "cd":
        assert opened(found, tenant) == 1
    assert not found.may_open("a", 0)
    found.closed("c")
    assert found.may_open("a", 1)


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
    assert sum(found._counts.values()) == len(held) <= capacity


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
