"""Which adapters one worker holds: a ledger of its slots, and who leaves when another comes.

Five rules, kept at every step and not only between steps:
  1. there are never more adapters in slots than slots;
  2. what is in use, loading or pinned is never evicted;
  3. a victim leaves only when its successor has arrived, so a load that fails has evicted nothing;
  4. a slot may be closed to new users, so that it falls idle for somebody who has waited too long;
  5. a slot that departs (its adapter is retired, or to be unloaded) is the first to be evicted.
An adapter that another router uses on the worker (`foreign`) counts as in use.
Hence the phase EVICTING: the slot is promised to a successor, nobody new may use the adapter in it,
and it becomes RESIDENT again if the successor's load fails. And LEAVING: the worker is told to drop the
adapter, so nobody may use it any more, and until the worker says that it has, its slot is not free.
Pure: no waiting here, see router.py.
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
    LEAVING = "leaving"


# By these names the hot path has them at a tenth of the cost (Python 3.11).
COLD: Final = Phase.COLD
LOADING: Final = Phase.LOADING
RESIDENT: Final = Phase.RESIDENT
EVICTING: Final = Phase.EVICTING
LEAVING: Final = Phase.LEAVING

NEXT: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.COLD: frozenset({Phase.LOADING, Phase.RESIDENT}),  # RESIDENT: the worker says it has it
    Phase.LOADING: frozenset({Phase.RESIDENT, Phase.COLD}),
    # COLD: the worker says it lost it
    Phase.RESIDENT: frozenset({Phase.EVICTING, Phase.LEAVING, Phase.COLD}),
    Phase.EVICTING: frozenset({Phase.COLD, Phase.RESIDENT}),
    Phase.LEAVING: frozenset({Phase.COLD, Phase.RESIDENT}),  # RESIDENT: it could not be unloaded
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

    `ready_at` is the loop time at which a load is expected to end; `reload_s` what it took. One that
    `departs` is to be unloaded as soon as nobody uses it (departures.py).
    """

    __slots__ = (
        "adapter",
        "closed",
        "departs",
        "error",
        "foreign",
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
        self.departs = False
        self.pinned = False
        self.foreign = False
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
    `retired` are those that leave as soon as they can; `departing` are the slots that do.
    """

    __slots__ = (
        "_closed",
        "_evicting",
        "_foreign",
        "_gdsf",
        "_idle",
        "_idled",
        "_slots",
        "_victim",
        "capacity",
        "clock",
        "departing",
        "in_use",
        "loading",
        "pins",
        "retired",
        "shares",
    )

    def __init__(self, capacity: int, eviction: Eviction = Eviction.LRU) -> None:
        self.capacity = capacity
        self.pins: Mapping[AdapterRef, object] = {}
        self.retired: Mapping[AdapterRef, object] = {}
        self.departing: dict[AdapterRef, Slot] = {}
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
        self._foreign: tuple[AdapterRef, ...] = ()  # used by other routers
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
            if slot.phase is EVICTING or slot.phase is LEAVING or slot.closed:
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
        if not slot.pinned and (slot.closed or not slot.foreign):
            self._idle[slot.adapter] = slot
            self._victim = None

    def set_foreign(self, adapters: tuple[AdapterRef, ...]) -> None:
        """Other routers use these adapters here, and no others: who they use is not evicted."""
        if adapters == self._foreign:
            return
        before, self._foreign = self._foreign, adapters
        for adapter in before:
            slot = self._slots.get(adapter)
            if slot is not None and slot.foreign and adapter not in adapters:
                slot.foreign = False
                if slot.phase is RESIDENT and not slot.users and adapter not in self._idle:
                    self._fall_idle(slot)
        for adapter in adapters:
            slot = self._slots.get(adapter)
            if slot is not None and not slot.foreign:
                slot.foreign = True
                if not slot.closed and self._idle.pop(adapter, None) is not None:
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
        for slot in self.departing.values():
            if slot.adapter in self._idle:
                return slot
        if self._gdsf:
            return min(self._idle.values(), key=_worth)
        return next(iter(self._idle.values()))

    def close(self, slot: Slot) -> None:
        """Let nobody new use it, until it has fallen idle and left, or is opened; one at a time.

        One that other routers alone use can leave at once: the worker will drain it.
        """
        assert self._closed is None, self._closed
        assert slot.phase is RESIDENT, slot.phase
        slot.closed = True
        self._closed = slot
        self._victim = None
        if slot.foreign and not slot.users:
            self._fall_idle(slot)

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
        if slot.foreign:
            self._idle.pop(slot.adapter, None)
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
        slot = self._new_slot(adapter)
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
            self._remove(victim)
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
        self._remove(slot)
        if slot.users:
            self._out_of_use(slot)
        victim, slot.victim = slot.victim, None
        self._victim = None
        if victim is not None:
            victim.move(RESIDENT)
            self._evicting -= 1
            self._idle_as_before(victim)

    def _idle_as_before(self, slot: Slot) -> None:
        """Back to its place in the order: nothing has used it since it was taken out."""
        self._victim = None
        if slot.pinned or slot.foreign:
            return
        idle = [slot, *self._idle.values()]
        idle.sort(key=_idle_since)
        self._idle = {one.adapter: one for one in idle}

    def adopt(self, adapter: AdapterRef) -> Slot | None:
        """The worker says that it holds the adapter: believe it if there is a slot for it."""
        if adapter in self._slots or self.occupied >= self.capacity:
            return None
        slot = self._new_slot(adapter)
        slot.move(RESIDENT)
        self._slots[adapter] = slot
        self._fall_idle(slot)
        return slot

    def _new_slot(self, adapter: AdapterRef) -> Slot:
        slot = Slot(adapter)
        slot.pinned = adapter in self.pins
        slot.foreign = adapter in self._foreign
        if adapter in self.retired:
            self.depart(slot)
        return slot

    def _remove(self, slot: Slot) -> None:
        """The slot is cold: it is nobody's."""
        del self._slots[slot.adapter]
        self.departing.pop(slot.adapter, None)

    # Adapters are unloaded.

    def depart(self, slot: Slot) -> None:
        """Let the slot be the first to be evicted; who unloads it asks `can_unload`."""
        slot.departs = True
        self.departing[slot.adapter] = slot
        self._victim = None

    def stay(self, slot: Slot) -> None:
        """Let it leave in its turn, as any other."""
        slot.departs = False
        self.departing.pop(slot.adapter, None)
        self._victim = None

    def can_unload(self, slot: Slot) -> bool:
        """Whether it is here and nobody uses it, of this router's or another's."""
        return slot.phase is RESIDENT and not slot.users and not slot.foreign

    def begin_unload(self, slot: Slot) -> None:
        """The worker is told to drop the adapter: nobody may use it, and its slot is not yet free."""
        assert not slot.users, f"{slot.adapter} is in use"
        slot.move(LEAVING)
        self._idle.pop(slot.adapter, None)
        self._victim = None
        if self._closed is slot:
            self._closed = None
            slot.closed = False

    def finish_unload(self, slot: Slot) -> None:
        """The worker has dropped it: the slot is free."""
        slot.move(COLD)
        self._remove(slot)
        self._victim = None

    def fail_unload(self, slot: Slot) -> None:
        """The worker has not: it is resident, and as idle as it was."""
        slot.move(RESIDENT)
        self._idle_as_before(slot)

    def disown(self, slot: Slot) -> bool:
        """The worker refused a request for the adapter: it is not there.

        True if the slot was dropped. It stays where others than the one who was refused use it: they
        are answered, so their word counts for more.
        """
        if slot.phase is not RESIDENT or slot.users > 1:
            return False
        self._lose(slot)
        return True

    def lost(self, slot: Slot) -> bool:
        """The worker counts its adapters, and says that this one has left, whoever thinks to use it."""
        if slot.phase is not RESIDENT:
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
        self._remove(slot)
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
