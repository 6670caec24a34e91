"""SMG's cache-aware rule, with adapters for prefixes: affinity until the fleet is out of balance.

In this order:
  1. if, in flight, the most exceeds the fewest by more than 64 and is more than 1.5 times it, the least
     loaded worker;
  2. else the worker that had the adapter last, if it still holds it, or another that does, the least
     loaded of them;
  3. else the worker that had it last, though it was evicted there;
  4. else the least loaded worker.
A job without an adapter goes by 4.
Source: SMG, formerly sglang-router (sgl-model-gateway/src/policies/cache_aware.rs), its thresholds the
default of `--policy cache_aware`: balance_abs_threshold 64, balance_rel_threshold 1.5.
Changed: its tree of prompts, which remembers who had a prefix, remembers who had an adapter, the last
65,536 of them; a prefix that matches less than the cache threshold is an adapter that nobody had.
Given to it: true residency (step 2), which it lacks: its tree forgets by size, not by eviction.
Bent: who the router's bounds leave out (`placement.eligible`) is passed by, and the least loaded takes
the job where SMG would take the first healthy worker. With `max_ongoing_requests` of 64 or less step 1
never comes to pass, and a holder spills only when it is full. Cost: O(workers).
"""

from collections import OrderedDict
from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job
from router.core.placement import Decision, Policy, decided, eligible, least_busy

BALANCE_ABS: Final = 64
BALANCE_REL: Final = 1.5
REMEMBERED: Final = 65_536  # adapters whose last worker is kept


class Smg(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._last: OrderedDict[AdapterRef, str] = OrderedDict()

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        able = eligible(job, fleet)
        chosen = self._choose(job.adapter, able, fleet)
        if chosen is not None and job.adapter is not None:
            self._last[job.adapter] = chosen.id
            self._last.move_to_end(job.adapter)
            if len(self._last) > REMEMBERED:
                self._last.popitem(last=False)
        return decided(chosen, job, fleet)

    def _choose(
        self, adapter: AdapterRef | None, able: list[Worker], fleet: Fleet
    ) -> Worker | None:
        if adapter is None or unbalanced(fleet):
            return least_busy(able, self._rng)
        held_by = fleet.holders(adapter)
        holders = [worker for worker in able if worker in held_by]
        last = self._last.get(adapter)
        for worker in holders or able:
            if worker.id == last:
                return worker
        return least_busy(holders or able, self._rng)


def unbalanced(fleet: Fleet) -> bool:
    """Step 1: whether load comes before affinity."""
    loads = [worker.ongoing for worker in fleet if worker.accepting]
    if not loads:
        return False
    fewest, most = min(loads), max(loads)
    return most - fewest > BALANCE_ABS and most > BALANCE_REL * fewest
