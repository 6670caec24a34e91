"""The table, the goals and the file."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from rich.table import Table

from benchmarks.data_plane.cases import Case
from benchmarks.data_plane.verdict import (
    DIRECT,
    HAPROXY,
    RUST,
    Goal,
    Rounds,
    middle,
    over,
    ratio,
    series,
)
from benchmarks.support import spread


class Row(msgspec.Struct, frozen=True):
    """A figure to show: where it is, how, and whether as what it is beyond the engines alone."""

    case: Case
    figure: str
    title: str
    scale: float = 1.0
    form: str = ",.0f"
    added: bool = False
    compared: bool = False


ROWS: Final = (
    Row(Case.ANSWERS, "cpu_us", "64 clients: CPU µs a request", form=",.1f", compared=True),
    Row(Case.ANSWERS, "per_s", "64 clients: requests/s"),
    Row(Case.ANSWERS, "p50_s", "64 clients: p50 ms", 1e3, ",.2f"),
    Row(Case.ANSWERS, "p99_s", "64 clients: p99 ms", 1e3, ",.2f"),
    Row(Case.TOKENS, "cpu_us", "256 streams: CPU µs a chunk", form=",.1f", compared=True),
    Row(Case.TOKENS, "per_s", "256 streams: chunks/s"),
    Row(Case.TOKENS, "transit_p50_s", "256 streams: chunk later by, p50 ms", 1e3, ",.2f", added=True),
    Row(Case.TOKENS, "transit_p99_s", "256 streams: chunk later by, p99 ms", 1e3, ",.2f", added=True),
    Row(Case.SINGLE, "p50_s", "1 client: added, p50 ms", 1e3, ",.3f", added=True, compared=True),
    Row(Case.PACE, "cpu_us", "10,000 chunks/s: CPU µs a chunk", form=",.1f", compared=True),
    Row(Case.PACE, "per_s", "10,000 chunks/s: chunks/s"),
    Row(Case.PACE, "transit_p99_s", "10,000 chunks/s: chunk later by, p99 ms", 1e3, ",.2f", added=True),
    Row(Case.PACE, "late_p99_s", "10,000 chunks/s: gap longer by, p99 ms", 1e3, ",.2f", added=True),
    Row(Case.CROWD, "peak_open", "crowd: streams at once"),
    Row(Case.CROWD, "lost", "crowd: streams lost"),
    Row(Case.CROWD, "base_mib", "crowd: memory at the start, MiB", form=",.1f"),
    Row(Case.CROWD, "kib_per_stream", "crowd: KiB a stream", form=",.1f", compared=True),
)  # fmt: skip


def table(rounds: Rounds, names: Sequence[str], count: int) -> Table:
    """Medians with their spread, and the ratios to vllm-router and HAProxy."""
    top = Table(title=f"The data plane: medians of {count} rounds, (least-most)")
    top.add_column("")
    for name in names:
        top.add_column(name, justify="right")
    for row in ROWS:
        cells = [_cell(rounds, name, row) for name in names]
        if any(cells):
            top.add_row(row.title, *cells)
        if row.compared:
            for base in (RUST, HAPROXY):
                ratios = [_ratio(rounds, name, base, row) if name != base else "" for name in names]
                if base in names and any(ratios):
                    top.add_row(f"  × {base}", *ratios, style="dim")
    return top


def values_of(rounds: Rounds, name: str, row: Row) -> list[float]:
    """A row's values of each round, in the row's unit."""
    if not row.added:
        found = series(rounds, name, row.case, row.figure)
    elif name == DIRECT:
        found = []
    else:
        found = over(rounds, name, DIRECT, row.case, row.figure)
    return [value * row.scale for value in found]


def _cell(rounds: Rounds, name: str, row: Row) -> str:
    values = values_of(rounds, name, row)
    if not values:
        return ""
    shown = format(middle(values), row.form)
    if len(values) < 2 or min(values) == max(values):
        return shown
    return f"{shown} ({min(values):{row.form}}-{max(values):{row.form}})"


def _ratio(rounds: Rounds, name: str, base: str, row: Row) -> str:
    if not row.added:
        found = ratio(rounds, name, base, row.case, row.figure)
    else:
        mine = middle(values_of(rounds, name, row))
        theirs = middle(values_of(rounds, base, row))
        found = None if mine is None or not theirs else mine / theirs
    return "" if found is None else f"{found:.2f}"


def goal_table(goals: Sequence[Goal]) -> Table:
    """Each goal, what was found, and whether that reaches it."""
    top = Table(title="Goals")
    for number, column in enumerate(("goal", "asked", "found", "")):
        top.add_column(column, justify="right" if number in {1, 2} else "left")
    for goal in goals:
        sign = "≥" if goal.least else "≤"
        top.add_row(
            goal.name,
            f"{sign} {goal.limit:,g} {goal.unit}",
            "" if goal.found is None else f"{goal.found:,.4g} {goal.unit}",
            goal.verdict.value,
        )
    return top


def as_data(rounds: Rounds, goals: Sequence[Goal]) -> dict[str, Any]:
    """All figures for the file: of each contender, case and figure the spread and every round."""
    figures = {
        name: {
            case.value: {
                figure: {**spread(values), "rounds": values}
                for figure in _names(of_case)
                if (values := [one[figure] for one in of_case if figure in one])
            }
            for case, of_case in cases.items()
        }
        for name, cases in rounds.items()
    }
    added = {
        name: {f"{row.case.value}.{row.figure}": spread(found)
               for row in ROWS
               if row.added and (found := over(rounds, name, DIRECT, row.case, row.figure))}
        for name in rounds
        if name != DIRECT
    }  # fmt: skip
    return {
        "figures": figures,
        "added_to_direct": added,
        "goals": [
            {
                "goal": goal.name,
                "limit": goal.limit,
                "at": "least" if goal.least else "most",
                "unit": goal.unit,
                "found": goal.found,
                "verdict": goal.verdict.value,
            }
            for goal in goals
        ],
    }


def _names(of_case: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(figure for one in of_case for figure in one))
