"""Power of two choices: of two workers at random the less busy one, whatever they hold.

In this order:
  1. of those that can take the job, draw two different ones, each pair as likely;
  2. take the one with fewer jobs in flight, the first drawn if they are equal;
  3. if nobody can take it, nobody: the job waits.
Source: Mitzenmacher, "The power of two choices in randomized load balancing" (2001).
Its bounds are the router's (`placement.eligible`): the draw is among those that they leave, so that a
full worker is never drawn. Cost: O(workers), for the bounds.
"""

from random import Random

from router.core.fleet import Fleet
from router.core.job import Job
from router.core.placement import Decision, Policy, decided, eligible, shorter_of_two


class PowerOfTwo(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        return decided(shorter_of_two(eligible(job, fleet), self._rng), job, fleet)
