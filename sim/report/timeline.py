"""What a replay looked like over its time: queue, load, residency, hits, in bounded samples.

A sampler reads and changes nothing: it draws no random number and decides nothing, so a replay that
is sampled has the digest of one that is not. It is a timer of the replay's own loop. When it holds
twice as many samples as it wants, every other one goes and the interval doubles, so that its memory
is bounded however long the replay's tail is.
"""

import asyncio
import itertools
import statistics
from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final

import msgspec

from router.core.fleet import Worker
from router.core.job import AdapterUse
from router.core.residency import Phase, Slot
from router.core.router import Router

SAMPLES: Final = 600
THINNINGS_MAX: Final = 12  # 4,096 spans of the trace: what takes longer has come to a standstill
INTERVAL_MIN_S: Final = 1e-3
SLOTS_SAMPLED_MAX: Final = 2_048  # over all workers; at 4 bytes each 10 MB at most
ROWS_MAX: Final = 72  # of the residency chart
COLUMNS_MAX: Final = 240
LOAD_COLUMNS_MAX: Final = 150
BINS: Final = 60  # of rates, which need a time to count over
WORKERS_NAMED_MAX: Final = 8


class Held(IntEnum):
    """What a slot holds, from the least telling to the most: a chart's cell shows the largest."""

    COLD = 0
    RESIDENT = 1
    IN_USE = 2
    LOADING = 3


class ResidencyRow(msgspec.Struct, frozen=True):
    """One adapter on one worker: `held` has a `Held` for each time of `Timeline.residency_s`."""

    worker: str
    adapter: str
    held: tuple[int, ...]


class Timeline(msgspec.Struct, frozen=True):
    """Series over virtual time, in seconds. Rates are over the bin that ends at their time.

    `in_flight` is the mean over the bin that begins at its time, by worker where there are few, else
    `least`, `mean` and `most` over the workers.
    `omitted` says what was left out of the residency, and is empty where nothing was.
    """

    at_s: tuple[float, ...]
    queued: tuple[int, ...]
    load_at_s: tuple[float, ...]
    in_flight: dict[str, tuple[float, ...]]
    rate_at_s: tuple[float, ...]
    hit_rate: tuple[float | None, ...]
    cold_loads_per_s: tuple[float, ...]
    residency_s: tuple[float, ...]
    residency: tuple[ResidencyRow, ...]
    omitted: str


class _Sample(msgspec.Struct, frozen=True):
    at_s: float
    queued: int
    in_flight: "array[int]"
    hits: int
    cold: int
    placed: int
    slots: "array[int]"  # (worker × adapters + adapter) × 4 + Held, of what is held


class Sampler:
    """Give one to a `Replay`; take its `timeline` after the run. `span_s` is the trace's length."""

    def __init__(self, span_s: float) -> None:
        self._interval_s = max(span_s / SAMPLES, INTERVAL_MIN_S)
        self._thinnings = 0
        self._samples: list[_Sample] = []
        self._adapters: dict[str, int] = {}
        self._routers: Sequence[Router] = ()
        self._uses: Mapping[AdapterUse, int] = {}
        self._workers: list[Worker] = []
        self._sampled = 0

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        routers: Sequence[Router],
        uses: Mapping[AdapterUse, int],
    ) -> None:
        """Begin: read the routers, and `uses` (placements so far), from now to the loop's end."""
        self._routers, self._uses = routers, uses
        self._workers = [worker for router in routers for worker in router.fleet]
        slots = 0
        for worker in self._workers:
            slots += worker.slots.capacity
            self._sampled += slots <= SLOTS_SAMPLED_MAX
        self._tick(loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._samples.append(self._sample(loop.time()))
        if len(self._samples) == 2 * SAMPLES:
            if self._thinnings == THINNINGS_MAX:
                return
            self._thinnings += 1
            self._interval_s *= 2
            del self._samples[1::2]
        loop.call_later(self._interval_s, self._tick, loop)

    def _sample(self, now: float) -> _Sample:
        adapters = self._adapters
        slots = array("L")
        for number, worker in enumerate(self._workers[: self._sampled]):
            for slot in worker.slots:
                adapter = adapters.setdefault(slot.adapter.name, len(adapters))
                slots.append((adapter * self._sampled + number) * len(Held) + _held(slot))
        uses = self._uses
        return _Sample(
            now,
            sum(router.queued for router in self._routers),
            array("L", (worker.in_flight for worker in self._workers)),
            uses[AdapterUse.HIT],
            uses[AdapterUse.COLD],
            sum(count for use, count in uses.items() if use is not AdapterUse.NONE),
            slots,
        )

    def timeline(self) -> Timeline:
        """The series, after the run."""
        samples = self._samples
        rate_at_s, hit_rate, cold_loads_per_s = self._rates()
        residency_s, residency = self._residency()
        return Timeline(
            at_s=tuple(sample.at_s for sample in samples),
            queued=tuple(sample.queued for sample in samples),
            load_at_s=tuple(sample.at_s for sample in samples[:: self._load_step()]),
            in_flight=self._in_flight(),
            rate_at_s=rate_at_s,
            hit_rate=hit_rate,
            cold_loads_per_s=cold_loads_per_s,
            residency_s=residency_s,
            residency=residency,
            omitted=self._omitted(len(residency)),
        )

    def _in_flight(self) -> dict[str, tuple[float, ...]]:
        step, loads = self._load_step(), [sample.in_flight for sample in self._samples]
        bins = [loads[start : start + step] for start in range(0, len(loads), step)]
        # For each bin the mean of each worker.
        means = [
            [statistics.fmean(column) for column in zip(*group, strict=True)] for group in bins
        ]
        if len(self._workers) <= WORKERS_NAMED_MAX:
            return {
                worker.id: tuple(row[number] for row in means)
                for number, worker in enumerate(self._workers)
            }
        return {
            "least": tuple(min(row) for row in means),
            "mean": tuple(statistics.fmean(row) for row in means),
            "most": tuple(max(row) for row in means),
        }

    def _load_step(self) -> int:
        return -(-len(self._samples) // LOAD_COLUMNS_MAX)

    def _rates(
        self,
    ) -> tuple[tuple[float, ...], tuple[float | None, ...], tuple[float, ...]]:
        step = max(1, len(self._samples) // BINS)
        marks = self._samples[::step]
        at_s: list[float] = []
        hit_rate: list[float | None] = []
        cold: list[float] = []
        for start, end in itertools.pairwise(marks):
            placed = end.placed - start.placed
            at_s.append(end.at_s)
            hit_rate.append((end.hits - start.hits) / placed if placed else None)
            cold.append((end.cold - start.cold) / (end.at_s - start.at_s))
        return tuple(at_s), tuple(hit_rate), tuple(cold)

    def _residency(self) -> tuple[tuple[float, ...], tuple[ResidencyRow, ...]]:
        """The rows that are held longest, as many for each worker, in the order of their coming."""
        if not self._sampled:
            return (), ()
        each = max(1, ROWS_MAX // self._sampled)
        held_for: dict[int, int] = {}  # in the order of coming
        for sample in self._samples:
            for code in sample.slots:
                row = code // len(Held)
                held_for[row] = held_for.get(row, 0) + 1
        names = list(self._adapters)
        step = -(-len(self._samples) // COLUMNS_MAX)
        columns = -(-len(self._samples) // step)
        shown: dict[int, list[int]] = {}
        for number in range(min(self._sampled, ROWS_MAX)):
            mine = [row for row in held_for if row % self._sampled == number]
            longest = sorted(mine, key=lambda row: -held_for[row])[:each]
            kept = dict.fromkeys(longest)
            shown |= {row: [Held.COLD] * columns for row in mine if row in kept}
        for index, sample in enumerate(self._samples):
            for code in sample.slots:
                row, held = divmod(code, len(Held))
                if (cells := shown.get(row)) is not None:
                    cells[index // step] = max(cells[index // step], held)
        rows = tuple(
            ResidencyRow(
                self._workers[row % self._sampled].id, names[row // self._sampled], tuple(cells)
            )
            for row, cells in shown.items()
        )
        return tuple(sample.at_s for sample in self._samples[::step]), rows

    def _omitted(self, rows: int) -> str:
        seen: dict[int, None] = {}
        for sample in self._samples:
            seen.update(dict.fromkeys(code // len(Held) for code in sample.slots))
        parts = []
        if len(seen) > rows:
            parts.append(
                f"the {rows} pairs of worker and adapter that were held longest, of {len(seen):,}"
            )
        if self._sampled < len(self._workers):
            parts.append(f"the first {self._sampled} of {len(self._workers)} workers")
        return f"Shown: {', and of '.join(parts)}." if parts else ""


def _held(slot: Slot) -> Held:
    if slot.phase is Phase.LOADING:
        return Held.LOADING
    return Held.IN_USE if slot.users else Held.RESIDENT
