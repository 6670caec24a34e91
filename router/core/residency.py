"""Which adapters one worker holds: a ledger of its slots, least recently used out first.

Three rules, kept at every step and not only between steps:
  1. there are never more adapters in slots than slots;
  2. what is in use or loading is never evicted;
  3. a victim leaves only when its successor has arrived, so a load that fails has evicted nothing.
Hence the phase EVICTING: the slot is promised to a successor, nobody new may use the adapter in it,
and it becomes RESIDENT again if the successor's load fails. Pure: no waiting here, see router.py.
"""

import asyncio
from collections.abc import Iterator
from enum import Enum
from typing import Final

from router.core.job import AdapterRef, LoadError


class Phase(Enum):
    """Where an adapter stands on one worker. COLD is the absence of a slot."""

    COLD = "cold"
    LOADING = "loading"
    RESIDENT = "resident"
    EVICTING = "evicting"


# By these names the hot path has them at a tenth of the cost (Python 3.11).
COLD: Final = Phase.COLD
LOADING: Final = Phase.LOADING
RESIDENT: Final = Phase.RESIDENT
EVICTING: Final = Phase.EVICTING

NEXT: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.COLD: frozenset({Phase.LOADING, Phase.RESIDENT}),  # RESIDENT: the worker says it has it
    Phase.LOADING: frozenset({Phase.RESIDENT, Phase.COLD}),
    Phase.RESIDENT: frozenset({Phase.EVICTING, Phase.COLD}),  # COLD: the worker says it lost it
    Phase.EVICTING: frozenset({Phase.COLD, Phase.RESIDENT}),
}


class Slot:
    """One adapter's place on one worker, from the first job that needs it to its eviction."""

    __slots__ = ("adapter", "error", "idle_since", "phase", "users", "victim", "waiters")

    def __init__(self, adapter: AdapterRef) -> None:
        self.adapter = adapter
        self.phase = Phase.COLD
        self.users = 0
        self.idle_since = 0  # a count of the cache's own, not a time
        self.victim: Slot | None = None
        self.error: LoadError | None = None
        self.waiters: list[asyncio.Future[None]] = []

    def move(self, phase: Phase) -> None:
        """Go to another phase; an illegal step is a bug."""
        assert phase in NEXT[self.phase], f"{self.adapter}: {self.phase} -> {phase}"
        self.phase = phase

    def wake(self) -> None:
        """Tell all who wait for the load that it has ended, well or not."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class SlotCache:
    """The slots of one worker. `capacity` is `max_num_adapters_per_replica`, 0 for no adapters."""

    __slots__ = ("_evicting", "_idle", "_idled", "_slots", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: dict[AdapterRef, Slot] = {}
        # Resident and unused, in the order in which they fell idle: the first is the victim.
        self._idle: dict[AdapterRef, Slot] = {}
        self._idled = 0
        self._evicting = 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def occupied(self) -> int:
        """Slots taken or promised. A victim is not counted: its successor is."""
        return len(self._slots) - self._evicting

    @property
    def idle(self) -> int:
        """How many adapters could be evicted now."""
        return len(self._idle)

    def get(self, adapter: AdapterRef) -> Slot | None:
        """The adapter's slot, or None where it is cold."""
        return self._slots.get(adapter)

    def can_serve(self, adapter: AdapterRef) -> bool:
        """Whether a job for the adapter could be placed here: it is held, or a slot can be had."""
        slot = self._slots.get(adapter)
        if slot is not None:
            return slot.phase is not EVICTING
        return self.occupied < self.capacity or bool(self._idle)

    def acquire(self, slot: Slot) -> None:
        """Count one more user of a slot that is resident or loading."""
        assert slot.phase is RESIDENT or slot.phase is LOADING, slot.phase
        slot.users += 1
        self._idle.pop(slot.adapter, None)

    def release(self, slot: Slot) -> bool:
        """Count one user less; True if the slot has become idle, so that it could be evicted."""
        assert slot.users > 0, f"{slot.adapter} released more often than acquired"
        slot.users -= 1
        if slot.users or slot.phase is not RESIDENT:
            return False
        self._fall_idle(slot)
        return True

    def _fall_idle(self, slot: Slot) -> None:
        self._idled += 1
        slot.idle_since = self._idled
        self._idle[slot.adapter] = slot

    def begin_load(self, adapter: AdapterRef) -> Slot:
        """Promise a slot to a cold adapter, a free one or else the least recently used idle one's.

        The caller has asked `can_serve` in the same step.
        """
        assert adapter not in self._slots, adapter
        slot = Slot(adapter)
        if self.occupied >= self.capacity:
            assert self._idle, "begin_load without a slot to be had"
            victim = self._idle.pop(next(iter(self._idle)))
            victim.move(Phase.EVICTING)
            self._evicting += 1
            slot.victim = victim
        slot.move(Phase.LOADING)
        self._slots[adapter] = slot
        assert self.occupied <= self.capacity
        return slot

    def finish_load(self, slot: Slot) -> Slot | None:
        """The load succeeded: the victim, if there was one, is gone and is returned."""
        victim, slot.victim = slot.victim, None
        if victim is not None:
            victim.move(Phase.COLD)
            self._evicting -= 1
            del self._slots[victim.adapter]
        slot.move(Phase.RESIDENT)
        if not slot.users:
            self._fall_idle(slot)
        return victim

    def fail_load(self, slot: Slot, error: LoadError) -> None:
        """The load failed: the slot is free again and its victim is what it was, resident."""
        slot.error = error
        slot.move(Phase.COLD)
        del self._slots[slot.adapter]
        victim, slot.victim = slot.victim, None
        if victim is not None:
            victim.move(Phase.RESIDENT)
            self._evicting -= 1
            # Back to its place in the order: nothing has used it since it was chosen.
            idle = [victim, *self._idle.values()]
            idle.sort(key=lambda slot: slot.idle_since)
            self._idle = {slot.adapter: slot for slot in idle}

    def adopt(self, adapter: AdapterRef) -> Slot | None:
        """The worker says that it holds the adapter: believe it if there is a slot for it."""
        if adapter in self._slots or self.occupied >= self.capacity:
            return None
        slot = Slot(adapter)
        slot.move(Phase.RESIDENT)
        self._slots[adapter] = slot
        self._fall_idle(slot)
        return slot

    def disown(self, slot: Slot) -> bool:
        """The worker refused a request for the adapter: it is not there.

        True if the slot was dropped. It stays where others than the one who was refused use it: they
        are answered, so their word counts for more.
        """
        if slot.phase is not Phase.RESIDENT or slot.users > 1:
            return False
        slot.move(Phase.COLD)
        del self._slots[slot.adapter]
        self._idle.pop(slot.adapter, None)
        return True

    def forget(self, slot: Slot) -> bool:
        """The worker says that it lost the adapter. True if an idle slot was dropped for it.

        A slot in use stays: the engine brings the adapter back by itself for the requests that run.
        """
        if slot.phase is not Phase.RESIDENT or slot.users:
            return False
        slot.move(Phase.COLD)
        del self._slots[slot.adapter]
        del self._idle[slot.adapter]
        return True
