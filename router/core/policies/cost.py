"""Cost, the default: the worker on which this job costs everybody the fewest seconds.

For each worker that could take the job, in seconds:

    wait     until the prompts that were sent there before are computed
  + load     until its adapter is resident: 0, what is left of a load, or that of the tier it is in
  + prefill  its prompt, less what is cached there, and the step that it is in
  + decode   its answer at the pace of that batch
  + others   what those who run there lose: the stall of a load, its prompt, a slower batch
  + harm     the chance that the evicted adapter is asked for before it would have left anyway, times
             its reload; less where others hold it too
  + stay     hysteresis: what a worker that does not hold the adapter must be better by, the more so
             where it has as many holders as its traffic needs (see replicas.py)

and the least wins. `wait` begins with what has been dispatched a moment ago, so a burst
does not pile up. A worker with more than `AHEAD_S` of prompts ahead, or no memory for the job's
context, is not sent more, and an adapter that has a holder does not take a worker's last slot. The
rest waits in the router, where it can still go elsewhere, be ordered fairly, or be told in time that
its deadline would be missed.

Terms: predicted wait as in Llumnix and Mooncake; the batch's slowdown by its distinct adapters as in
CaraServe's rank-aware scheduling; the residence time of an idle slot is Che's characteristic time.
Pure: reads the fleet, changes nothing. Cost: O(candidates), which are the holders, those with the
adapter in host memory and a few others; all of a small fleet; and where none of those has room, who
holds the adapter or has a slot to give: nobody where every slot is in use.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import exp, inf
from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job
from router.core.placement import Considered, Decision, Drop, Policy, Reason, nobody
from router.core.residency import LOADING, Slot, SlotCache
from router.core.timing import Tier

ALL_UP_TO: Final = 8  # workers; beyond, some are drawn
HOLDERS_MAX: Final = 6
DRAWN: Final = 4
AHEAD_S: Final = 0.5
KV_SHARE: Final = 0.95
KEPT_SLOTS: Final = 1
OTHERS_WEIGHT: Final = 0.25
HARM_WEIGHT: Final = 4.0
STAY_S: Final = 0.1
SPREAD_S: Final = 0.5
HOST: Final = Tier.HOST
DISK: Final = Tier.DISK
STORE: Final = Tier.STORE
SATURATED: Final = Drop.SATURATED
LAST_SLOT: Final = Drop.LAST_SLOT
NO_MEMORY: Final = Drop.NO_MEMORY
NOTHING: Final[Mapping[str, int]] = {}
LOCALITY_TOKENS: Final = 131072.0


class Cost(Policy):
    """The rule above."""

    locality_tokens = LOCALITY_TOKENS
    replicates = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def opens_at(self, worker: Worker, now: float) -> float:
        """When the prompts ahead are down to what keeps the engine busy."""
        return max(worker.busy_until - AHEAD_S, now)

    def has_memory(self, job: Job, worker: Worker, fleet: Fleet) -> bool:
        """Whether what runs there leaves enough for its context, and nobody waits for that."""
        return not _Weighing(job, fleet, (), 0.0).lacks_memory(worker)

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:
        """Choose by the rule above."""
        adapter = job.adapter
        holders = fleet.holders(adapter) if adapter is not None else ()
        weighing = _Weighing(job, fleet, holders, now)
        dropped: list[tuple[str, Drop]] = []
        considered: list[Considered] = []
        best: Worker | None = None
        best_s = full_s = again_at = inf
        full = False
        least: Considered | None = None
        spare: Worker | None = None
        for worker in self._candidates(job, fleet, holders):
            drop = weighing.drop(worker)
            if drop is None:
                cost = weighing.cost(worker, best_s)
                considered.append(cost)
                total_s = weighing.total_s
                if total_s < best_s:
                    best, best_s, least = worker, total_s, cost
                continue
            dropped.append((worker.id, drop))
            if drop is Drop.AVOIDED:
                spare = spare or worker
            elif drop is NO_MEMORY or drop is LAST_SLOT:
                full = True  # until a job ends there, and then those who wait are served
            elif drop is SATURATED:
                # It may still be the best place to go to, a little later.
                full = True
                cost = weighing.cost(worker, full_s)
                considered.append(cost)
                full_s = min(full_s, weighing.total_s)
                again_at = min(again_at, worker.busy_until - AHEAD_S)
        left_out, looked_at = tuple(dropped), tuple(considered)
        chosen = best or spare
        if full_s < best_s or (chosen is None and full):
            at = again_at if again_at < inf else None
            return Decision(None, Reason.SATURATED, left_out, looked_at, at)
        if chosen is None:
            return Decision(None, nobody(fleet, adapter), left_out)
        first_s = None if least is None else least.first_token_s
        reason = _reason(chosen, job, holders)
        return Decision(chosen, reason, left_out, looked_at, None, first_s)

    def _candidates(self, job: Job, fleet: Fleet, holders: Sequence[Worker]) -> Iterable[Worker]:
        """Whom to look at: all of a small fleet; of a large one the holders and some others."""
        if len(fleet) <= ALL_UP_TO:
            return fleet
        rng, ready = self._rng, fleet.ready
        chosen: dict[str, Worker] = {}
        first = int(rng.random() * len(holders)) if len(holders) > HOLDERS_MAX else 0
        for step in range(min(len(holders), HOLDERS_MAX)):
            worker = holders[(first + step) % len(holders)]
            chosen[worker.id] = worker
        if job.adapter is not None:
            for worker in fleet.in_host_memory(job.adapter)[:DRAWN]:
                chosen[worker.id] = worker
        for _ in range(min(DRAWN, len(ready))):
            worker = ready[int(rng.random() * len(ready))]
            chosen[worker.id] = worker
        able = list(chosen.values())
        if any(
            worker.ready_index >= 0 and worker.can_serve(job.adapter, job.tenant) for worker in able
        ):
            return able
        # Those drawn have no room: rather look at all that may have it than say that nobody has.
        for worker in sorted(fleet.within_reach(job.adapter), key=_number):
            chosen[worker.id] = worker
        return chosen.values()


class _Weighing:
    """What one job would cost on one worker after another.

    What is the same for all workers is looked up once, and methods of one line are written out: this
    is most of what a decision costs (benchmarks/decisions.py).
    """

    __slots__ = (
        "adapter",
        "cached",
        "fleet",
        "held",
        "job",
        "load_s",
        "now",
        "output",
        "per_token_s",
        "reload_s",
        "stay_s",
        "total_s",
        "victim_stay_s",
    )

    def __init__(self, job: Job, fleet: Fleet, holders: Sequence[Worker], now: float) -> None:
        adapter = job.adapter
        self.job = job
        self.fleet = fleet
        self.now = now
        self.adapter = adapter
        self.output = fleet.learned.expected_output(job.max_output_tokens)
        self.per_token_s = fleet.learned.times.prefill_s(1, lora=adapter is not None)
        self.cached = fleet.prefixes.cached_tokens(adapter, job.prefix) if job.prefix else NOTHING
        self.stay_s = STAY_S
        self.held = False
        for worker in holders:
            if worker.accepting and worker.id not in job.avoid:
                self.held = True
        if adapter is not None and len(holders) >= fleet.targets.get(adapter, 1):
            self.stay_s += SPREAD_S
        # A Tier's hash is a call into Python (3.11): two a decision, not two a worker.
        self.reload_s = self.load_s = fleet.learned.load_s(DISK)
        if adapter is not None and not fleet.staged(adapter):
            self.load_s = fleet.learned.load_s(STORE)
        self.total_s = 0.0  # of the worker that was looked at last
        self.victim_stay_s: float | None = None  # until somebody's victim needs it

    def drop(self, worker: Worker) -> Drop | None:
        """Why the worker is left out, if it is."""
        job, adapter = self.job, self.adapter
        if worker.ready_index < 0:
            return Drop.OVERLOADED if worker.accepting else Drop.NOT_ACCEPTING
        # `Worker.can_serve` written out.
        places, tenant = worker.places, job.tenant
        may = places.tenants.alone or places.may_open(tenant, worker.max_ongoing - worker.ongoing)
        if not may or (adapter is not None and not worker.slots.can_serve(adapter, tenant)):
            return Drop.NO_SLOT
        if self.held and adapter is not None and _is_kept(worker.slots, adapter):
            return LAST_SLOT
        if job.avoid and worker.id in job.avoid:
            return Drop.AVOIDED
        if worker.busy_until - AHEAD_S > self.now:
            return SATURATED
        return NO_MEMORY if self.lacks_memory(worker) else None

    def lacks_memory(self, worker: Worker) -> bool:
        """Whether the job's context does not fit there now, or the worker is kept for another."""
        job = self.job
        if worker.kept_for is not None and worker.kept_for is not job:
            return True
        if not worker.kv_tokens or not worker.in_flight:
            return False
        need: float = job.prompt_tokens + self.output
        if self.cached:
            need = job.prompt_tokens - self.cached.get(worker.id, 0) + self.output
        return worker.context_tokens + need > KV_SHARE * worker.kv_tokens

    def cost(self, worker: Worker, bound_s: float) -> Considered:
        """The terms; without the harm where the others alone make it cost `bound_s`, or more."""
        fleet, now, output = self.fleet, self.now, self.output
        times, slots = fleet.learned.times, worker.slots
        running, before = worker.ongoing, slots.in_use
        distinct = before
        load_s = stall_s = harm_s = stay_s = 0.0
        victim: Slot | None = None
        adapter = self.adapter
        if adapter is not None:
            slot = slots.get(adapter)
            if slot is None:
                if worker.host and adapter in worker.host:
                    load_s, stall_s = fleet.learned.load_s(HOST), times.load_host_s
                else:
                    load_s, stall_s = self.load_s, times.load_disk_s
                victim = slots.victim()
                stay_s = self.stay_s
                distinct += 1
            else:
                if slot.phase is LOADING:
                    load_s = max(0.0, slot.ready_at - now)
                if not slot.users:
                    distinct += 1
        tokens = self.job.prompt_tokens
        if self.cached:
            tokens -= self.cached.get(worker.id, 0)
        context = worker.context_tokens
        pace = worker.pace
        prefill_s = tokens * self.per_token_s * pace
        # `EngineTimes.step_s` written out, for the batch with this job and for the one without.
        step_s = times.step_base_s + times.step_per_request_s * (running + 1)
        if distinct:
            step_s *= times.lora_factor + times.lora_factor_per_adapter * distinct
        step_s = pace * (step_s + times.kv_read_per_token_s * (context + tokens + output))
        others_s = 0.0
        if running:
            now_s = times.step_base_s + times.step_per_request_s * running
            if before:
                now_s *= times.lora_factor + times.lora_factor_per_adapter * before
            slower_s = step_s - pace * (now_s + times.kv_read_per_token_s * context)
            others_s = running * (stall_s + prefill_s + output * slower_s) * OTHERS_WEIGHT
        wait_s = max(0.0, worker.busy_until - now)
        prefill_s += step_s
        decode_s = output * step_s
        # No term is negative, so what the sum of the others says, harm can only say more clearly.
        # What departs would leave anyway.
        if victim and wait_s + load_s + prefill_s + decode_s + others_s + stay_s < bound_s:
            harm_s = 0.0 if victim.departs else self._harm_s(victim.adapter, running * stall_s)
        # In the order in which `Considered.total_s` adds them, to the last bit.
        self.total_s = wait_s + load_s + prefill_s + decode_s + others_s + harm_s + stay_s
        return Considered(
            worker.id,
            wait_s,
            load_s,
            prefill_s,
            decode_s,
            others_s,
            harm_s,
            stay_s,
        )

    def _harm_s(self, victim: AdapterRef, others_stall_s: float) -> float:
        """What evicting costs the victim's next user, if there is one before it would leave anyway."""
        fleet = self.fleet
        rate = fleet.demand.rate(victim, self.now)
        if rate <= 0.0:
            return 0.0
        stay_s = self.victim_stay_s
        if stay_s is None:
            stay_s = self.victim_stay_s = fleet.stay_s(self.now)
        soon = 1.0 - exp(-rate * stay_s)
        reload_s = self.reload_s + others_stall_s * OTHERS_WEIGHT
        return HARM_WEIGHT * soon * reload_s / max(1, fleet.holder_count(victim))


def _number(worker: Worker) -> int:
    return worker.number


def _is_kept(slots: SlotCache, adapter: AdapterRef) -> bool:
    """Whether one holder more would take the last slot, which one without any may need."""
    left = slots.capacity - slots.in_use
    return left <= KEPT_SLOTS < slots.capacity and slots.get(adapter) is None


def _reason(worker: Worker, job: Job, holders: Sequence[Worker]) -> Reason:
    adapter = job.adapter
    if adapter is None:
        return Reason.BASE
    if worker.slots.get(adapter) is not None:
        return Reason.HOLDER
    return Reason.SPILL if holders else Reason.COLD
