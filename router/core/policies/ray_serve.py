"""Ray Serve's rule for multiplexed models: holders once, then the fewest models, then anybody.

In this order, each time of two at random the one with the shorter queue that is not full:
  1. of the replicas that have the adapter or are loading it;
  2. if there is none, or both that were drawn are full, of those with the fewest adapters;
  3. if both of those are full, of all.
A job without an adapter goes by 3 alone.
Source: Ray Serve 2.60, `MultiplexMixin.apply_multiplex_routing` and `PowerOfTwoChoicesRequestRouter`
(python/ray/serve/_private/request_router/request_router.py and pow_2_router.py).
Given to it: the replicas' adapters as they are now, where Ray learns of them by a broadcast; and no
backoff, for where Ray asks again later, for 1 to 2 s, the next step is tried at once. "Full" is
`max_ongoing_requests`, which Serve LLM sets to 1e9: there a hot adapter never spills (ray#65691),
and here it does as soon as the router's bound is finite.
Bent: a worker that does not accept, failed the job, or has every slot in use is none of its replicas,
and the last step draws among those that have room. Cost: O(workers).
"""

from collections.abc import Sequence
from random import Random

from router.core.fleet import Fleet, Worker, two_of
from router.core.job import Job
from router.core.placement import Decision, Policy, decided, eligible, shorter_of_two


class RayServe(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        able = eligible(job, fleet)
        chosen: Worker | None = None
        if able and job.adapter is not None:
            holders = [worker for worker in fleet.holders(job.adapter) if _replica(worker, job)]
            chosen = self._attempt(holders)
            if chosen is None:
                replicas = [worker for worker in fleet if _replica(worker, job)]
                fewest = min((worker.slots.occupied for worker in replicas), default=0)
                chosen = self._attempt(
                    [worker for worker in replicas if worker.slots.occupied == fewest]
                )
        return decided(chosen or shorter_of_two(able, self._rng), job, fleet)

    def _attempt(self, candidates: Sequence[Worker]) -> Worker | None:
        """Draw two, full or not; the one with the shorter queue of those that are not full."""
        drawn = candidates if len(candidates) < 2 else two_of(candidates, self._rng)  # noqa: PLR2004
        return shorter_of_two([worker for worker in drawn if not worker.overloaded], self._rng)


def _replica(worker: Worker, job: Job) -> bool:
    """Whether Ray would count the worker among the replicas that it may ask."""
    return (
        worker.accepting
        and worker.id not in job.avoid
        and worker.can_serve(job.adapter, job.tenant)
    )
