"""A replay's result as a table for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def seconds(value: float | None) -> str:
    """A latency for people to read: milliseconds below a second, a dash where it is infinite."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def share(value: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines that sum a replay up, as name and value."""
    adapters, slo, sim = result["adapters"], result["slo"], result["sim"]
    return [
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
        ("digest", result["digest"]),
    ]


LATENCY_NAMES = {
    "ttft_s": "time to first token",
    "itl_s": "between tokens",
    "e2e_s": "end to end",
}


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the summary, the latencies and the workers."""
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in summary_rows(result):
        summary.add_row(name, value)
    console.print(summary, highlight=False)
    latencies = Table(title="latency over all requests offered (- is infinite)", title_style="bold")
    latencies.add_column("")
    for column in ("mean", "p50", "p90", "p99"):
        latencies.add_column(column, justify="right")
    for key, name in LATENCY_NAMES.items():
        latencies.add_row(name, *(seconds(result[key][column]) for column in LATENCY_COLUMNS))
    console.print(latencies)
    workers = Table(title="workers", title_style="bold")
    for column in WORKER_COLUMNS:
        workers.add_column(column, justify="left" if column == "id" else "right")
    for worker in result["workers"]:
        workers.add_row(*worker_cells(worker))
    console.print(workers)


LATENCY_COLUMNS = ("mean", "p50", "p90", "p99")
WORKER_COLUMNS = ("id", "requests", "hits", "loads", "evictions", "in flight, peak", "busy")


def worker_cells(worker: dict[str, Any]) -> tuple[str, ...]:
    """One worker's cells, in the order of `WORKER_COLUMNS`."""
    return (
        worker["id"],
        f"{worker['requests']:,}",
        f"{worker['hits']:,}",
        f"{worker['cold_loads']:,}",
        f"{worker['evictions']:,}",
        f"{worker['in_flight_peak']:,}",
        share(worker["utilization"]),
    )
