"""Which adapters one worker holds: a ledger of its slots, and who leaves when another comes.

Four rules, kept at every step and not only between steps:
  1. there are never more adapters in slots than slots;
  2. what is in use, loading or pinned is never evicted;
  3. a victim leaves only when its successor has arrived, so a load that fails has evicted nothing;
  4. a slot may be closed to new users, so that it falls idle for somebody who has waited too long.
Hence the phase EVICTING: the slot is promised to a successor, nobody new may use the adapter in it,
and it becomes RESIDENT again if the successor's load fails. Pure: no waiting here, see router.py.
"""

import asyncio
from collections.abc import Iterator, Mapping
from enum import Enum, StrEnum
from typing import Final

from router.core.job import AdapterRef, LoadError
from router.core.shares import Shares


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


class Eviction(StrEnum):
    """Which of the idle adapters leaves.

    `lru`: the least recently used. `gdsf`: greedy-dual size-frequency (Cherkasova, HP Labs 1998): the
    least of `clock + uses x reload time / size`, `clock` being the value of the last one that left, so
    that what was popular long ago is overtaken. vLLM pads all slots to `max_lora_rank`: one size.
    """

    LRU = "lru"
    GDSF = "gdsf"


class Slot:
    """One adapter's place on one worker, from the first job that needs it to its eviction.

    `ready_at` is the loop time at which a load is expected to end; `reload_s` what it took.
    """

    __slots__ = (
        "adapter",
        "closed",
        "error",
        "idle_since",
        "phase",
        "pinned",
        "ready_at",
        "reload_s",
        "tenant",
        "users",
        "uses",
        "value",
        "victim",
        "waiters",
    )

    def __init__(self, adapter: AdapterRef) -> None:
        self.adapter = adapter
        self.phase = Phase.COLD
        self.closed = False
        self.pinned = False
        self.users = 0
        self.uses = 0
        self.value = 0.0
        self.ready_at = 0.0
        self.reload_s = 1.0
        self.tenant = ""  # who uses it, where somebody does
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
    """The slots of one worker. `capacity` is `max_num_adapters_per_replica`, 0 for no adapters.

    `pins` are adapters that stay once they are here; the caller keeps them fewer than the slots.
    """

    __slots__ = (
        "_closed",
        "_evicting",
        "_gdsf",
        "_idle",
        "_idled",
        "_slots",
        "_victim",
        "capacity",
        "clock",
        "in_use",
        "loading",
        "pins",
        "shares",
    )

    def __init__(self, capacity: int, eviction: Eviction = Eviction.LRU) -> None:
        self.capacity = capacity
        self.pins: Mapping[AdapterRef, object] = {}
        self.in_use = 0  # slots with users
        self.shares = Shares(capacity)
        self.loading = 0
        self.clock = 0.0
        self._gdsf = eviction is Eviction.GDSF
        self._slots: dict[AdapterRef, Slot] = {}
        # Resident, unused and not pinned, in the order in which they fell idle.
        self._idle: dict[AdapterRef, Slot] = {}
        self._idled = 0
        self._evicting = 0
        self._closed: Slot | None = None
        self._victim: Slot | None = None  # as last chosen; None where that may have changed

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def occupied(self) -> int:
        """Slots taken or promised. A victim is not counted: its successor is."""
        return len(self._slots) - self._evicting

    @property
    def free(self) -> int:
        """Slots that hold nothing and are promised to nobody."""
        return self.capacity - len(self._slots) + self._evicting

    @property
    def idle(self) -> int:
        """How many adapters could be evicted now."""
        return len(self._idle)

    @property
    def spare(self) -> bool:
        """Whether an adapter that is not here could have a slot: a free one, or an idle one's."""
        return bool(self._idle) or self.free > 0

    def get(self, adapter: AdapterRef) -> Slot | None:
        """The adapter's slot, or None where it is cold."""
        return self._slots.get(adapter)

    def can_serve(self, adapter: AdapterRef, tenant: str = "") -> bool:
        """Whether a job for the adapter could be placed here.

        It can where the adapter is held, or a slot can be had; and where that slot would come into use
        by it, where the tenant may have it (see shares.py).
        """
        slot = self._slots.get(adapter)
        if slot is not None:
            if slot.phase is EVICTING or slot.closed:
                return False
            if slot.users or self.shares.tenants.alone:
                return True
            return self.shares.may_open(tenant, self.capacity - self.in_use)
        if not self._idle and self.capacity - len(self._slots) + self._evicting <= 0:
            return False
        return self.shares.tenants.alone or self.shares.may_open(
            tenant, self.capacity - self.in_use
        )

    def acquire(self, slot: Slot, tenant: str = "") -> None:
        """Count one more user of a slot that is resident or loading."""
        assert slot.phase is RESIDENT or slot.phase is LOADING, slot.phase
        assert not slot.closed, f"{slot.adapter} is closed to new users"
        if not slot.users:
            self.in_use += 1
            slot.tenant = tenant
            self.shares.opened(tenant)
            if self._idle.pop(slot.adapter, None) is not None:
                self._victim = None
        slot.users += 1
        slot.uses += 1

    def release(self, slot: Slot) -> bool:
        """Count one user less; True if the slot has become idle, so that it could be evicted."""
        assert slot.users > 0, f"{slot.adapter} released more often than acquired"
        slot.users -= 1
        if slot.users:
            return False
        self._out_of_use(slot)
        if slot.phase is not RESIDENT:
            return False
        self._fall_idle(slot)
        return True

    def _out_of_use(self, slot: Slot) -> None:
        self.in_use -= 1
        self.shares.closed(slot.tenant)

    def _fall_idle(self, slot: Slot) -> None:
        self._idled += 1
        slot.idle_since = self._idled
        slot.value = self.clock + slot.uses * slot.reload_s
        if not slot.pinned:
            self._idle[slot.adapter] = slot
            self._victim = None

    # Who leaves.

    def victim(self) -> Slot | None:
        """Who would leave for a newcomer; None where a slot is free, or nobody may leave."""
        if self.free > 0 or not self._idle:
            return None
        if self._victim is None:
            self._victim = self._least()
        return self._victim

    def _least(self) -> Slot:
        if self._closed is not None and self._closed.adapter in self._idle:
            return self._closed
        if self._gdsf:
            return min(self._idle.values(), key=_worth)
        return next(iter(self._idle.values()))

    def close(self, slot: Slot) -> None:
        """Let nobody new use it, until it has fallen idle and left, or is opened; one at a time."""
        assert self._closed is None, self._closed
        assert slot.phase is RESIDENT, slot.phase
        slot.closed = True
        self._closed = slot
        self._victim = None

    @property
    def closed(self) -> Slot | None:
        """The slot that is closed, if one is."""
        return self._closed

    def open(self, slot: Slot) -> bool:
        """Take new users again. False where it is not closed, or has left meanwhile."""
        if self._closed is not slot:
            return False
        self._closed = self._victim = None
        slot.closed = False
        return slot.phase is RESIDENT

    def pin(self, slot: Slot, *, pinned: bool) -> None:
        """Let it never be evicted, or let it again."""
        slot.pinned = pinned
        self._victim = None
        if slot.phase is RESIDENT and not slot.users:
            if pinned:
                self._idle.pop(slot.adapter, None)
            elif slot.adapter not in self._idle:
                self._fall_idle(slot)

    # Adapters come and go.

    def begin_load(self, adapter: AdapterRef) -> Slot:
        """Promise a slot to a cold adapter, a free one or else that of who leaves (`victim`).

        The caller has asked `can_serve` in the same step.
        """
        assert adapter not in self._slots, adapter
        slot = Slot(adapter)
        slot.pinned = adapter in self.pins
        if self.occupied >= self.capacity:
            victim = self.victim()
            assert victim is not None, "begin_load without a slot to be had"
            del self._idle[victim.adapter]
            victim.move(EVICTING)
            if victim is self._closed:
                self._closed = None
                victim.closed = False
            self._evicting += 1
            self._victim = None
            slot.victim = victim
        slot.move(LOADING)
        self.loading += 1
        self._slots[adapter] = slot
        assert self.occupied <= self.capacity
        return slot

    def finish_load(self, slot: Slot) -> Slot | None:
        """The load succeeded: the victim, if there was one, is gone and is returned."""
        victim, slot.victim = slot.victim, None
        if victim is not None:
            victim.move(COLD)
            self.clock = max(self.clock, victim.value)
            self._evicting -= 1
            del self._slots[victim.adapter]
        slot.move(RESIDENT)
        self.loading -= 1
        if not slot.users:
            self._fall_idle(slot)
        return victim

    def fail_load(self, slot: Slot, error: LoadError) -> None:
        """The load failed: the slot is free again and its victim is what it was, resident."""
        slot.error = error
        slot.move(COLD)
        self.loading -= 1
        del self._slots[slot.adapter]
        if slot.users:
            self._out_of_use(slot)
        victim, slot.victim = slot.victim, None
        self._victim = None
        if victim is not None:
            victim.move(RESIDENT)
            self._evicting -= 1
            if victim.pinned:
                return
            # Back to its place in the order: nothing has used it since it was chosen.
            idle = [victim, *self._idle.values()]
            idle.sort(key=_idle_since)
            self._idle = {slot.adapter: slot for slot in idle}

    def adopt(self, adapter: AdapterRef) -> Slot | None:
        """The worker says that it holds the adapter: believe it if there is a slot for it."""
        if adapter in self._slots or self.occupied >= self.capacity:
            return None
        slot = Slot(adapter)
        slot.pinned = adapter in self.pins
        slot.move(RESIDENT)
        self._slots[adapter] = slot
        self._fall_idle(slot)
        return slot

    def disown(self, slot: Slot) -> bool:
        """The worker refused a request for the adapter: it is not there.

        True if the slot was dropped. It stays where others than the one who was refused use it: they
        are answered, so their word counts for more.
        """
        if slot.phase is not RESIDENT or slot.users > 1:
            return False
        self._lose(slot)
        return True

    def forget(self, slot: Slot) -> bool:
        """The worker says that it lost the adapter. True if an idle slot was dropped for it.

        A slot in use stays: the engine brings the adapter back by itself for the requests that run.
        """
        if slot.phase is not RESIDENT or slot.users:
            return False
        self._lose(slot)
        return True

    def _lose(self, slot: Slot) -> None:
        slot.move(COLD)
        del self._slots[slot.adapter]
        if slot.users:
            self._out_of_use(slot)
        self._idle.pop(slot.adapter, None)
        self._victim = None
        if self._closed is slot:
            self._closed = None
            slot.closed = False


def _worth(slot: Slot) -> tuple[float, int]:
    return slot.value, slot.idle_since


def _idle_since(slot: Slot) -> int:
    return slot.idle_since
