"""Affinity, the seed's rule: go where the adapter is, unless everyone there is overloaded.

In this order:
  1. of the workers that hold the adapter, or are loading it, and are not overloaded, the less busy
     of two random ones;
  2. if every holder is overloaded, a less busy worker that is not: it will load the adapter;
  3. if nobody holds it, the same, by power of two choices;
  4. if everyone is overloaded, nobody: the job waits.
A job for the base model alone goes by power of two choices.
Pure: reads the fleet, changes nothing. Cost: O(holders), and O(1) when there are none.
"""

from random import Random
from typing import Final

from router.core.fleet import Fleet, less_busy_of_two
from router.core.job import Job
from router.core.placement import (
    Decision,
    Drop,
    Policy,
    Reason,
    fit_holders,
    nobody,
    with_room,
)

# By this name the hot path has it at a tenth of the cost (Python 3.11).
HOLDER: Final = Reason.HOLDER


class Affinity(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        if job.adapter is None:
            worker = with_room(fleet, job, self._rng)
            return Decision(worker, Reason.BASE if worker else nobody(fleet, None))
        holders = fleet.holders(job.adapter)
        dropped: tuple[tuple[str, Drop], ...] = ()
        if holders:
            fit, dropped = fit_holders(job, holders)
            if chosen := less_busy_of_two(fit, self._rng):
                return Decision(chosen, HOLDER, dropped)
        if worker := with_room(fleet, job, self._rng):
            return Decision(worker, Reason.SPILL if holders else Reason.COLD, dropped)
        return Decision(None, nobody(fleet, job.adapter), dropped)
