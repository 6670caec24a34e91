"""The workers of one base model, and what the router knows of each: its own count first.

Truth is kept in this order:
  1. what this router has in flight, counted at the moment of decision, before any await;
  2. what the worker pushes (`Report`), which is late by nature: it corrects the ledger, and says what
     other routers have in flight there, which is added to our own count.
So a burst cannot pile onto one worker in the time that a report takes. What several routers decide at
once the worker arbitrates: it refuses, and the refused decide again (`refused`).

Indexes keep placement cheap: the holders of each adapter, who has it in host memory, the workers that
are not overloaded, and those of them with a slot to give. They change by a constant amount of work
when a job comes or goes.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from math import exp
from random import Random
from typing import Final

import msgspec

from router.core.demand import MEMORY_S, Demand
from router.core.job import AdapterRef, Job, LoadError, LoadFault
from router.core.prefixes import PrefixIndex
from router.core.residency import COLD, RESIDENT, Eviction, Slot, SlotCache
from router.core.shares import Shares, Tenants
from router.core.timing import EngineTimes, Learned, Tier, new_pace

# The adapters that are known to be on the host's disk; of who is forgotten, a load is taken for longer.
STAGED_MAX: Final = 1 << 17
STAY_MAX_S: Final = 600.0


class Hold(StrEnum):
    """Why a worker gets nothing new. Each is taken back by who gave it: one does not lift another."""

    SILENT = "silent"  # it does not say how it is
    DRAIN = "drain"  # an operator wants it empty


class Report(msgspec.Struct, frozen=True, gc=False):
    """What a worker said of itself, last. `seq` rises with every change of its adapters.

    `others` counts the requests that other routers have there, `used` are the adapters of those.
    """

    seq: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    gpu: tuple[AdapterRef, ...] = ()
    host: tuple[AdapterRef, ...] = ()
    others: int = 0
    used: tuple[AdapterRef, ...] = ()


class LoadRefusedError(LoadError):
    """The worker refused a load because of another router, and said how things are there."""

    def __init__(self, message: str, report: Report | None) -> None:
        super().__init__(LoadFault.CONTENDED, message)
        self.report = report


class Worker:
    """One engine: what is in flight there, its slots, its last report.

    `busy_until` is the loop time at which the prompts sent there will have been computed, were nothing
    else to do; `context_tokens` what those in flight hold in its memory, `kv_tokens` how many tokens
    that holds (0: not known); `pace` how long its steps take relative to what is predicted.
    `in_flight` are this router's requests, `ongoing` all that are there as far as is known. Workers
    are looked at in the order of their `rank`, so that routers which see the same choose the same.
    It is `accepting` new jobs while nothing `holds` them back.
    """

    __slots__ = (
        "accepting",
        "busy_until",
        "completed",
        "context_tokens",
        "holds",
        "host",
        "id",
        "in_flight",
        "kept_for",
        "kv_tokens",
        "max_ongoing",
        "number",
        "ongoing",
        "others",
        "pace",
        "places",
        "rank",
        "ready_index",
        "report",
        "seq_floor",
        "seq_settled",
        "slots",
    )

    def __init__(
        self,
        worker_id: str,
        *,
        max_ongoing: int,
        slots: int,
        eviction: Eviction = Eviction.LRU,
        kv_tokens: int = 0,
        rank: int = 0,
    ) -> None:
        assert max_ongoing > 0, max_ongoing
        self.rank = rank
        self.id = worker_id
        self.number = 0  # in the fleet's order, once it is in one
        self.max_ongoing = max_ongoing
        self.slots = SlotCache(slots, eviction)
        self.places = Shares(max_ongoing)
        self.kv_tokens = kv_tokens
        self.kept_for: Job | None = None  # who has waited long for its memory
        self.in_flight = 0
        self.others = 0
        self.ongoing = 0
        self.completed = 0
        self.accepting = True
        self.holds: dict[Hold, None] = {}
        self.report = Report()
        self.host: Mapping[AdapterRef, None] = {}
        self.busy_until = 0.0
        self.context_tokens = 0.0
        self.pace = 1.0
        self.seq_floor = 0
        self.seq_settled = -1
        self.ready_index = -1

    @property
    def overloaded(self) -> bool:
        """Whether it has `max_ongoing_requests` in flight, other routers' included."""
        return self.ongoing >= self.max_ongoing

    def can_serve(self, adapter: AdapterRef | None, tenant: str = "") -> bool:
        """Whether the tenant may have a place here, and the adapter is held or can have a slot."""
        places = self.places
        if not places.tenants.alone and not places.may_open(
            tenant, self.max_ongoing - self.ongoing
        ):
            return False
        return adapter is None or self.slots.can_serve(adapter, tenant)

    def __repr__(self) -> str:
        return f"<Worker {self.id} in_flight={self.in_flight} slots={len(self.slots)}>"


class Fleet:
    """All workers of one base model. Changes only through the methods here."""

    def __init__(self, model: str, times: EngineTimes | None = None) -> None:
        self.model = model
        self.learned = Learned(times or EngineTimes())
        self.demand = Demand()
        self.prefixes = PrefixIndex()
        self.pins: dict[AdapterRef, None] = {}
        self.retired: dict[AdapterRef, None] = {}  # see departures.py
        self.tenants = Tenants()
        # How many holders an adapter should have, where that is not one (see replicas.py).
        self.targets: dict[AdapterRef, int] = {}
        self.users: dict[AdapterRef, int] = {}  # jobs in flight
        self.evicted = 0.0  # a count of evictions that fades as `demand` does
        self.evicted_at = 0.0
        self._slots = 0
        self._staged: OrderedDict[AdapterRef, None] = OrderedDict()
        self._workers: dict[str, Worker] = {}
        self._in_host: dict[AdapterRef, dict[str, Worker]] = {}
        self._holders: dict[AdapterRef, dict[str, Worker]] = {}
        self._ready: list[Worker] = []
        self._spare: dict[Worker, None] = {}  # of those, who has a slot to give
        self._joined = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        """The worker of that id, or None where it is not, or no longer, of the fleet."""
        return self._workers.get(worker_id)

    @property
    def ready(self) -> Sequence[Worker]:
        """Workers that accept jobs and are not overloaded, in no order that means anything."""
        return self._ready

    def within_reach(self, adapter: AdapterRef | None) -> Sequence[Worker]:
        """Of the ready, in their order, who holds the adapter or has a slot for it: no other serves it.

        O(found x log), however many are ready: nothing where every slot is in use.
        """
        if adapter is None or len(self._spare) == len(self._ready):
            return self._ready
        spare = self._spare
        found = list(spare)
        if held := self._holders.get(adapter):
            found += [
                worker
                for worker in held.values()
                if worker.ready_index >= 0 and worker not in spare
            ]
        found.sort(key=_ready_index)
        return found

    def holders(self, adapter: AdapterRef) -> Sequence[Worker]:
        """Workers where the adapter is resident or loading, in the order in which they got it."""
        held = self._holders.get(adapter)
        return tuple(held.values()) if held else ()

    def holder_count(self, adapter: AdapterRef) -> int:
        """How many those are."""
        held = self._holders.get(adapter)
        return len(held) if held else 0

    def resident(self, adapter: AdapterRef) -> Sequence[Worker]:
        """The holders that have the adapter now: there, nobody need wait for a load."""
        return [
            worker
            for worker in self.holders(adapter)
            if (slot := worker.slots.get(adapter)) is not None and slot.phase is RESIDENT
        ]

    def in_host_memory(self, adapter: AdapterRef) -> Sequence[Worker]:
        """Workers that said that they have the adapter in host memory and in no slot."""
        held = self._in_host.get(adapter)
        return tuple(held.values()) if held else ()

    # Where adapters are loaded from.

    def staged(self, adapter: AdapterRef) -> bool:
        """Whether the adapter is known to be on the host's disk."""
        return adapter in self._staged

    def stage(self, adapter: AdapterRef) -> None:
        """The adapter is on the host's disk now."""
        self._staged[adapter] = None
        self._staged.move_to_end(adapter)
        if len(self._staged) > STAGED_MAX:
            self._staged.popitem(last=False)

    def tier(self, worker: Worker, adapter: AdapterRef) -> Tier:
        """Where the worker would load the adapter from."""
        if adapter in worker.host:
            return Tier.HOST
        return Tier.DISK if adapter in self._staged else Tier.STORE

    def stay_s(self, now: float) -> float:
        """How long an adapter stays in a slot, at the rate at which they have been evicted of late."""
        rate = self._evictions(now) / MEMORY_S
        return min(self._slots / rate, STAY_MAX_S) if rate > 0.0 else STAY_MAX_S

    def _evictions(self, now: float) -> float:
        return self.evicted * exp((self.evicted_at - now) / MEMORY_S)

    # Members come and go.

    def add(self, worker: Worker) -> None:
        """A worker joins; its id must be new."""
        assert worker.id not in self._workers, worker.id
        last = next(reversed(self._workers.values()), None)
        self._workers[worker.id] = worker
        self._joined += 1
        worker.number = self._joined
        if last is not None and last.rank > worker.rank:
            self._workers = {one.id: one for one in sorted(self, key=_rank)}
        worker.slots.pins = self.pins
        worker.slots.retired = self.retired
        worker.slots.shares.join(self.tenants, self.tenants.slots)
        worker.places.join(self.tenants, self.tenants.places)
        self._slots += worker.slots.capacity
        for slot in worker.slots:
            self._index(worker, slot)
        worker.accepting = not worker.holds
        self._settle(worker)

    def remove(self, worker: Worker) -> None:
        """A worker leaves at once. Leases on it still end by `release`, which then only counts."""
        del self._workers[worker.id]
        worker.accepting = False
        self._settle(worker)
        for slot in worker.slots:
            self._unindex(worker, slot)
        self._slots -= worker.slots.capacity
        worker.slots.shares.leave()
        worker.places.leave()
        self._hosts(worker, {})
        self.prefixes.forget(worker.id)

    def hold(self, worker: Worker, why: Hold, *, held: bool) -> None:
        """Stop or resume new jobs for a worker, as far as that reason goes; what runs is untouched."""
        if held:
            worker.holds[why] = None
        else:
            worker.holds.pop(why, None)
        if self._workers.get(worker.id) is not worker:
            return  # it has left; a late word of it must not bring it back
        worker.accepting = not worker.holds
        self._settle(worker)

    # A job comes and goes.

    def reserve(
        self, worker: Worker, adapter: AdapterRef | None, tenant: str = ""
    ) -> tuple[Slot | None, bool]:
        """Take a place on the worker, and a use of the adapter's slot.

        Returns the slot and whether the caller must now load the adapter into it.
        """
        worker.in_flight += 1
        worker.ongoing += 1
        worker.places.opened(tenant)
        full = worker.ongoing >= worker.max_ongoing
        if adapter is None:
            if full:
                self._settle(worker)
            return None, False
        slot = worker.slots.get(adapter)
        begin = slot is None
        if slot is None:
            slot = self.begin_load(worker, adapter)
        worker.slots.acquire(slot, tenant)
        if full or (slot.users == 1 and not worker.slots.spare):
            self._settle(worker)
        self.users[adapter] = self.users.get(adapter, 0) + 1
        return slot, begin

    def begin_load(self, worker: Worker, adapter: AdapterRef) -> Slot:
        """Promise the adapter a slot, which nobody uses yet. It is cold there, and can be served."""
        slot = worker.slots.begin_load(adapter)
        self._index(worker, slot)
        if slot.victim is not None:
            self._unindex(worker, slot.victim)
        self._settle(worker)
        return slot

    def release(self, worker: Worker, slot: Slot | None, tenant: str = "") -> None:
        """Give back what `reserve` took."""
        assert worker.in_flight > 0, worker
        worker.in_flight -= 1
        worker.ongoing -= 1
        worker.places.closed(tenant)
        worker.completed += 1
        if worker.ready_index < 0:
            self._settle(worker)
        if slot is None:
            return
        left = self.users[slot.adapter] - 1
        if left:
            self.users[slot.adapter] = left
        else:
            del self.users[slot.adapter]
        if slot.phase is not COLD and worker.slots.release(slot) and worker not in self._spare:
            self._settle(worker)

    def begin_work(self, worker: Worker, job: Job, cached_tokens: int, now: float) -> float:
        """Count the job's tokens in, at the moment of decision; return what `end_work` takes out."""
        tokens = job.prompt_tokens - cached_tokens
        prefill_s = self.learned.times.prefill_s(tokens, lora=job.adapter is not None)
        begins = max(worker.busy_until, now)
        worker.busy_until = begins + prefill_s * worker.pace
        context = tokens + self.learned.expected_output(job.max_output_tokens)
        worker.context_tokens += context
        if job.prefix:
            self.prefixes.sent(job.adapter, job.prefix, worker.id)
        return context

    def end_work(self, worker: Worker, context_tokens: float) -> None:
        """Count them out."""
        worker.context_tokens -= context_tokens
        if not worker.in_flight:
            worker.context_tokens = 0.0  # whatever rounding has left
            worker.busy_until = 0.0  # and whatever prompt was given up, or refused

    def learn_pace(self, worker: Worker, step_s: float) -> None:
        """A token took so long there, with what is in flight now."""
        predicted_s = self.learned.times.step_s(
            worker.ongoing, worker.slots.in_use, worker.context_tokens
        )
        worker.pace = new_pace(worker.pace, predicted_s, step_s)

    # An adapter comes and goes.

    def finish_load(self, worker: Worker, slot: Slot, seq: int, now: float = 0.0) -> Slot | None:
        """The adapter is resident as of the worker's state `seq`. Returns the evicted slot."""
        worker.seq_floor = max(worker.seq_floor, seq)
        worker.seq_settled = -1  # where another router had loaded it, the victim has not left
        victim = worker.slots.finish_load(slot)
        self._settle(worker)
        if victim is not None:
            self.evicted = 1.0 + self._evictions(now)
            self.evicted_at = now
        return victim

    def fail_load(self, worker: Worker, slot: Slot) -> None:
        """The adapter did not come; whatever it was to replace is a holder again."""
        assert slot.error is not None
        victim = slot.victim
        worker.slots.fail_load(slot, slot.error)
        self._unindex(worker, slot)
        if victim is not None and self._workers.get(worker.id) is worker:
            self._index(worker, victim)
        self._settle(worker)

    def begin_unload(self, worker: Worker, slot: Slot) -> None:
        """The worker is told to drop an adapter that nobody uses: it is no holder any more."""
        worker.slots.begin_unload(slot)
        self._unindex(worker, slot)
        self._settle(worker)

    def finish_unload(self, worker: Worker, slot: Slot, seq: int) -> None:
        """The adapter has left, as of the worker's state `seq`."""
        worker.seq_floor = max(worker.seq_floor, seq)
        worker.seq_settled = -1
        worker.slots.finish_unload(slot)
        self._settle(worker)

    def fail_unload(self, worker: Worker, slot: Slot) -> None:
        """It has not: the worker is a holder again."""
        worker.slots.fail_unload(slot)
        if self._workers.get(worker.id) is worker:
            self._index(worker, slot)
            self._settle(worker)

    def observe(self, worker: Worker, report: Report, now: float = 0.0) -> None:
        """Take in a worker's report; its word on adapters counts unless a load has overtaken it."""
        if report.host != worker.report.host and self._workers.get(worker.id) is worker:
            self._hosts(worker, dict.fromkeys(report.host))
        worker.report = report
        # Before the count, which puts the worker where it belongs by who may leave now.
        worker.slots.set_foreign(report.used)
        self._set_others(worker, report.others)
        if report.waiting == 0 and report.running >= worker.ongoing and worker.in_flight:
            # All that was sent there is in its batch: no prompt waits, whatever was predicted.
            worker.busy_until = min(worker.busy_until, now)
        if report.seq == worker.seq_settled:  # nothing has moved since the ledger agreed with it
            return
        if self._workers.get(worker.id) is not worker or report.seq < worker.seq_floor:
            return
        held = dict.fromkeys((*report.gpu, *report.host))
        settled = True
        for slot in tuple(worker.slots):
            if slot.adapter not in held:
                if worker.slots.forget(slot):
                    self._unindex(worker, slot)
                else:  # in use, or on its way: to be looked at again
                    settled = False
        for adapter in report.gpu:
            if adopted := worker.slots.adopt(adapter):
                self._index(worker, adopted)
            elif worker.slots.get(adapter) is None:
                settled = False
        worker.seq_settled = report.seq if settled else -1
        self._settle(worker)

    def _set_others(self, worker: Worker, others: int) -> None:
        worker.ongoing += others - worker.others
        worker.others = others
        if self._workers.get(worker.id) is worker:
            self._settle(worker)

    def found_full(self, worker: Worker) -> None:
        """The worker refused a request, which is counted still: other routers have filled it.

        So it stays until its next word.
        """
        self._set_others(worker, max(worker.others, worker.max_ongoing - worker.in_flight + 1))

    def found_gone(self, worker: Worker, slot: Slot) -> None:
        """The worker refused a request: another router has evicted its adapter since."""
        if worker.slots.get(slot.adapter) is slot and worker.slots.lost(slot):
            worker.seq_settled = -1
            self._unindex(worker, slot)
            self._settle(worker)

    def disown(self, worker: Worker, adapter: AdapterRef) -> None:
        """The worker said that it does not hold an adapter that the ledger has as resident."""
        slot = worker.slots.get(adapter)
        if slot is not None and worker.slots.disown(slot):
            self._unindex(worker, slot)
            self._settle(worker)

    # A slot is closed, opened, pinned.

    def close_slot(self, worker: Worker, slot: Slot) -> None:
        """Send nobody new to the adapter there, so that its slot falls idle."""
        worker.slots.close(slot)
        self._unindex(worker, slot)
        self._settle(worker)  # one that other routers alone use can leave now

    def open_slot(self, worker: Worker, slot: Slot) -> bool:
        """Send jobs there again. False where the slot is not closed, or has gone."""
        opened = worker.slots.open(slot)
        if self._workers.get(worker.id) is worker:
            if opened:
                self._index(worker, slot)
            self._settle(worker)
        return opened

    def pin(self, adapter: AdapterRef, *, pinned: bool) -> None:
        """Never evict the adapter from where it is or comes to be, or evict it again as any other."""
        if pinned:
            self.pins[adapter] = None
        else:
            self.pins.pop(adapter, None)
        for worker in self._workers.values():
            slot = worker.slots.get(adapter)
            if slot is not None:
                worker.slots.pin(slot, pinned=pinned)
                self._settle(worker)

    # The indexes.

    def _hosts(self, worker: Worker, host: Mapping[AdapterRef, None]) -> None:
        for adapter in worker.host:
            if adapter not in host and (held := self._in_host.get(adapter)) is not None:
                held.pop(worker.id, None)
                if not held:
                    del self._in_host[adapter]
        for adapter in host:
            self._in_host.setdefault(adapter, {})[worker.id] = worker
        worker.host = host

    def _index(self, worker: Worker, slot: Slot) -> None:
        self._holders.setdefault(slot.adapter, {})[worker.id] = worker

    def _unindex(self, worker: Worker, slot: Slot) -> None:
        held = self._holders.get(slot.adapter)
        # By identity: a worker that is started again has the id of the one that is gone.
        if held is None or held.get(worker.id) is not worker:
            return
        del held[worker.id]
        if not held:
            del self._holders[slot.adapter]

    def _settle(self, worker: Worker) -> None:
        """Put the worker among those that are ready, and those with a slot, or take it out, in O(1)."""
        wanted = worker.accepting and not worker.overloaded
        index = worker.ready_index
        if wanted and index < 0:
            worker.ready_index = len(self._ready)
            self._ready.append(worker)
        elif not wanted and index >= 0:
            last = self._ready.pop()
            if last is not worker:
                self._ready[index] = last
                last.ready_index = index
            worker.ready_index = -1
        if wanted and worker.slots.spare:
            self._spare[worker] = None
        else:
            self._spare.pop(worker, None)


def _ready_index(worker: Worker) -> int:
    return worker.ready_index


def two_of(workers: Sequence[Worker], rng: Random) -> tuple[Worker, Worker]:
    """Two different workers, every ordered pair as likely; there must be two."""
    count = len(workers)
    first = int(rng.random() * count)
    second = int(rng.random() * (count - 1))
    if second >= first:
        second += 1
    return workers[first], workers[second]


def less_busy_of_two(workers: Sequence[Worker], rng: Random) -> Worker | None:
    """Power of two choices: draw two different workers, take the one with less in flight.

    Mitzenmacher, "The power of two choices in randomized load balancing" (2001): two draws give
    most of what looking at all gives, and many routers doing it do not herd.
    """
    if len(workers) < 2:  # noqa: PLR2004
        return workers[0] if workers else None
    one, other = two_of(workers, rng)
    if one.ongoing == other.ongoing:
        # Equally busy: rather the one with more slots left, so that adapters spread before they evict.
        return other if other.slots.occupied < one.slots.occupied else one
    return other if other.ongoing < one.ongoing else one


def _rank(worker: Worker) -> int:
    return worker.rank
