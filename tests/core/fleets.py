"""Fleets in the state that a table's row describes, and what a policy decides there."""

from dataclasses import dataclass
from random import Random

from harness import ref

from router.core.fleet import Fleet, Hold, Report, Worker
from router.core.job import Job
from router.core.placement import Decision
from router.core.policies import POLICIES


@dataclass
class W:
    """One worker: what is in flight there, what it holds, what of that is in use, its report."""

    in_flight: int = 0
    holds: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    accepting: bool = True
    limit: int = 4
    slots: int = 2
    waiting: int = 0
    kv_usage: float = 0.0


def fleet_of(*workers: W) -> Fleet:
    fleet = Fleet("base")
    for number, spec in enumerate(workers):
        worker = Worker(f"w{number}", max_ongoing=spec.limit, slots=spec.slots)
        fleet.add(worker)
        for name in spec.holds:
            slot, begin = fleet.reserve(worker, ref(name))
            assert slot is not None
            if begin:
                fleet.finish_load(worker, slot, 0)
            if name not in spec.used:
                fleet.release(worker, slot)
        for name in spec.loading:
            fleet.reserve(worker, ref(name))
        worker.report = Report(waiting=spec.waiting, kv_usage=spec.kv_usage)
        for _ in range(spec.in_flight - worker.in_flight):
            fleet.reserve(worker, None)
        fleet.hold(worker, Hold.SILENT, held=not spec.accepting)
    return fleet


def decide(
    fleet: Fleet,
    adapter: str | None,
    seed: int,
    policy: str = "affinity",
    avoid: tuple[str, ...] = (),
) -> Decision:
    """What a policy without a past decides."""
    job = Job("1", ref(adapter) if adapter else None, avoid=avoid)
    return POLICIES[policy](Random(seed)).place(job, fleet, 0.0)
