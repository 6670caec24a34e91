"""How many workers should hold an adapter, and loading it there before it is asked for.

The rule: by Little's law an adapter's requests a second times its latency are its requests in flight;
it should have one holder for each worker's worth of those, and one where it needs less. Up at once,
down slowly: the smoothed figure follows a rise immediately and a fall over some ten periods. A surplus
holder is not unloaded: the policy prefers the others, so its slot falls idle and is the next to go.

Churn is bounded: no load begins on a worker where one is under way, at most `LOADS_AT_ONCE` in a
period. For a hot adapter one may be evicted that is asked for less than each holder would be; whatever
else was in use of late, or waits in the queue, and is held nowhere, is loaded where a slot is free. An
adapter whose load failed is left alone, for twice as long each time, until one succeeds. One that is
retired has no target and is not loaded ahead; a holder that gets nothing new is as good as none.

Cost: nothing but a dictionary's look-up on the way of a request; each period walks the adapters in use.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from typing import Final

from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef

PERIOD_S: Final = 1.0
FADE: Final = 0.1  # of what was in flight, each period in which it falls
FORGET_BELOW: Final = 0.5
LOADS_AT_ONCE: Final = 4
# A worker's worth is what workers have on average, but at least this share of what they may have.
WORTH_MIN: Final = 0.25
LOOKED_AT: Final = 8
BACKOFF_MAX_S: Final = 60.0
FAILED_MAX: Final = 4096


class Replicas:
    """Plans the holders of each adapter of a fleet. `warm` begins a load, if it can."""

    def __init__(self, fleet: Fleet, warm: Callable[[Worker, AdapterRef], bool]) -> None:
        self.period_s = PERIOD_S
        self._fleet = fleet
        self._warm = warm
        self._in_flight: dict[AdapterRef, float] = {}
        # Whose last load has failed: until when it is left alone, and for how long that is.
        self._backoff: OrderedDict[AdapterRef, tuple[float, float]] = OrderedDict()
        self._turn = 0

    def waits(self, adapter: AdapterRef) -> None:
        """A job for the adapter waits: have it loaded meanwhile, where that costs nobody a slot."""
        fleet = self._fleet
        if self._holders(adapter):
            return
        ready = fleet.ready or tuple(fleet)
        if not ready:
            return
        best: Worker | None = None
        for step in range(min(len(ready), LOOKED_AT)):
            worker = ready[(self._turn + step) % len(ready)]
            if (
                worker.accepting
                and worker.slots.free > 0
                and (best is None or worker.ongoing < best.ongoing)
            ):
                best = worker
        self._turn += 1
        if best is not None:
            self._warm(best, adapter)

    def retired(self, adapter: AdapterRef) -> None:
        """It is to leave: that it was in use of late is no reason to load it again."""
        self._in_flight.pop(adapter, None)
        self._backoff.pop(adapter, None)

    def loaded(self, adapter: AdapterRef) -> None:
        """A load of it has succeeded."""
        self._backoff.pop(adapter, None)

    def failed(self, adapter: AdapterRef, now: float) -> None:
        """A load of it has failed: it is not loaded ahead again before some time, if it is wanted."""
        self._in_flight.pop(adapter, None)
        _, before_s = self._backoff.pop(adapter, (0.0, 0.0))
        wait_s = min(max(2.0 * before_s, PERIOD_S), BACKOFF_MAX_S)
        self._backoff[adapter] = (now + wait_s, wait_s)
        if len(self._backoff) > FAILED_MAX:
            self._backoff.popitem(last=False)

    def _left_alone(self, adapter: AdapterRef, now: float) -> bool:
        return now < self._backoff.get(adapter, (0.0, 0.0))[0]

    def plan(self, waiting_for: Callable[[AdapterRef], int], now: float) -> bool:
        """Set the targets and begin what loads they need; False when nothing is in use any more."""
        fleet, seen = self._fleet, self._in_flight
        for adapter in fleet.users:
            seen.setdefault(adapter, 0.0)
        workers = [worker for worker in fleet if worker.accepting]
        if not workers:
            return bool(seen)
        worth = max(
            sum(worker.in_flight for worker in workers) / len(workers),
            WORTH_MIN * workers[0].max_ongoing,
        )
        wanting: list[tuple[float, AdapterRef]] = []
        for adapter, before in tuple(seen.items()):
            if adapter in fleet.retired:
                del seen[adapter]
                continue
            current = float(fleet.users.get(adapter, 0) + waiting_for(adapter))
            smoothed = max(current, before + FADE * (current - before))
            if smoothed < FORGET_BELOW:
                del seen[adapter]
                fleet.targets.pop(adapter, None)
                continue
            seen[adapter] = smoothed
            target = min(ceil(smoothed / worth), len(workers))
            if target > 1:
                fleet.targets[adapter] = target
            else:
                fleet.targets.pop(adapter, None)
            if self._holders(adapter) < target:
                wanting.append((-smoothed, adapter))
        wanting.extend((0.0, pin) for pin in fleet.pins if not self._holders(pin))
        wanting = [want for want in wanting if not self._left_alone(want[1], now)]
        wanting.sort()
        for _, adapter in wanting[:LOADS_AT_ONCE]:
            self._load(adapter, workers, now)
        return bool(seen)

    def _holders(self, adapter: AdapterRef) -> int:
        """How many workers hold it, or will, and can be sent jobs for it."""
        return sum(worker.accepting for worker in self._fleet.holders(adapter))

    def _load(self, adapter: AdapterRef, workers: list[Worker], now: float) -> None:
        fleet = self._fleet
        hot = adapter in fleet.targets  # more than one worker's worth
        share = fleet.demand.rate(adapter, now) / (len(fleet.holders(adapter)) + 1)
        able = []
        for number, worker in enumerate(workers):
            slots = worker.slots
            if slots.get(adapter) is not None or slots.loading or not slots.can_serve(adapter):
                continue
            victim = slots.victim()
            if (
                victim is None
                or adapter in fleet.pins
                or (hot and fleet.demand.rate(victim.adapter, now) < share)
            ):
                able.append((victim is not None, worker.ongoing, number))
        if able:
            self._warm(workers[min(able)[2]], adapter)
