"""What is offered: cells, and the requests of each. A seed's are the same for every contender.

A cell is a choice of arrivals, load, adapters to a slot and locality. Load is a share of what the
fleet does with a backlog of the same lengths, so that 1.0 means the same in every cell.
"""

import itertools
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Final, assert_never

import msgspec

from benchmarks.support import ROOT
from sim.generate.arrivals import Flash, Gamma, Poisson
from sim.generate.lengths import Pair, empirical
from sim.generate.workload import Adapters, Workload, generate
from sim.report.summary import Slo
from sim.traces import TraceError, TraceRow, read
from sim.workload import AdapterDraw

DATA: Final = ROOT.parent / "shared" / "data"
BASE: Final = "base"
RATIOS: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LOCALITIES: Final = (0.0, 0.5, 0.8)
LOADS: Final = (0.5, 1.0, 1.5)
TRACE_RATIOS: Final = (2.0, 8.0)
TRACE_LOCALITY: Final = 0.8  # that of production traffic (`sim.workload`)
ZIPF: Final = 1.0
BURSTS_CV: Final = 4.0
CROWD_FACTOR: Final = 5.0
CROWD_SHARE: Final = 1 / 6  # of the duration
CROWD_BEGINS: Final = 1 / 3
BACKLOG: Final = 8_000
BACKLOG_RATIO: Final = 0.5


class Source(StrEnum):
    """Where arrivals come from: three laws over the lengths of the Azure trace, or a whole trace."""

    STEADY = "steady"
    BURSTY = "bursty"
    FLASH = "flash crowd"
    AZURE = "azure"
    MOONCAKE = "mooncake"


GENERATED: Final = (Source.STEADY, Source.BURSTY, Source.FLASH)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One workload. `load` is a share of capacity, `ratio` adapters over all slots of the fleet."""

    source: Source
    load: float
    ratio: float
    locality: float

    @property
    def name(self) -> str:
        """In words, as `--only` matches it."""
        return (
            f"{self.source}, load {self.load:g}, adapters/slots {self.ratio:g}, "
            f"locality {self.locality:g}"
        )


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What all cells have in common: the hardware, the goal, and where lengths are from."""

    workers: int = 4
    slots: int = 8
    max_ongoing_requests: int = 64
    calibration: str = "h100-llama-3.1-8b"
    duration_s: float = 60.0
    trace_requests: int = 3000
    slo: Slo = Slo()
    azure: Path = DATA / "azure_llm_2023_conv.csv"
    mooncake: Path = DATA / "mooncake_conversation.jsonl"

    def adapters(self, ratio: float) -> int:
        """How many adapters there are."""
        return max(1, round(ratio * self.workers * self.slots))


class Offered(msgspec.Struct, frozen=True):
    """The requests of a cell and seed, and the seconds over which they come."""

    rows: list[TraceRow]
    span_s: float


def all_cells(sources: Sequence[Source] = tuple(Source)) -> Iterator[Cell]:
    """The grid, then the traces."""
    for source in sources:
        generated = source in GENERATED
        for load, ratio, locality in itertools.product(
            LOADS,
            RATIOS if generated else TRACE_RATIOS,
            LOCALITIES if generated else (TRACE_LOCALITY,),
        ):
            yield Cell(source=source, load=load, ratio=ratio, locality=locality)


def is_quick(cell: Cell) -> bool:
    """Whether a cell belongs to the few that are run while one develops."""
    return cell.ratio in TRACE_RATIOS and cell.locality == TRACE_LOCALITY and cell.load != LOADS[1]


def capacity_source(source: Source) -> Source:
    """The source whose lengths a capacity is measured with: all generated arrivals share one."""
    return Source.STEADY if source in GENERATED else source


def why_not(source: Source, setting: Setting) -> str | None:
    """Why a trace cannot be offered here; None where it can."""
    path = setting.mooncake if source is Source.MOONCAKE else setting.azure
    try:
        rows = _trace(path, setting.trace_requests)
    except TraceError as error:
        return str(error)
    if len(rows) < 2 or rows[0].timestamp == rows[-1].timestamp:
        return f"{path.name} has no span"
    if source is Source.MOONCAKE and not rows[0].hash_ids:
        return f"{path.name} has no hash ids, so it is not the Mooncake trace"
    return None


def offered(cell: Cell, seed: int, setting: Setting, capacity_rps: float) -> Offered:
    """The requests of one cell and seed, at `cell.load` times `capacity_rps` on average."""
    rate_rps = cell.load * capacity_rps
    if cell.source not in GENERATED:
        rows = _with_adapters(_rows_of(cell.source, setting), cell, seed, setting)
        first_ms, last_ms = rows[0].timestamp, rows[-1].timestamp
        slower = len(rows) / (last_ms - first_ms) * 1000 / rate_rps
        rows = [
            msgspec.structs.replace(row, timestamp=(row.timestamp - first_ms) * slower)
            for row in rows
        ]
        return Offered(rows, (last_ms - first_ms) / 1000 * slower)
    return Offered(_generated(cell, seed, setting, rate_rps), setting.duration_s)


def backlog(source: Source, setting: Setting, seed: int = 0) -> list[TraceRow]:
    """Requests that all come at once, of the lengths of a source: what capacity is measured with."""
    cell = Cell(source=source, load=1.0, ratio=BACKLOG_RATIO, locality=TRACE_LOCALITY)
    if source in GENERATED:
        endless = msgspec.structs.replace(setting, duration_s=float(BACKLOG))
        rows = _generated(cell, seed, endless, 2.0)[:BACKLOG]
    else:
        rows = _with_adapters(_rows_of(source, setting), cell, seed, setting)
    return [msgspec.structs.replace(row, timestamp=0.0) for row in rows]


def _generated(cell: Cell, seed: int, setting: Setting, rate_rps: float) -> list[TraceRow]:
    pairs = _lengths(setting.azure)
    adapters = setting.adapters(cell.ratio)
    duration_s = setting.duration_s
    arrivals: Poisson | Gamma
    flashes: tuple[Flash, ...] = ()
    match cell.source:
        case Source.STEADY:
            arrivals = Poisson(rate_rps)
        case Source.BURSTY:
            arrivals = Gamma(rate_rps, BURSTS_CV)
        case Source.FLASH:
            # Fewer before and after, so that with the crowd the mean is that of the other arrivals.
            arrivals = Poisson(rate_rps / (1.0 + (CROWD_FACTOR - 1.0) * CROWD_SHARE))
            # The middle one by popularity: few asked for it before.
            flashes = (
                Flash(
                    duration_s * CROWD_BEGINS,
                    duration_s * CROWD_SHARE,
                    CROWD_FACTOR,
                    _adapter(adapters, adapters // 2),
                ),
            )
        case Source.AZURE | Source.MOONCAKE:
            raise AssertionError(cell.source)
        case _:
            assert_never(cell.source)
    return list(
        generate(
            Workload(
                seed=seed,
                arrivals=arrivals,
                lengths=empirical(setting.azure.name, pairs),
                duration_s=duration_s,
                flashes=flashes,
                base=BASE,
                adapters=Adapters(adapters, ZIPF, cell.locality),
            ),
            pairs,
        )
    )


def _rows_of(source: Source, setting: Setting) -> tuple[TraceRow, ...]:
    path = setting.mooncake if source is Source.MOONCAKE else setting.azure
    return _trace(path, setting.trace_requests)


def _with_adapters(
    rows: Sequence[TraceRow], cell: Cell, seed: int, setting: Setting
) -> list[TraceRow]:
    draw = AdapterDraw(setting.adapters(cell.ratio), locality=cell.locality, zipf=ZIPF, seed=seed)
    return [msgspec.structs.replace(row, model=f"{BASE}:{draw.next()}") for row in rows]


@lru_cache(maxsize=4)
def _trace(path: Path, limit: int) -> tuple[TraceRow, ...]:
    return tuple(itertools.islice(read(path), limit))


@lru_cache(maxsize=2)
def _lengths(path: Path) -> tuple[Pair, ...]:
    return tuple((row.input_length, row.output_length) for row in read(path))


def _adapter(count: int, number: int) -> str:
    """The name that `sim.workload` gives it."""
    return f"adapter-{number:0{max(4, len(str(count - 1)))}d}"
