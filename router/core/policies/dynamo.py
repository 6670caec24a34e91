"""Dynamo's allocator: every 3 s, as many replicas of an adapter as its share of the traffic.

Every 3 s, for each adapter:
  1. load = arrivals in the last 90 s, in buckets of 1 s, smoothed exponentially by 0.3 and rounded;
  2. replicas = its share of the load times all slots, rounded up, at most the number of workers; where
     that is more than all slots, scaled down to them by largest remainder, at least one each. Where
     more adapters have load than there are slots, only the busiest of them get a share;
  3. fewer than it has only once 3 ticks have passed since they were first due, or last taken;
  4. the workers: first all keep those that they have, then each gets the next in its own order, which
     is by rendezvous hashing, without those whose slots this plan has given away; if that leaves it
     none, the first in that order;
  5. an adapter with load and no share keeps those of its workers that hold it, else one as in 4.
Each job goes to the least loaded (ties by the generator) of the first of these that is not empty: its
replicas that hold it; its replicas; others that hold it; the first in its order. Without an adapter,
of all.
Source: Dynamo (ai-dynamo/dynamo, lib/llm/src/lora: controller.rs, load_estimator.rs, predictor.rs,
routing/hrw.rs, filter.rs), the constants those of `LoraAllocationConfig::default`. It hashes by blake3.
Given to it: residency without delay, a load under way counted as one.
Changed: it counts every adapter that lies in a slot against 4, but here idle ones stay until evicted,
and would leave it nothing to plan with. An adapter without load has no plan (it pins it to the first in
its order, held there or not), and one that has none yet goes to its holders, else to the first in its
order (it sends it to anybody where there is no holder).
Ticks are computed when a job comes, for the time they were due and the fleet as it is by then.
Bent: whoever the router's bounds leave out (`placement.eligible`) is passed by.
Cost: O(workers); a tick O(adapters x workers). Memory: 90 buckets an adapter with arrivals in the last
90 s, or load, or a holder, and of 65,536 adapters at most.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from random import Random
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, Job
from router.core.placement import Decision, Policy, decided, eligible, least_busy
from router.core.policies.hashing import stable_hash

TICK_S: Final = 3.0
BUCKET_S: Final = 1.0
WINDOW_BUCKETS: Final = 90
SMOOTHING: Final = 0.3
SCALE_DOWN_TICKS: Final = 3
MISSED_TICKS_MAX: Final = 30  # a whole window: what came before it counts no more
TRACKED_MAX: Final = 65_536


class _Adapter:
    """What is known of one adapter: its arrivals, its load, its replicas."""

    __slots__ = ("arrivals", "estimate", "order", "order_of", "replicas", "shrunk_at")

    def __init__(self) -> None:
        self.arrivals: deque[list[int]] = deque()  # [bucket, count], oldest first
        self.estimate: float | None = None
        self.replicas: tuple[str, ...] = ()
        self.shrunk_at: int | None = None  # the tick of the last scale-down, done or put off
        self.order: tuple[str, ...] = ()
        self.order_of: tuple[str, ...] = ()

    def record(self, bucket: int) -> None:
        if self.arrivals and self.arrivals[-1][0] == bucket:
            self.arrivals[-1][1] += 1
        else:
            self.arrivals.append([bucket, 1])
            if len(self.arrivals) > WINDOW_BUCKETS:
                self.arrivals.popleft()

    def load(self, bucket: int) -> int:
        """Measure the window that ends with the bucket; the smoothed load, half rounded up."""
        while self.arrivals and self.arrivals[0][0] <= bucket - WINDOW_BUCKETS:
            self.arrivals.popleft()
        counted = sum(count for _, count in self.arrivals)
        if self.estimate is None:
            self.estimate = float(counted)
        else:
            self.estimate = SMOOTHING * counted + (1.0 - SMOOTHING) * self.estimate
        return math.floor(self.estimate + 0.5)

    def ranked(self, name: str, members: tuple[str, ...]) -> tuple[str, ...]:
        """The members by rendezvous hashing, the highest first; kept while they stay the same."""
        if self.order_of != members:
            self.order = tuple(sorted(members, key=lambda member: _rank(name, member)))
            self.order_of = members
        return self.order

    def scaled(self, wanted: int, tick: int) -> int:
        """Step 3."""
        if wanted >= len(self.replicas):
            self.shrunk_at = None
            return wanted
        if self.shrunk_at is None:
            self.shrunk_at = tick
        if tick - self.shrunk_at < SCALE_DOWN_TICKS:
            return len(self.replicas)
        self.shrunk_at = tick
        return wanted


class Dynamo(Policy):
    """The rule above."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._adapters: OrderedDict[AdapterRef, _Adapter] = OrderedDict()
        self._tick = 0
        self._next_s: float | None = None

    def arrived(self, job: Job, fleet: Fleet, now: float) -> None:
        """Count the job."""
        self._catch_up(fleet, now)
        if job.adapter is None:
            return
        known = self._adapters.get(job.adapter)
        if known is None:
            known = self._adapters[job.adapter] = _Adapter()
            if len(self._adapters) > TRACKED_MAX:
                self._adapters.popitem(last=False)
        else:
            self._adapters.move_to_end(job.adapter)
        known.record(int(now // BUCKET_S))

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:
        """Choose by the rule above."""
        self._catch_up(fleet, now)
        able = eligible(job, fleet)
        if able and job.adapter is not None:
            able = self._narrowed(job.adapter, able, fleet)
        return decided(least_busy(able, self._rng), job, fleet)

    def replicas(self, adapter: AdapterRef) -> tuple[str, ...]:
        """The workers that the adapter has been allotted, the preferred first."""
        known = self._adapters.get(adapter)
        return known.replicas if known else ()

    def _narrowed(self, adapter: AdapterRef, able: list[Worker], fleet: Fleet) -> list[Worker]:
        """The workers among which load decides; never none."""
        replicas = self.replicas(adapter)
        held_by = fleet.holders(adapter)
        inside = [worker for worker in able if worker.id in replicas]
        holders = [worker for worker in able if worker in held_by]
        return (
            [worker for worker in inside if worker in held_by]
            or inside
            or holders
            or [min(able, key=lambda worker: _rank(adapter.name, worker.id))]
        )

    # The plan.

    def _catch_up(self, fleet: Fleet, now: float) -> None:
        """Compute the ticks that were due by now."""
        if self._next_s is None:
            self._next_s = now + TICK_S
        if now < self._next_s:
            return
        missed = int((now - self._next_s) // TICK_S) + 1
        for number in range(max(0, missed - MISSED_TICKS_MAX), missed):
            self._plan(fleet, int((self._next_s + number * TICK_S) // BUCKET_S))
        self._next_s += missed * TICK_S

    def _plan(self, fleet: Fleet, bucket: int) -> None:
        self._tick += 1
        room = {worker.id: worker.slots.capacity for worker in fleet if worker.accepting}
        members = tuple(sorted(room))
        slots = sum(room.values())
        loads: dict[AdapterRef, int] = {}
        # In the order of their names, so that the plan does not depend on who came first.
        for adapter, known in sorted(self._adapters.items(), key=_by_ref):
            if load := known.load(bucket):
                loads[adapter] = load
            elif not known.arrivals and not fleet.holders(adapter):
                del self._adapters[adapter]
        if not slots:
            loads = {}
        shares = replica_counts(loads, slots, len(members))
        kept: dict[AdapterRef, tuple[str, ...]] = {}
        wanted: dict[AdapterRef, int] = {}
        planned = [adapter for adapter in loads if adapter in shares]
        for adapter in planned:
            known = self._adapters[adapter]
            wanted[adapter] = count = known.scaled(shares[adapter], self._tick)
            order = known.ranked(adapter.name, members)
            before = [member for member in order if member in known.replicas]
            kept[adapter] = _taken(before, count, room)
        for adapter in planned:
            known, count = self._adapters[adapter], wanted[adapter]
            fresh = [member for member in known.order if member not in kept[adapter]]
            more = _taken(fresh, count - len(kept[adapter]), room)
            known.replicas = kept[adapter] + more or known.order[:count]
        for adapter, known in sorted(self._adapters.items(), key=_by_ref):
            if adapter not in loads:
                known.replicas = ()
                known.shrunk_at = None
            elif adapter not in shares:
                held_by = [worker.id for worker in fleet.holders(adapter)]
                warm = tuple(one for one in known.replicas if one in room and one in held_by)
                for worker_id in warm:
                    room[worker_id] -= 1
                order = known.ranked(adapter.name, members)
                known.replicas = warm or _taken(order, 1, room) or order[:1]


def replica_counts(
    loads: Mapping[AdapterRef, int], slots: int, workers: int
) -> dict[AdapterRef, int]:
    """How many replicas each adapter gets by its load: step 2."""
    busiest = sorted(loads, key=lambda adapter: (-loads[adapter], adapter))[:slots]
    total = sum(loads[adapter] for adapter in busiest)
    counts = {
        adapter: min(max(1, math.ceil(loads[adapter] / total * slots)), workers)
        for adapter in busiest
    }
    wanted = sum(counts.values())
    if wanted <= slots:
        return counts
    exact = {adapter: max(1.0, count * slots / wanted) for adapter, count in counts.items()}
    counts = {adapter: int(share) for adapter, share in exact.items()}
    left = slots - sum(counts.values())
    for adapter in sorted(exact, key=lambda adapter: (counts[adapter] - exact[adapter], adapter)):
        if left <= 0:
            break
        if counts[adapter] < workers:
            counts[adapter] += 1
            left -= 1
    return counts


def _taken(members: Sequence[str], count: int, room: dict[str, int]) -> tuple[str, ...]:
    """The first `count` with a slot left, which is then taken from `room`."""
    chosen = tuple([member for member in members if room[member] > 0][:count])
    for member in chosen:
        room[member] -= 1
    return chosen


def _rank(name: str, worker_id: str) -> tuple[int, str]:
    """Rendezvous hashing (highest random weight): the lowest rank is the first choice."""
    return -stable_hash(f"{name}@{worker_id}"), worker_id


def _by_ref(item: tuple[AdapterRef, _Adapter]) -> AdapterRef:
    return item[0]
