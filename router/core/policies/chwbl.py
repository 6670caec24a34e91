"""Consistent hashing with bounded loads: an adapter has a home, and leaves it only when that is busy.

  1. each worker has 256 points on a ring of 64-bit hashes, and the adapter is a point on it;
  2. beginning there, the first worker in the ring's order whose load, this job counted in, is at most
     1.25 times the mean, rounded up;
  3. if none that can take the job is within the bound, the first that can.
A job without an adapter is hashed by its id, which spreads it.
Source: Mirrokni, Thorup, Zadimoghaddam, "Consistent hashing with bounded loads" (arXiv:1608.01350),
whose capacity is rounded up, as here; the 256 points, 1.25 and step 3 are KubeAI's
(internal/loadbalancer/balance_chwbl.go), which does not round up, hashes with xxhash, and adds the
prompt's prefix to the key, which the router does not read.
Bent: KubeAI passes by whoever does not hold the adapter; here whoever can load it will do, or nothing
would ever be loaded. Whoever the router's bounds leave out (`placement.eligible`) is passed by in the
ring, and does count in the mean as long as it accepts.
Cost: O(workers), and O(256 workers x log) when one comes or goes.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import Job
from router.core.placement import Decision, Policy, decided, eligible
from router.core.policies.hashing import stable_hash

POINTS: Final = 256
LOAD_FACTOR: Final = 1.25


class Chwbl(Policy):
    """The rule above. It draws nothing at random, and keeps the ring of the last fleet it saw."""

    def __init__(self, rng: Random) -> None:
        del rng
        self._members: tuple[str, ...] = ()
        self._points: list[int] = []
        self._owners: list[str] = []

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        able = {worker.id: worker for worker in eligible(job, fleet)}
        if not able:
            return decided(None, job, fleet)
        self._settle(tuple(worker.id for worker in fleet))
        loads = [worker.ongoing for worker in fleet if worker.accepting]
        bound = math.ceil(LOAD_FACTOR * (sum(loads) + 1) / len(loads))
        first: Worker | None = None
        for worker_id in self._around(job.adapter.name if job.adapter else job.id):
            worker = able.get(worker_id)
            if worker is None:
                continue
            if worker.ongoing + 1 <= bound:
                return decided(worker, job, fleet)
            first = first or worker
        return decided(first, job, fleet)

    def _around(self, key: str) -> Iterator[str]:
        """Each worker once, in the ring's order from the key's point on."""
        seen: dict[str, None] = {}
        start = bisect_left(self._points, stable_hash(key))
        for offset in range(len(self._points)):
            owner = self._owners[(start + offset) % len(self._owners)]
            if owner not in seen:
                seen[owner] = None
                yield owner
                if len(seen) == len(self._members):
                    return

    def _settle(self, members: tuple[str, ...]) -> None:
        """Make the ring anew where the fleet has changed."""
        if members == self._members:
            return
        self._members = members
        ring = sorted(
            (stable_hash(f"{member}#{point}"), member)
            for member in members
            for point in range(POINTS)
        )
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]
