"""Policy `cost`: each term moves the decision, and hysteresis keeps it."""

from random import Random
from typing import Any

import pytest
from fleets import W, fleet_of
from harness import ref
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Fleet, Report
from router.core.job import Job, Prefix
from router.core.placement import Decision, Drop, Reason
from router.core.policies.cost import AHEAD_S, ALL_UP_TO, Cost


def place(fleet: Fleet, adapter: str | None = "a", now: float = 0.0, **fields: Any) -> Decision:  # noqa: ANN401
    fields.setdefault("prompt_tokens", 500)
    job = Job("1", ref(adapter) if adapter else None, **fields)
    return Cost(Random(0)).place(job, fleet, now)


def chosen(decision: Decision) -> str | None:
    return decision.worker.id if decision.worker else None


def test_a_holder_wins_unless_it_is_much_busier() -> None:
    assert chosen(place(fleet_of(W(3, ("a",), ("a",)), W(0)))) == "w0"
    decision = place(fleet_of(W(60, ("a",), ("a",), limit=64), W(0, limit=64)))
    assert (chosen(decision), decision.reason) == ("w1", Reason.SPILL)


def test_of_equal_workers_the_one_with_less_to_do() -> None:
    assert chosen(place(fleet_of(W(2), W(1), W(3)), None)) == "w1"


def test_a_prompt_under_way_is_waited_for_or_avoided() -> None:
    fleet = fleet_of(W(0, ("a",)), W(0, ("a",)))
    first, _ = fleet
    fleet.begin_work(first, Job("0", prompt_tokens=5000), 0, 0.0)
    assert chosen(place(fleet)) == "w1"


def test_a_full_holder_is_waited_for_where_that_costs_less_than_a_load() -> None:
    fleet = fleet_of(W(0, ("a",)), W(3, ("b", "c"), ("b", "c"), limit=9, slots=4))
    holder = fleet.get("w0")
    assert holder is not None
    holder.busy_until = AHEAD_S + 0.01
    decision = place(fleet)
    assert decision.worker is None
    assert decision.reason is Reason.SATURATED
    assert decision.again_at == pytest.approx(0.01)
    assert ("w0", Drop.SATURATED) in decision.dropped
    holder.busy_until = AHEAD_S + 30.0
    assert chosen(place(fleet)) == "w1"


def test_a_worker_without_memory_for_the_context_is_left_out() -> None:
    fleet = fleet_of(W(1, ("a",)), W(1))
    holder = fleet.get("w0")
    assert holder is not None
    holder.kv_tokens = 10_000
    assert chosen(place(fleet, prompt_tokens=9_000)) == "w0"
    holder.context_tokens = 5_000
    decision = place(fleet, prompt_tokens=9_000)
    assert chosen(decision) == "w1"
    assert ("w0", Drop.NO_MEMORY) in decision.dropped


def test_host_memory_is_nearer_than_the_disk() -> None:
    fleet = fleet_of(W(0), W(0))
    second = fleet.get("w1")
    assert second is not None
    fleet.observe(second, Report(seq=1, host=(ref("a"),)))
    assert chosen(place(fleet)) == "w1"


def test_who_is_asked_for_often_is_not_evicted() -> None:
    fleet = fleet_of(W(0, ("often",), slots=1), W(0, ("seldom",), slots=1))
    for second in range(100):
        fleet.demand.arrived(ref("often"), float(second))
    fleet.demand.arrived(ref("seldom"), 0.0)
    decision = place(fleet, now=100.0)
    assert chosen(decision) == "w1"
    harms = {one.worker: one.harm_s for one in decision.considered}
    assert harms["w0"] > harms["w1"] >= 0


def test_a_cached_prompt_draws() -> None:
    fleet = fleet_of(W(1), W(0))
    prefix = tuple(Prefix(number, number * 4096) for number in (1, 2, 4))
    job: dict[str, Any] = {"prompt_tokens": 16_500, "prefix": prefix}
    assert chosen(place(fleet, None, **job)) == "w1"
    fleet.prefixes.sent(None, prefix, "w0")
    assert chosen(place(fleet, None, **job)) == "w0"
    fleet.prefixes.forget("w0")
    assert chosen(place(fleet, None, **job)) == "w1"


def test_a_slow_worker_is_known_by_its_pace() -> None:
    fleet = fleet_of(W(0), W(0))
    first = fleet.get("w0")
    assert first is not None
    for _ in range(100):
        fleet.learn_pace(first, 1.0)
    assert first.pace > 2
    assert chosen(place(fleet, None)) == "w1"


def test_the_last_slot_is_kept_for_an_adapter_without_a_holder() -> None:
    busy = W(2, ("b",), ("b",), limit=9, slots=2)
    held = fleet_of(W(4, ("a",), limit=4), busy)
    decision = place(held)
    assert (decision.worker, decision.reason) == (None, Reason.SATURATED)
    assert ("w1", Drop.LAST_SLOT) in decision.dropped
    assert chosen(place(fleet_of(W(4, limit=4), busy))) == "w1"


def test_a_surplus_holder_is_not_made() -> None:
    """Two holders where one is enough: a third needs a better reason than where two are too few."""
    workers = (W(9, ("a",), limit=64), W(9, ("a",), limit=64), W(2, limit=64))
    enough = fleet_of(*workers)
    too_few = fleet_of(*workers)
    too_few.targets[ref("a")] = 3
    stay = {
        name: next(one.stay_s for one in place(fleet).considered if one.worker == "w2")
        for name, fleet in (("enough", enough), ("too few", too_few))
    }
    assert stay["enough"] > stay["too few"] > 0


def test_the_terms_add_up_and_the_least_wins() -> None:
    fleet = fleet_of(W(3, ("a",)), W(1, ("b",), ("b",), slots=3), W(0))
    decision = place(fleet)
    assert len(decision.considered) == len(fleet)
    best = min(decision.considered, key=lambda one: one.total_s)
    assert chosen(decision) == best.worker
    assert decision.first_token_s == pytest.approx(best.wait_s + best.load_s + best.prefill_s)
    for one in decision.considered:
        terms = (one.wait_s, one.load_s, one.prefill_s, one.decode_s)
        assert min(terms) >= 0
        assert one.total_s == pytest.approx(sum(terms) + one.others_s + one.harm_s + one.stay_s)


def test_in_a_large_fleet_few_are_looked_at_and_the_holder_is_among_them() -> None:
    fleet = fleet_of(*(W(0, ("a",) if number == 70 else ()) for number in range(100)))
    decision = place(fleet)
    assert chosen(decision) == "w70"
    assert len(decision.considered) <= ALL_UP_TO


def test_in_a_large_fleet_the_last_slot_is_found() -> None:
    busy = W(1, ("b",), ("b",), slots=1)
    fleet = fleet_of(*[busy] * 60, W(0), *[busy] * 40)
    assert chosen(place(fleet)) == "w60"


def test_in_a_large_fleet_whose_slots_are_all_in_use_nobody_is_looked_at_for_nothing() -> None:
    fleet = fleet_of(*[W(1, ("b",), ("b",), slots=1)] * 100)
    decision = place(fleet)
    assert (decision.worker, decision.reason) == (None, Reason.NO_SLOT)
    assert len(decision.dropped) <= ALL_UP_TO


STATES = {
    "empty": W(0),
    "idle": W(0, ("b",), slots=1),
    "in use": W(1, ("b",), ("b",), slots=1),
    "holder": W(1, ("a", "c"), ("a", "c")),
    "overloaded holder": W(4, ("a",), ("a",)),
    "leaving": W(0, accepting=False),
}


@given(st.lists(st.sampled_from(sorted(STATES)), max_size=3 * ALL_UP_TO), st.integers(0, 9))
def test_in_a_fleet_of_any_size_a_job_waits_only_where_nobody_can_take_it(
    states: list[str], seed: int
) -> None:
    fleet = fleet_of(*(STATES[state] for state in states))
    decision = Cost(Random(seed)).place(Job("1", ref("a"), prompt_tokens=500), fleet, 0.0)
    able = [worker for worker in fleet.ready if worker.can_serve(ref("a"))]
    assert decision.worker in able if able else decision.worker is None
