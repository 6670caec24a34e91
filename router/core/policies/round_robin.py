"""Round robin: each worker in its turn, whatever it holds. The baseline that affinity must beat.

The turn is the number of jobs that the fleet has been given, so that the policy keeps no state.
A worker that is overloaded, or has no slot for the adapter, loses its turn to the next.
"""

from random import Random

from router.core.fleet import Fleet, Worker
from router.core.job import Job
from router.core.placement import Decision, Reason, nobody


def place(job: Job, fleet: Fleet, rng: Random) -> Decision:  # noqa: ARG001  (the shape of a Policy)
    """Choose the first worker that can serve, starting at the one whose turn it is."""
    workers = list(fleet)
    turn = sum(worker.completed + worker.in_flight for worker in workers)
    avoided: Worker | None = None
    for offset in range(len(workers)):
        worker = workers[(turn + offset) % len(workers)]
        if worker.ready_index < 0 or not worker.can_serve(job.adapter):
            continue
        if worker.id not in job.avoid:
            return Decision(worker, Reason.ROTATION)
        avoided = avoided or worker
    if avoided is not None:
        return Decision(avoided, Reason.ROTATION)
    return Decision(None, nobody(fleet, job.adapter))
