"""Least loaded: the worker with the least in flight, whatever it holds.

In this order:
  1. of those that can take the job, the one with the fewest jobs in flight;
  2. of several, one at random;
  3. if nobody can take it, nobody: the job waits.
Source: join the shortest queue, the usual rule of load balancers (`least_conn` of nginx).
The load is the router's own count, so a burst is spread even where reports are late.
Its bounds are the router's (`placement.eligible`). Cost: O(workers).
"""

from random import Random

from router.core.fleet import Fleet
from router.core.job import Job
from router.core.placement import Decision, Policy, decided, eligible, least_busy


class LeastLoaded(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        return decided(least_busy(eligible(job, fleet), self._rng), job, fleet)
