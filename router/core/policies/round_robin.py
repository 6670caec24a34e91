"""Round robin: each worker in its turn, whatever it holds. The baseline that affinity must beat.

The turn is the number of jobs that the fleet has been given, so that the policy keeps no state.
A worker that is overloaded, or has no slot for the adapter, loses its turn to the next.
"""

from random import Random

from router.core.fleet import Fleet, Worker
from router.core.job import Job
from router.core.placement import Decision, Policy, Reason, nobody


class RoundRobin(Policy):
    """The rule above. It draws nothing at random."""

    def __init__(self, rng: Random) -> None:
        pass

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose the first worker that can serve, starting at the one whose turn it is."""
        workers = list(fleet)
        turn = sum(worker.completed + worker.in_flight for worker in workers)
        avoided: Worker | None = None
        for offset in range(len(workers)):
            worker = workers[(turn + offset) % len(workers)]
            if worker.ready_index < 0 or not worker.can_serve(job.adapter, job.tenant):
                continue
            if worker.id not in job.avoid:
                return Decision(worker, Reason.ROTATION)
            avoided = avoided or worker
        if avoided is not None:
            return Decision(avoided, Reason.ROTATION)
        return Decision(None, nobody(fleet, job.adapter))
