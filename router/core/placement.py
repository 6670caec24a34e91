"""The answer to "which worker?", with its reasons, and the shape of whoever answers.

A policy is a pure function: it reads the fleet and changes nothing. Whoever waits is in router.py.
The same `Decision` is logged, counted, hashed into a replay's digest and read by the tests.
"""

from enum import StrEnum
from random import Random
from typing import Protocol

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
    NO_WORKER = "no_worker"  # nobody accepts jobs


class Drop(StrEnum):
    """Why a worker that seemed the natural choice was left out."""

    OVERLOADED = "overloaded"
    NOT_ACCEPTING = "not_accepting"
    AVOIDED = "avoided"


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a job goes and why. `worker` is None where it has to wait."""

    worker: Worker | None
    reason: Reason
    dropped: tuple[tuple[str, Drop], ...] = ()


class Policy(Protocol):
    """Decides, and changes nothing. Capacity is reserved by the caller, before any await."""

    def __call__(self, job: Job, fleet: Fleet, rng: Random) -> Decision:
        """Return the worker for the job, or None and why it must wait."""


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
