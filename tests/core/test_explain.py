from random import Random

import pytest
from fleets import W, fleet_of
from harness import ref

from router.core.explain import DROPS, REASONS, explain, in_one_line
from router.core.job import Job
from router.core.placement import Considered, Decision, Drop, Reason
from router.core.policies import POLICIES

JOB = Job("7", ref("a"))


def considered(worker: str, load_s: float) -> Considered:
    return Considered(worker, 0.001, load_s, 0.02, 0.3, 0.004, 0.0, 0.0)


def decision() -> Decision:
    fleet = fleet_of(W(), W(), W())
    chosen = next(worker for worker in fleet if worker.id == "w1")
    return Decision(
        chosen,
        Reason.HOLDER,
        (("w2", Drop.SATURATED),),
        (considered("w0", 0.5), considered("w1", 0.0)),
        None,
        0.021,
    )


def test_every_reason_and_drop_has_its_words() -> None:
    assert set(REASONS) == set(Reason)
    assert set(DROPS) == set(Drop)


def test_the_cheapest_stands_first_and_the_chosen_is_marked() -> None:
    assert explain(JOB, decision()) == [
        "request 7 for base:a goes to w1: it holds the adapter, or is loading it (holder)",
        "its first token is expected after 21.0 ms",
        "  ms      wait      load   prefill    decode    others      harm      stay     total",
        "> w1       1.0       0.0      20.0     300.0       4.0       0.0       0.0     325.0",
        "  w0       1.0     500.0      20.0     300.0       4.0       0.0       0.0     825.0",
        "left out: w2: has prompts enough ahead (saturated)",
    ]


def test_one_line_has_the_chosen_first_and_is_one_line() -> None:
    assert in_one_line(JOB, decision(), ref("b")) == (
        "id=7 adapter=a worker=w1 reason=holder evicting=b "
        "w1=325.0(wait:1.0,load:0.0,prefill:20.0,decode:300.0,others:4.0,harm:0.0,stay:0.0) "
        "w0=825.0(wait:1.0,load:500.0,prefill:20.0,decode:300.0,others:4.0,harm:0.0,stay:0.0) "
        "w2=saturated"
    )


@pytest.mark.parametrize("reason", [Reason.NO_SLOT, Reason.SATURATED, Reason.NO_WORKER])
def test_who_waits_hears_why(reason: Reason) -> None:
    waits = Decision(None, reason)
    assert explain(JOB, waits) == [f"request 7 for base:a waits: {REASONS[reason]} ({reason})"]
    assert in_one_line(Job("8"), waits) == f"id=8 adapter=- worker=- reason={reason}"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_can_be_explained(policy: str) -> None:
    fleet = fleet_of(W(holds=("a",)), W(holds=("b", "c"), used=("b",)), W(accepting=False))
    made = POLICIES[policy](Random(1)).place(JOB, fleet, 0.0)
    lines = explain(JOB, made)
    assert made.worker is not None
    assert lines[0].startswith(f"request 7 for base:a goes to {made.worker.id}: ")
    assert sum(line.startswith("> ") for line in lines) == bool(made.considered)
