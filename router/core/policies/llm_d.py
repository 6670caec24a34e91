"""llm-d's weighted scorers: the adapter, the queue and the KV cache each give a mark, the sum decides.

  1. adapter, weight 1: 1.0 where it is resident, else 0.8 where a slot is free, else 0.6 where it is
     waiting (here: loading), else 0;
  2. queue, weight 2: requests waiting in the engine, (most - own) / (most - fewest) over those that can
     take the job, 1.0 if all are equal;
  3. KV cache, weight 2: 1 - the share of it that is used;
  4. the highest sum wins, ties by the generator.
A job without an adapter goes by 2 and 3.
Source: llm-d-router (pkg/epp/framework/plugins/scheduling/scorer/{loraaffinity,queuedepth,
kvcacheutilization}); the weights of 2 and 3 are those of its default profile
(pkg/epp/config/loader/defaults.go), which has no adapter scorer: its weight is what that file gives to
a scorer without one. The default profile's prefix scorer (weight 3) is left out: prompts are not the
router's to read.
Given to it: true residency, where it reads `vllm:lora_requests_info`, which lists adapters in flight
only (llm-d-router#2605) and never gives 0.6. Queue and KV use are the last report's, as it has them:
it keeps no count of its own, so a burst between two reports sees the same marks.
Its bounds are the router's (`placement.eligible`). Cost: O(workers).
"""

from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job
from router.core.placement import Decision, Policy, decided, eligible
from router.core.residency import LOADING, RESIDENT

ADAPTER_WEIGHT: Final = 1.0
QUEUE_WEIGHT: Final = 2.0
KV_WEIGHT: Final = 2.0
ACTIVE: Final = 1.0
FREE_SLOT: Final = 0.8
WAITING: Final = 0.6


class LlmD(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:  # noqa: ARG002
        """Choose by the rule above."""
        able = eligible(job, fleet)
        if not able:
            return decided(None, job, fleet)
        queues = [worker.report.waiting for worker in able]
        fewest, most = min(queues), max(queues)
        marks = []
        for worker in able:
            queue = (most - worker.report.waiting) / (most - fewest) if most > fewest else 1.0
            mark = QUEUE_WEIGHT * queue + KV_WEIGHT * (1.0 - worker.report.kv_usage)
            if job.adapter is not None:
                mark += ADAPTER_WEIGHT * adapter_score(worker, job.adapter)
            marks.append(mark)
        best = max(marks)
        tied = [worker for worker, mark in zip(able, marks, strict=True) if mark == best]
        chosen = tied[int(self._rng.random() * len(tied))] if len(tied) > 1 else tied[0]
        return decided(chosen, job, fleet)


def adapter_score(worker: Worker, adapter: AdapterRef) -> float:
    """The mark of step 1."""
    slot = worker.slots.get(adapter)
    if slot is not None and slot.phase is RESIDENT:
        return ACTIVE
    if worker.slots.occupied < worker.slots.capacity:
        return FREE_SLOT
    return WAITING if slot is not None and slot.phase is LOADING else 0.0
