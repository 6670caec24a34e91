"""The answer to "which worker?", with its reasons, and the shape of whoever answers.

A policy reads the fleet and changes nothing of it. Whoever waits is in router.py.
The same `Decision` is logged, counted, hashed into a replay's digest and read by the tests.
"""

from enum import StrEnum
from random import Random

import msgspec

from router.core.fleet import Fleet, Worker, less_busy_of_two
from router.core.job import AdapterRef, Job


class Reason(StrEnum):
    """Why a worker was chosen, or none."""

    HOLDER = "holder"  # it holds the adapter, or is loading it
    SPILL = "spill"  # others hold it and are overloaded
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
    NO_SLOT = "no_slot"


class Considered(msgspec.Struct, frozen=True, gc=False):
    """What placing the job on one worker was expected to cost, in seconds, term by term.

    `wait_s` until work that is there already lets it begin, `load_s` until its adapter is resident,
    `compute_s` for its prompt (less what is cached) and its answer in that batch, `others_s` what those
    who run there lose by it, `harm_s` what the next user of the evicted adapter loses, `stay_s` what
    speaks for staying where the adapter is.
    """

    worker: str
    wait_s: float
    load_s: float
    compute_s: float
    others_s: float
    harm_s: float
    stay_s: float

    @property
    def total_s(self) -> float:
        """The cost: the least one wins."""
        return (
            self.wait_s + self.load_s + self.compute_s + self.others_s + self.harm_s + self.stay_s
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

    def opens_at(self, worker: Worker, now: float) -> float:  # noqa: ARG002
        """The loop time from which the worker is to be sent more: `now`, unless it is full."""
        return now


def with_room(fleet: Fleet, job: Job, rng: Random) -> Worker | None:
    """A less busy worker that is not overloaded and can give the adapter a slot.

    Two draws first; only where neither will do are all looked at.
    """
    ready = fleet.ready
    drawn = less_busy_of_two(ready, rng)
    if drawn is None or (drawn.can_serve(job.adapter) and drawn.id not in job.avoid):
        return drawn
    able = [worker for worker in ready if worker.can_serve(job.adapter)]
    if job.avoid:
        able = [worker for worker in able if worker.id not in job.avoid] or able
    return less_busy_of_two(able, rng)


def nobody(fleet: Fleet, adapter: AdapterRef | None) -> Reason:
    """Why no worker can take a job now."""
    if fleet.ready and adapter is not None:
        return Reason.NO_SLOT
    if any(worker.accepting for worker in fleet):
        return Reason.ALL_OVERLOADED
    return Reason.NO_WORKER
