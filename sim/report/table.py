"""Results as tables, for a terminal and for a page alike."""

import os
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from sim.answers import apart
from sim.experiment import Point
from sim.report.intervals import Estimate, paired
from sim.report.metrics import SHOWN, Metric, interval

FILE_COLUMNS: Final = 160
BEST: Final = "★ "  # before a cell that is the best of its column, beyond doubt
LATENCY_COLUMNS: Final = ("mean", "p50", "p90", "p99")
LATENCY_NAMES: Final = {
    "ttft_s": "time to first token",
    "itl_s": "between tokens",
    "e2e_s": "end to end",
}
WORKER_COLUMNS: Final = ("id", "requests", "hits", "loads", "evictions", "in flight, peak", "busy")


class Table(msgspec.Struct, frozen=True):
    """Columns and rows as text. The first `words` columns are words, the rest are figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    words: int = 1


def output() -> Console:
    """The console for results: as wide as the terminal, and wide enough for a table in a file."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_COLUMNS)
    return console


def print_table(console: Console, table: Table) -> None:
    """Print one; without headings it has no lines either."""
    headed = any(table.columns)
    shown = rich.table.Table(
        title=table.title or None,
        title_style="bold",
        show_header=headed,
        box=rich.box.HEAVY_HEAD if headed else None,
        padding=(0, 1) if headed else (0, 2, 0, 0),
    )
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index < table.words else "right")
    for row in table.rows:
        shown.add_row(*(_styled(cell) for cell in row))
    console.print(shown, highlight=False)


def _styled(cell: str) -> Text:
    return Text(cell, style="bold green" if cell.startswith(BEST) else "")


def seconds(value: float | None) -> str:
    """A latency for people to read: milliseconds below a second, a dash where it is infinite."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def share(value: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


# One replay.


def summary_table(result: dict[str, Any]) -> Table:
    """The lines that sum a replay up, as name and value."""
    adapters, slo, sim = result["adapters"], result["slo"], result["sim"]
    rows = (
        ("policy, seed", f"{result['policy']}, {result['seed']}"),
        (
            "requests",
            f"{result['requests']:,} = {result['completed']:,} completed + "
            f"{result['rejected']:,} rejected + {result['failed']:,} failed + "
            f"{result['unfinished']:,} unfinished",
        ),
        (
            "adapters",
            f"hit rate {share(adapters['hit_rate'])}: {adapters['hits']:,} hits, "
            f"{adapters['joins']:,} joined a load, {adapters['cold_loads']:,} cold loads, "
            f"{adapters['evictions']:,} evictions",
        ),
        (
            "goodput",
            f"{result['goodput_rps']:.2f} requests/s with first token in {slo['ttft_s']:g} s and "
            f"{slo['itl_s']:g} s a token: {share(slo['attainment'])} of those offered",
        ),
        (
            "simulated",
            f"{sim['virtual_s']:,.0f} s in {sim['wall_s']:.2f} s, "
            f"{sim['requests_per_wall_s']:,.0f} requests/s, {sim['peak_rss_mib']:.0f} MiB",
        ),
        *(
            (
                "calibration",
                f"{one['name']}: {one['engine']}, {one['machine']}, {one['date']}; {one['trust']}",
            )
            for one in result["calibrations"].values()
        ),
        ("digest", result["digest"]),
    )
    return Table(("", ""), rows, words=2)


def latency_table(result: dict[str, Any]) -> Table:
    """The latencies over all requests offered."""
    rows = tuple(
        (name, *(seconds(result[key][column]) for column in LATENCY_COLUMNS))
        for key, name in LATENCY_NAMES.items()
    )
    title = "latency over all requests offered (- is infinite)"
    return Table(("", *LATENCY_COLUMNS), rows, title)


def worker_table(result: dict[str, Any]) -> Table:
    """What each worker did."""
    rows = tuple(
        (
            worker["id"],
            f"{worker['requests']:,}",
            f"{worker['hits']:,}",
            f"{worker['cold_loads']:,}",
            f"{worker['evictions']:,}",
            f"{worker['in_flight_peak']:,}",
            share(worker["utilization"]),
        )
        for worker in result["workers"]
    )
    return Table(WORKER_COLUMNS, rows, "workers")


# Many.


def point_table(points: Sequence[Point], title: str, *, mark_best: bool = True) -> Table:
    """A row for each point: what was chosen, and each figure with its interval.

    The best of a column is marked only where its interval has nothing in common with any other.
    """
    paths = tuple(points[0].choice)
    best = _best(points) if mark_best else {}
    rows = []
    for point in points:
        chosen = tuple(str(point.choice[path]) for path in paths) or ("as configured",)
        if point.refused is not None:
            rows.append((*chosen, *("-" for _ in SHOWN)))
            continue
        estimates = point.estimates
        cells = (
            (BEST if best.get(metric) is point else "") + interval(metric, estimates[metric])
            for metric in SHOWN
        )
        rows.append((*chosen, *cells))
    columns = (*(paths or ("",)), *(metric.heading for metric in SHOWN))
    return Table(columns, tuple(rows), title, words=len(paths) or 1)


def _best(points: Sequence[Point]) -> dict[Metric, Point]:
    marked: dict[Metric, Point] = {}
    known = [(point, point.estimates) for point in points if point.refused is None]
    for metric in SHOWN if len(known) > 1 else ():
        sign = -1 if metric.more_is_better else 1
        ranked = sorted(known, key=lambda item: sign * _mean(item[1][metric], metric))
        first, second = (estimates[metric] for _, estimates in ranked[:2])
        # Without an interval there is no saying how much is luck.
        if first.half is not None and all(
            apart(first, estimates[metric]) for _, estimates in ranked[1:]
        ):
            assert first.mean != second.mean
            marked[metric] = ranked[0][0]
    return marked


def _mean(estimate: Estimate, metric: Metric) -> float:
    """The mean to sort by, None being the worst."""
    if estimate.mean is None:
        return float("-inf") if metric.more_is_better else float("inf")
    return estimate.mean


def difference_table(points: Sequence[Point], path: str) -> Table:
    """Each point less the first, seed by seed; marked where it is better beyond doubt."""
    first = points[0]
    rows = []
    for point in points[1:]:
        cells = []
        for metric in SHOWN:
            apart_by = paired(point.values[metric], first.values[metric])
            better = apart_by.low > 0 if metric.more_is_better else apart_by.high < 0
            sure = apart_by.mean is not None and apart_by.half is not None and better
            cells.append((BEST if sure else "") + interval(metric, apart_by, sign=True))
        rows.append((f"{point.choice[path]} - {first.choice[path]}", *cells))
    title = f"paired differences to {first.choice[path]} over the same seeds"
    return Table(("", *(metric.heading for metric in SHOWN)), tuple(rows), title)
