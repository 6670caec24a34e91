"""The seed's rule as a table: who holds the adapter, who is how busy, who must be chosen and why."""

from random import Random

import pytest
from fleets import W, decide, fleet_of

from router.core.fleet import less_busy_of_two
from router.core.placement import Reason
from router.core.policies import POLICIES

CASES = [
    ("a holder that is busy but not overloaded wins over an idle worker",
     [W(3, ("a",)), W(0)], "a", {"w0"}, Reason.HOLDER),
    ("of two holders the less busy one",
     [W(3, ("a",)), W(1, ("a",)), W(0)], "a", {"w1"}, Reason.HOLDER),
    ("an overloaded holder is left out",
     [W(4, ("a",)), W(3, ("a",))], "a", {"w1"}, Reason.HOLDER),
    ("if every holder is overloaded, another that is not",
     [W(4, ("a",)), W(4, ("a",)), W(3)], "a", {"w2"}, Reason.SPILL),
    ("a holder that does not accept is left out",
     [W(0, ("a",), accepting=False), W(3)], "a", {"w1"}, Reason.SPILL),
    ("nobody holds it: of two the less busy one",
     [W(2), W(1)], "a", {"w1"}, Reason.COLD),
    ("equally busy: the one with slots left, rather than an eviction",
     [W(1, ("x", "y")), W(1)], "a", {"w1"}, Reason.COLD),
    ("a worker whose slots are all in use cannot take a cold adapter",
     [W(2, ("x", "y"), ("x", "y")), W(3, ("z",))], "a", {"w1"}, Reason.COLD),
    ("everyone is overloaded",
     [W(4, ("a",)), W(4)], "a", None, Reason.ALL_OVERLOADED),
    ("workers are free but no slot is",
     [W(2, ("x", "y"), ("x", "y"))], "a", None, Reason.NO_SLOT),
    ("nobody accepts",
     [W(0, accepting=False)], "a", None, Reason.NO_WORKER),
    ("nobody at all", [], "a", None, Reason.NO_WORKER),
    ("the base model alone: the less busy",
     [W(3), W(2)], None, {"w1"}, Reason.BASE),
    ("the base model alone needs no slot",
     [W(2, ("x", "y"), ("x", "y"))], None, {"w0"}, Reason.BASE),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("workers", "adapter", "chosen", "reason"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_affinity(
    workers: list[W], adapter: str | None, chosen: set[str] | None, reason: Reason, seed: int
) -> None:
    fleet = fleet_of(*workers)
    decision = decide(fleet, adapter, seed)
    assert decision.reason is reason
    assert (decision.worker.id in chosen) if decision.worker and chosen else chosen is None


def test_deciding_changes_nothing() -> None:
    fleet = fleet_of(W(1, ("a",)), W(0))
    before = [(w.in_flight, [s.adapter for s in w.slots]) for w in fleet]
    for adapter in ("a", "b", None):
        for policy in POLICIES:
            decide(fleet, adapter, 1, policy)
    assert [(w.in_flight, [s.adapter for s in w.slots]) for w in fleet] == before


def test_two_choices_are_two_different_workers_and_reach_all() -> None:
    fleet = fleet_of(W(), W(), W(), W())
    workers = list(fleet)
    rng = Random(3)
    drawn = {worker.id for _ in range(200) if (worker := less_busy_of_two(workers, rng))}
    assert drawn == {"w0", "w1", "w2", "w3"}
    busy = fleet_of(W(3), W(0))
    assert {less_busy_of_two(list(busy), rng) for _ in range(50)} == {busy.get("w1")}


def test_round_robin_takes_turns_and_skips_who_cannot() -> None:
    fleet = fleet_of(W(), W(), W(4))
    seen = []
    for _ in range(4):
        decision = decide(fleet, None, 0, "round_robin")
        assert decision.worker is not None
        seen.append(decision.worker.id)
        fleet.reserve(decision.worker, None)
    assert sorted(seen) == ["w0", "w0", "w1", "w1"]
    assert decide(fleet_of(W(4)), None, 0, "round_robin").reason is Reason.ALL_OVERLOADED
