"""Cost, the default: the worker on which this job costs everybody the fewest seconds.

For each worker that could take the job, in seconds:

    wait     until the prompts that were sent there before are computed
  + load     until its adapter is resident: 0, what is left of a load, or that of the tier it is in
  + compute  its prompt, less what is cached there, and its answer at the pace of that batch
  + others   what those who run there lose: the stall of a load, its prompt, a slower batch
  + harm     the chance that the evicted adapter is asked for before it would have left anyway, times
             its reload; less where others hold it too
  + stay     hysteresis: what a worker that does not hold the adapter must be better by, the more so
             where it has as many holders as its traffic needs (see replicas.py)

and the least wins. `wait` and `compute` begin with what has been dispatched a moment ago, so a burst
does not pile up. A worker with more than `AHEAD_S` of prompts ahead, or no memory for the job's
context, is not sent more: the rest waits in the router, where it can still go elsewhere, be ordered
fairly, or be told in time that its deadline would be missed.

Terms: predicted wait as in Llumnix and Mooncake; the batch's slowdown by its distinct adapters as in
CaraServe's rank-aware scheduling; the residence time of an idle slot is Che's characteristic time.
Pure: reads the fleet, changes nothing. Cost: O(candidates), which are the holders, those with the
adapter in host memory and a few others, at most `CANDIDATES_MAX`.
"""

from collections.abc import Sequence
from math import exp, inf
from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import Job
from router.core.placement import Considered, Decision, Drop, Policy, Reason, nobody
from router.core.residency import LOADING, RESIDENT
from router.core.timing import Tier

ALL_UP_TO: Final = 8  # workers; beyond, some are drawn
CANDIDATES_MAX: Final = 12
HOLDERS_MAX: Final = 6
DRAWN: Final = 4
AHEAD_S: Final = 0.25
KV_SHARE: Final = 0.95
OTHERS_WEIGHT: Final = 0.5
STAY_S: Final = 0.02
SPREAD_S: Final = 0.5
DISK: Final = Tier.DISK
LOCALITY_TOKENS: Final = 32768.0


class Cost(Policy):
    """The rule above."""

    locality_tokens = LOCALITY_TOKENS
    replicates = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def opens_at(self, worker: Worker, now: float) -> float:
        """When the prompts ahead are down to what keeps the engine busy."""
        at = worker.busy_until - AHEAD_S
        return max(at, now)

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:
        """Choose by the rule above."""
        adapter = job.adapter
        learned = fleet.learned
        times = learned.times
        output = learned.expected_output(job.max_output_tokens)
        lora = adapter is not None
        prefill_per_token_s = times.prefill_s(1, lora=lora)
        holders = fleet.holders(adapter) if adapter is not None else ()
        target = fleet.targets.get(adapter, 1) if adapter is not None else 0
        cached = fleet.prefixes.cached_tokens(adapter, job.prefix) if job.prefix else {}
        dropped: list[tuple[str, Drop]] = []
        considered: list[Considered] = []
        best: Worker | None = None
        best_s = best_first_s = inf
        again_at = inf
        no_slot = False
        spare: Worker | None = None
        for worker in self._candidates(job, fleet, holders):
            if worker.ready_index < 0:
                dropped.append(
                    (worker.id, Drop.OVERLOADED if worker.accepting else Drop.NOT_ACCEPTING)
                )
                continue
            slots = worker.slots
            slot = slots.get(adapter) if adapter is not None else None
            if adapter is not None and not slots.can_serve(adapter):
                no_slot = True
                dropped.append((worker.id, Drop.NO_SLOT))
                continue
            wait_s = worker.busy_until - now
            if wait_s > AHEAD_S:
                again_at = min(again_at, worker.busy_until - AHEAD_S)
                dropped.append((worker.id, Drop.SATURATED))
                continue
            running = worker.in_flight
            context = worker.context_tokens
            hit = cached.get(worker.id, 0)
            need = job.prompt_tokens - hit + output
            if worker.kv_tokens and running and context + need > KV_SHARE * worker.kv_tokens:
                dropped.append((worker.id, Drop.SATURATED))
                again_at = min(again_at, now + 1.0)
                continue
            if worker.id in job.avoid:
                spare = worker
                dropped.append((worker.id, Drop.AVOIDED))
                continue
            wait_s = max(wait_s, 0.0)
            before = slots.in_use
            distinct = before
            load_s = stall_s = harm_s = stay_s = 0.0
            if adapter is not None:
                if slot is None:
                    tier = fleet.tier(worker, adapter)
                    load_s = learned.load_s(tier)
                    stall_s = times.load_host_s if tier is Tier.HOST else times.load_disk_s
                    stay_s = STAY_S
                    if len(holders) >= target > 0:
                        stay_s += SPREAD_S
                    victim = slots.victim()
                    if victim is not None:
                        rate = fleet.demand.rate(victim.adapter, now)
                        if rate > 0.0:
                            elsewhere = len(fleet.holders(victim.adapter))
                            soon = 1.0 - exp(-rate * fleet.stay_s(now))
                            reload_s = learned.load_s(DISK) + OTHERS_WEIGHT * running * stall_s
                            harm_s = soon * reload_s / elsewhere if elsewhere else soon * reload_s
                    distinct += 1
                else:
                    if slot.phase is LOADING:
                        load_s = max(0.0, slot.ready_at - now)
                    if not slot.users:
                        distinct += 1
            pace = worker.pace
            prefill_s = (job.prompt_tokens - hit) * prefill_per_token_s * pace
            step_s = times.step_s(running + 1, distinct, context + need) * pace
            compute_s = prefill_s + output * step_s
            others_s = 0.0
            if running:
                slower_s = step_s - times.step_s(running, before, context) * pace
                others_s = OTHERS_WEIGHT * running * (stall_s + prefill_s + output * slower_s)
            total_s = wait_s + load_s + compute_s + others_s + harm_s + stay_s
            considered.append(
                Considered(worker.id, wait_s, load_s, compute_s, others_s, harm_s, stay_s)
            )
            if total_s < best_s:
                best, best_s = worker, total_s
                best_first_s = wait_s + load_s + prefill_s + step_s
        return self._decided(
            job, fleet, best or spare, dropped, considered, again_at, best_first_s, no_slot=no_slot
        )

    def _decided(
        self,
        job: Job,
        fleet: Fleet,
        worker: Worker | None,
        dropped: list[tuple[str, Drop]],
        considered: list[Considered],
        again_at: float,
        first_token_s: float,
        *,
        no_slot: bool,
    ) -> Decision:
        left_out, looked_at = tuple(dropped), tuple(considered)
        adapter = job.adapter
        if worker is None:
            reason = nobody(fleet, adapter)
            if again_at < inf:
                return Decision(None, Reason.SATURATED, left_out, looked_at, again_at)
            if reason is Reason.NO_SLOT and not no_slot:
                reason = Reason.SATURATED
            return Decision(None, reason, left_out, looked_at)
        if adapter is None:
            reason = Reason.BASE
        else:
            slot = worker.slots.get(adapter)
            if slot is not None and (slot.phase is RESIDENT or slot.phase is LOADING):
                reason = Reason.HOLDER
            else:
                reason = Reason.SPILL if fleet.holders(adapter) else Reason.COLD
        first = first_token_s if first_token_s < inf else None
        return Decision(worker, reason, left_out, looked_at, None, first)

    def _candidates(self, job: Job, fleet: Fleet, holders: Sequence[Worker]) -> list[Worker]:
        """Whom to look at: all of a small fleet; of a large one the holders and some others."""
        if len(fleet) <= ALL_UP_TO:
            return list(fleet)
        rng, ready = self._rng, fleet.ready
        chosen: dict[str, Worker] = {}
        if len(holders) > HOLDERS_MAX:
            first = int(rng.random() * len(holders))
            for step in range(HOLDERS_MAX):
                worker = holders[(first + step) % len(holders)]
                chosen[worker.id] = worker
        else:
            for worker in holders:
                chosen[worker.id] = worker
        if job.adapter is not None:
            for worker in fleet.in_host_memory(job.adapter)[:DRAWN]:
                chosen[worker.id] = worker
        for _ in range(min(DRAWN, len(ready))):
            worker = ready[int(rng.random() * len(ready))]
            chosen[worker.id] = worker
        return list(chosen.values())
