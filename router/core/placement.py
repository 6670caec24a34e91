"""The answer to "which worker?", with its reasons, and the shape of whoever answers.

A policy reads the fleet and changes nothing of it. Whoever waits is in router.py.
The same `Decision` is logged, counted, hashed into a replay's digest and read by the tests.
"""

from collections.abc import Sequence
from enum import StrEnum
from random import Random

import msgspec

from router.core.fleet import Fleet, Worker, less_busy_of_two, two_of
from router.core.job import AdapterRef, Job


class Reason(StrEnum):
    """Why a worker was chosen, or none."""

    HOLDER = "holder"  # it holds the adapter, or is loading it
    SPILL = "spill"  # others hold it, and are overloaded or not what the policy goes by
    COLD = "cold"  # nobody holds it
    BASE = "base"  # no adapter was asked for
    ROTATION = "rotation"  # its turn
    ALL_OVERLOADED = "all_overloaded"
    NO_SLOT = "no_slot"  # workers are free, but every slot of theirs is in use or loading
    SATURATED = "saturated"  # those that could take it have work enough for the moment
    NO_WORKER = "no_worker"  # nobody accepts jobs


class Drop(StrEnum):
    """Why a worker that seemed the natural choice was left out."""

    OVERLOADED = "overloaded"
    NOT_ACCEPTING = "not_accepting"
    AVOIDED = "avoided"
    SATURATED = "saturated"
    NO_MEMORY = "no_memory"
    NO_SLOT = "no_slot"
    LAST_SLOT = "last_slot"  # kept for an adapter that nobody holds


class Considered(msgspec.Struct, frozen=True, gc=False):
    """What placing the job on one worker was expected to cost, in seconds, term by term.

    `wait_s` until work that is there already lets it begin, `load_s` until its adapter is resident,
    `prefill_s` for its prompt (less what is cached), `decode_s` for its answer in that batch,
    `others_s` what those who run there lose by it, `harm_s` what the next user of the evicted adapter
    loses (0 where the other terms had decided already), `stay_s` what speaks for staying where the
    adapter is.
    """

    worker: str
    wait_s: float
    load_s: float
    prefill_s: float
    decode_s: float
    others_s: float
    harm_s: float
    stay_s: float

    @property
    def first_token_s(self) -> float:
        """After how long its first token is expected."""
        return self.wait_s + self.load_s + self.prefill_s

    @property
    def total_s(self) -> float:
        """The cost: the least one wins."""
        return (
            self.wait_s
            + self.load_s
            + self.prefill_s
            + self.decode_s
            + self.others_s
            + self.harm_s
            + self.stay_s
        )


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a job goes and why. `worker` is None where it has to wait.

    `again_at` is when, in loop time, waiting alone will have changed that, where it will;
    `first_token_s` after how long its first token is expected, where the policy predicts that.
    """

    worker: Worker | None
    reason: Reason
    dropped: tuple[tuple[str, Drop], ...] = ()
    considered: tuple[Considered, ...] = ()
    again_at: float | None = None
    first_token_s: float | None = None


class Policy:
    """Decides, and changes nothing of the fleet. The caller reserves capacity, before any await.

    What it remembers for itself (arrivals, a plan) it keeps in the instance: one for each router.
    `locality_tokens` is how much of others' work a waiting job may overtake because its adapter is at
    hand (see admission.py); `replicates` whether adapters are loaded before they are asked for.
    """

    locality_tokens: float = 0.0
    replicates: bool = False

    def arrived(self, job: Job, fleet: Fleet, now: float) -> None:
        """A job has come; told once of each, before it is placed or waits."""

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:
        """The worker for the job, or None and why it must wait."""
        raise NotImplementedError

    def has_memory(self, job: Job, worker: Worker, fleet: Fleet) -> bool:  # noqa: ARG002
        """Whether the job's context fits into the worker's memory now; yes, where it is not known."""
        return True

    def opens_at(self, worker: Worker, now: float) -> float:  # noqa: ARG002
        """The loop time from which the worker is to be sent more: `now`, unless it is full."""
        return now


def with_room(fleet: Fleet, job: Job, rng: Random) -> Worker | None:
    """A less busy worker that is not overloaded and can give the adapter a slot.

    Two draws first; only where neither will do are all in reach looked at.
    """
    ready = fleet.ready
    drawn = less_busy_of_two(ready, rng)
    if drawn is None or (drawn.can_serve(job.adapter, job.tenant) and drawn.id not in job.avoid):
        return drawn
    return less_busy_of_two(eligible(job, fleet), rng)


def eligible(job: Job, fleet: Fleet) -> list[Worker]:
    """Who may take the job under any policy, in no order that means anything. O(those in reach).

    The bounds are the router's: the worker accepts, is not overloaded, and holds the adapter or can
    give it a slot. Those that failed the job are left out, unless nobody else is left.
    """
    able = [
        worker
        for worker in fleet.within_reach(job.adapter)
        if worker.can_serve(job.adapter, job.tenant)
    ]
    if job.avoid:
        able = [worker for worker in able if worker.id not in job.avoid] or able
    return able


def fit_holders(
    job: Job, holders: Sequence[Worker]
) -> tuple[list[Worker], tuple[tuple[str, Drop], ...]]:
    """Of those that hold the job's adapter, who can take it, and why the others cannot."""
    fit: list[Worker] = []
    left_out: list[tuple[str, Drop]] = []
    for worker in holders:
        if worker.id in job.avoid:
            left_out.append((worker.id, Drop.AVOIDED))
        elif worker.ready_index >= 0:
            fit.append(worker)
        else:
            drop = Drop.OVERLOADED if worker.accepting else Drop.NOT_ACCEPTING
            left_out.append((worker.id, drop))
    return fit, tuple(left_out)


def decided(worker: Worker | None, job: Job, fleet: Fleet) -> Decision:
    """The decision for a worker that was chosen by a rule that gives no reasons. O(holders).

    The reason says what the choice means for the adapter: it goes to a holder, or past them.
    """
    if job.adapter is None:
        return Decision(worker, Reason.BASE if worker else nobody(fleet, None))
    holders = fleet.holders(job.adapter)
    _, left_out = fit_holders(job, holders)
    if worker is None:
        return Decision(None, nobody(fleet, job.adapter), left_out)
    if worker in holders:
        # One that had failed the job may have been all that was left.
        dropped = tuple(drop for drop in left_out if drop[0] != worker.id)
        return Decision(worker, Reason.HOLDER, dropped)
    return Decision(worker, Reason.SPILL if holders else Reason.COLD, left_out)


def least_busy(workers: Sequence[Worker], rng: Random) -> Worker | None:
    """The one with the least in flight, ties by the generator; None if there is none."""
    if not workers:
        return None
    least = min(worker.in_flight for worker in workers)
    tied = [worker for worker in workers if worker.in_flight == least]
    return tied[int(rng.random() * len(tied))] if len(tied) > 1 else tied[0]


def shorter_of_two(workers: Sequence[Worker], rng: Random) -> Worker | None:
    """Of two at random the one with less in flight, else the first drawn: it knows of no slots."""
    if len(workers) < 2:  # noqa: PLR2004
        return workers[0] if workers else None
    one, other = two_of(workers, rng)
    return other if other.in_flight < one.in_flight else one


def nobody(fleet: Fleet, adapter: AdapterRef | None) -> Reason:
    """Why no worker can take a job now."""
    if fleet.ready and adapter is not None:
        return Reason.NO_SLOT
    if any(worker.accepting for worker in fleet):
        return Reason.ALL_OVERLOADED
    return Reason.NO_WORKER
