"""What the command line shows of adapters and workers: tables, the id first and never cut."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from rich.markup import escape
from rich.table import Table

from router.lifecycle.wire import ModelWorkers
from router.lifecycle.words import AdapterStatus, Change, Residence, VersionStatus, WorkerStatus

MINUTE_S: Final = 60
HOUR_S: Final = 3600
DAY_S: Final = 86_400
KILO: Final = 1000.0
# So many workers are named; of more, their number is said.
NAMED_MAX: Final = 4


def adapter_table(adapters: Iterable[AdapterStatus]) -> Table:
    """Adapters, one a row."""
    table = _table("adapter", "tier", "workers", "version")
    for column in ("rank", "size", "requests", "hits", "loads", "last use"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for one in adapters:
        notes = ["pinned"] * one.pinned
        notes += [f"trial {version.weight:.0%}" for version in _trials(one)]
        table.add_row(
            escape(one.id),
            one.tier,
            _places(_workers_of(one)),
            escape(one.version) or "-",
            "-" if one.rank is None else str(one.rank),
            _size(one.bytes),
            f"{one.requests:,}",
            f"{one.hits:,}",
            f"{one.cold_loads:,}",
            _ago(one.last_used_s),
            ", ".join(notes),
        )
    return table


def version_table(versions: Iterable[VersionStatus]) -> Table:
    """The versions of one adapter, one a row."""
    table = _table("version", "state", "workers", "on disk")
    for column in ("share", "requests", "failures"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in versions:
        table.add_row(
            escape(one.version),
            one.state.value,
            _places(one.workers),
            "yes" if one.on_disk else "no",
            f"{one.weight:.0%}",
            f"{one.requests:,}",
            f"{one.failures:,}",
        )
    return table


def worker_table(models: Iterable[ModelWorkers]) -> Table:
    """Workers, one a row."""
    table = _table("worker", "state")
    for column in ("requests", "slots"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("adapters")
    for model in models:
        for one in model.workers:
            beginning = f"{model.model}:"
            table.add_row(
                escape(one.id),
                _state(one),
                f"{one.ongoing}/{one.max_ongoing}",
                f"{len(one.adapters)}/{one.slots}",
                escape(", ".join(name.removeprefix(beginning) for name in one.adapters)),
            )
    return table


def change_text(change: Change) -> str:
    """What was done, and what became of each worker."""
    lines = [f"{change.id}: {change.message}"]
    lines += [f"  {worker}: {outcome}" for worker, outcome in change.workers.items()]
    return "\n".join(lines)


def _table(first: str, *more: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, overflow="fold")
    for name in more:
        table.add_column(name, overflow="fold")
    return table


def _trials(adapter: AdapterStatus) -> list[VersionStatus]:
    return [one for one in adapter.versions if one.state == "candidate"]


def _workers_of(adapter: AdapterStatus) -> dict[str, Residence]:
    serving = [one for one in adapter.versions if one.version == adapter.version]
    return serving[0].workers if serving else {}


def _places(workers: Mapping[str, Residence]) -> str:
    if not workers:
        return "-"
    if len(workers) > NAMED_MAX:
        counts = Counter(residence.value for residence in workers.values())
        return ", ".join(f"{count} {residence}" for residence, count in sorted(counts.items()))
    return ", ".join(
        escape(worker) if there is Residence.RESIDENT else f"{escape(worker)} ({there.value})"
        for worker, there in workers.items()
    )


def _state(worker: WorkerStatus) -> str:
    if worker.draining:
        return "draining"
    return "accepting" if worker.accepting else "away"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    shown = float(size)
    for unit in ("B", "kB", "MB"):
        if shown < KILO:
            return f"{shown:.0f} {unit}" if unit == "B" else f"{shown:.1f} {unit}"
        shown /= KILO
    return f"{shown:.1f} GB"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit_s, unit in ((DAY_S, "d"), (HOUR_S, "h"), (MINUTE_S, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
