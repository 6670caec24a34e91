"""The quotas' buckets: what a minute holds, several accounts at once, limits that change."""

from typing import Any

import pytest
from harness import Cluster, simulate
from hypothesis import given
from hypothesis import strategies as st

from router.core.job import Outcome, Rejected
from router.core.quotas import Charge, Quota, Quotas, Shortage


def had(quotas: Quotas, tokens: float, now: float, *accounts: str, again: bool = False) -> Charge:
    charge = quotas.reserve(accounts or ("t",), tokens, now, again=again)
    assert isinstance(charge, Charge)
    return charge


def lacks(quotas: Quotas, tokens: float, now: float, *accounts: str) -> Shortage:
    shortage = quotas.reserve(accounts or ("t",), tokens, now)
    assert isinstance(shortage, Shortage)
    return shortage


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(1, 400), st.floats(0, 400)), max_size=40))
def test_no_minute_exceeds_a_quota_by_more_than_what_it_had_saved(
    requests: list[tuple[float, float, float]],
) -> None:
    quota = Quota(requests_per_minute=10, tokens_per_minute=600)
    quotas = Quotas({"t": quota}, 0.0)
    now = 0.0
    taken = [(0.0, 0.0)]
    for gap, tokens, used in requests:
        now += gap
        charge = quotas.reserve(("t",), tokens, now)
        if isinstance(charge, Charge):
            charge.settle(used, now)
            taken.append((now, 1.0))
        else:
            assert charge.wait_s > 0
        had(quotas, 1e9, now, "other")
    assert sum(count for _, count in taken) <= 10 + now / 6 + 1


def test_who_waits_as_long_as_it_was_told_is_let_in() -> None:
    quotas = Quotas({"t": Quota(tokens_per_minute=600)}, 0.0)
    had(quotas, 500, 0.0)
    assert lacks(quotas, 200, 0.0).wait_s == pytest.approx(10.0)
    had(quotas, 200, 10.01)
    lacks(quotas, 5000, 60.0)  # more than a minute's worth: when it is full
    had(quotas, 5000, 200.0)


def test_all_accounts_are_charged_or_none() -> None:
    quotas = Quotas(
        {"team": Quota(tokens_per_minute=600), "key:a": Quota(requests_per_minute=2)}, 0.0
    )
    both = ("team", "key:a")
    first = had(quotas, 500, 0.0, *both)
    assert lacks(quotas, 200, 0.0, *both) == Shortage("team", 10.0)
    first.settle(100, 0.0)
    had(quotas, 200, 0.0, *both)
    # The request that the tenant lacked tokens for was none of the key's two.
    assert lacks(quotas, 1, 0.0, *both) == Shortage("key:a", 30.0)
    had(quotas, 300, 0.0, "team")  # and the one that the key lacked took none of the tenant's
    assert lacks(quotas, 200, 0.0, *both).account == "key:a", "whoever must wait longest"


def test_a_retry_is_counted_once_in_every_account() -> None:
    quotas = Quotas({name: Quota(requests_per_minute=1) for name in ("team", "key:a")}, 0.0)
    had(quotas, 1, 0.0, "team", "key:a")
    had(quotas, 1, 0.0, "team", "key:a", again=True)
    lacks(quotas, 1, 0.0, "team")
    lacks(quotas, 1, 0.0, "key:a")


def test_a_limit_that_changes_keeps_what_was_used() -> None:
    quotas = Quotas({"t": Quota(tokens_per_minute=600)}, 0.0)
    had(quotas, 500, 0.0)
    quotas.change({"t": Quota(tokens_per_minute=1200)}, 0.0)
    had(quotas, 700, 0.0)
    lacks(quotas, 1, 0.0)
    quotas.change({"t": Quota(tokens_per_minute=600)}, 0.0)
    assert lacks(quotas, 600, 0.0).wait_s == pytest.approx(120.0)  # 600 are owed
    quotas.change({}, 0.0)
    had(quotas, 1e9, 0.0)


def test_a_job_settles_with_what_it_reserved_of() -> None:
    quotas = Quotas({"t": Quota(tokens_per_minute=600)}, 0.0)
    before = had(quotas, 400, 0.0)
    quotas.change({}, 0.0)
    quotas.change({"t": Quota(tokens_per_minute=600)}, 0.0)
    had(quotas, 600, 0.0)
    before.settle(0, 0.0)
    lacks(quotas, 1, 0.0)
    unlimited = had(quotas, 100, 0.0, "u")
    quotas.change({"t": Quota(), "u": Quota(tokens_per_minute=100)}, 0.0)
    unlimited.settle(1e9, 0.0)
    had(quotas, 100, 0.0, "u")


@given(
    st.lists(
        st.tuples(
            st.floats(0, 10),
            st.sampled_from([("a",), ("b",), ("a", "b")]),
            st.floats(1, 300),
            st.floats(0, 1),
        ),
        max_size=30,
    )
)
def test_however_they_are_shared_no_budget_is_overdrawn(
    jobs: list[tuple[float, tuple[str, ...], float, float]],
) -> None:
    """Where nobody uses more than it reserved: what was used is at most what was had."""
    per_minute = {"a": 600.0, "b": 900.0}
    quotas = Quotas({name: Quota(None, limit) for name, limit in per_minute.items()}, 0.0)
    used = dict.fromkeys(per_minute, 0.0)
    now = 0.0
    for gap, accounts, tokens, part in jobs:
        now += gap
        charge = quotas.reserve(accounts, tokens, now)
        if isinstance(charge, Shortage):
            assert charge.account in accounts
            continue
        charge.settle(tokens * part, now)
        for name in accounts:
            used[name] += tokens * part
        for name, limit in per_minute.items():
            assert used[name] <= limit * (1 + now / 60) + 1e-6


def test_a_job_is_charged_to_its_tenant_and_to_its_other_accounts() -> None:
    async def main() -> None:
        cluster = Cluster(
            quotas={
                "team": Quota(tokens_per_minute=1000),
                "key:a": Quota(requests_per_minute=2, tokens_per_minute=5000),
            }
        )
        loop = cluster.router.loop
        job: dict[str, Any] = {"tenant": "team", "prompt_tokens": 300, "max_output_tokens": 100}
        async with cluster.router.lease(cluster.job(accounts=("key:a",), **job)) as lease:
            lease.answered(100)
        await cluster.use(None, accounts=("key:a",), **job)
        with pytest.raises(Rejected, match=r"^account `key:a` is over its quota; ") as caught:
            await cluster.use(None, accounts=("key:a",), **job)
        assert caught.value.outcome is Outcome.OVER_QUOTA
        assert caught.value.retry_after_s == pytest.approx(30)
        await cluster.use(None, tenant="team", prompt_tokens=100, max_output_tokens=100)
        with pytest.raises(Rejected, match=r"^tenant `team` is over its quota; "):
            await cluster.use(None, **job)
        cluster.quotas.change({"key:a": Quota(requests_per_minute=1)}, loop.time())
        await cluster.use(None, **job)

    simulate(main())


def test_routers_that_share_quotas_share_their_limits() -> None:
    async def main() -> None:
        one = Cluster(quotas={"team": Quota(requests_per_minute=2)})
        other = Cluster(quotas=one.quotas)
        await one.use(None, tenant="team")
        await other.use(None, tenant="team")
        for cluster in (one, other):
            with pytest.raises(Rejected, match="over its quota"):
                await cluster.use(None, tenant="team")

    simulate(main())
