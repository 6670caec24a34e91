"""Write down a study: a table for the terminal, a page in Markdown. No figure is written by hand."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.policies import cells as offered
from benchmarks.policies.cells import GENERATED, Cell
from benchmarks.policies.verdict import (
    MORE_BUSY,
    MORE_COLD,
    MORE_UNANSWERED,
    NEAR,
    REPORTED_SEEDS,
    CellFigures,
    Mean,
    Study,
    Verdict,
    best_peer,
    goals,
    peers,
    standings,
    tally,
    verdicts,
)
from sim.report.intervals import estimate

WORST_SHOWN: Final = 12
STANDINGS: Final = (
    "policy",
    "goodput",
    "of the best peer",
    "cold loads",
    "of that peer's",
    "near on both",
    "on goodput",
    "on p99",
    "best goodput",
)
MISSED: Final = (
    "cell",
    "goodput",
    "best",
    "short by",
    "p99 TTFT",
    "best",
    "cold loads",
    "hits",
    "unanswered",
    "busiest",
    "worse in",
)


def print_study(console: Console, study: Study) -> None:
    """The standings, the goals and the worst cells."""
    _print(console, "Policies on equal hardware, over all cells", STANDINGS, _standings(study))
    for goal in goals(study):
        console.print(f"{'met' if goal.met else 'MISSED'}: {goal.text}: {goal.found}", markup=False)
    missed = _missed(study)
    if missed:
        title = f"{study.judged}: the worst of {len(missed)} cells missed"
        rows = [_missed_row(study, one) for one in missed[:WORST_SHOWN]]
        _print(console, title, MISSED, rows)


def markdown(study: Study) -> str:
    """The report."""
    name, peer = study.judged, best_peer(study)
    missed = _missed(study)
    met = sum(goal.met for goal in goals(study))
    parts = [
        "# Routing policies on equal hardware",
        "",
        f"{met} of {len(goals(study))} goals met by `{name}`. `{study.command}`, {study.date}, "
        f"{study.took_s:.0f} s on {study.machine}. Written by that command; "
        "`python -m benchmarks.policies --render` writes it again from its JSON.",
        "",
        *_table(
            ("goal", "found", ""),
            ((goal.text, goal.found, "met" if goal.met else "**missed**") for goal in goals(study)),
        ),
        *_method(study),
        "## All cells together",
        "",
        "Goodput, in requests a second, is a geometric mean over cells in which a replay without a "
        "good request counts as having one. *Near* counts the cells in which a policy is within "
        f"{NEAR:.0%} of the best of all peers, `{name}` and itself.",
        "",
        *_table(STANDINGS, _standings(study)),
        f"## `{name}` by load and arrivals",
        "",
        f"Its goodput over that of `{peer.name}`, the best single peer; in brackets the cells in which "
        "it is near the best of each cell on both figures, of all.",
        "",
        *_cross(study, "arrivals", lambda cell: cell.source, "load", lambda cell: cell.load),
        f"## `{name}` by adapters/slots and locality",
        "",
        *_cross(
            study, "adapters/slots", lambda cell: cell.ratio, "locality", lambda cell: cell.locality
        ),
        f"## Cells that `{name}` missed",
        "",
    ]
    if not missed:
        return "\n".join([*parts, "None.", "", *_all_cells(study)])
    parts += [
        f"{len(missed)} of {len(study.cells)}, the largest shortfall first; "
        f"{sum(not one.near_goodput for one in missed)} on goodput, "
        f"{sum(not one.near_ttft for one in missed)} on p99, {_beyond(missed)} on goodput by more than "
        f"{NEAR:.0%} at every point of the interval. Pairs are `{name}` / the best on the missed "
        "figure (on goodput, where both are missed). *Short by* is paired by seed, with half its 95% "
        "interval. *Busiest* is the requests of the worker with most of them, over their mean. "
        f"*Worse in* names what differs from the best: more than {MORE_COLD - 1:.0%} more cold loads, "
        f"a busiest worker more than {MORE_BUSY - 1:.0%} above the best's (less even), more than "
        f"{MORE_UNANSWERED:.0%} of the requests more unanswered.",
        "",
        *_table(("worse in", "cells"), _reasons(missed)),
        *_table(MISSED, (_missed_row(study, one) for one in missed)),
        *_all_cells(study),
    ]
    return "\n".join(parts)


def _written(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in fields.items())


def _method(study: Study) -> list[str]:
    setting, seeds = study.setting, study.seeds
    tuning = sum(seed < REPORTED_SEEDS for seed in seeds)
    crowd = offered.CROWD_SHARE * setting.duration_s
    variants = [
        f"`{one.name}` is `{one.policy}` with `{_written(one.router | one.lora)}`"
        for one in study.contenders
        if one.router or one.name != one.policy
    ]
    return [
        "## What was compared",
        "",
        f"- Hardware: {setting.workers} workers, {setting.slots} adapter slots and at most "
        f"{setting.max_ongoing_requests} requests each, simulated with the calibration "
        f"`{setting.calibration}`.",
        f"- Good: first token within {setting.slo.ttft_s:g} s and {setting.slo.itl_s:g} s between "
        "tokens on average. Goodput is the good requests over the span in which all come. p99 is over "
        "all requests offered; one that is not answered waits for ever, which is infinite (inf).",
        f"- Seeds: {', '.join(map(str, seeds))}. Each seed's requests are the same for every policy. "
        f"Seeds below {REPORTED_SEEDS} are set aside for tuning; {tuning or 'none'} of these "
        f"{'is' if tuning == 1 else 'are'} of them.",
        "- Capacity, requests a second of a backlog completed, at "
        f"{offered.BACKLOG_RATIO:g} adapters to a slot: "
        + "; ".join(f"{source} {rps:.4g}" for source, rps in study.capacities_rps.items())
        + ". Load is the mean rate offered, as a share of it.",
        f"- Cells: {len(study.cells)}. Generated ones last {setting.duration_s:g} s, with the "
        f"lengths of `{setting.azure.name}` and Zipf popularity (exponent {offered.ZIPF:g}); a request "
        "asks again for a recent adapter with the probability *locality*, and independently otherwise.",
        f"- Arrivals: steady is Poisson; bursty has Gamma gaps with a coefficient of variation of "
        f"{offered.BURSTS_CV:g}; flash crowd is Poisson, {offered.CROWD_FACTOR:g} times the rate for "
        f"{crowd:g} s from second {offered.CROWD_BEGINS * setting.duration_s:g} on, all that comes in "
        "addition for one adapter of middling popularity, and less before and after, so that the "
        "mean is that of the other arrivals.",
        f"- Traces: the first {setting.trace_requests:,} requests at most, at a speed that gives the "
        f"load; adapters drawn with locality {offered.TRACE_LOCALITY:g}. Between seeds only the "
        "adapters and the policies' draws differ.",
        *(f"- Variants: {text}." for text in variants),
        *(f"- Left out: {text}." for text in study.left_out),
        "",
    ]


def _standings(study: Study) -> list[tuple[str, ...]]:
    peer, count = best_peer(study), len(study.cells)
    rows: list[tuple[str, ...]] = []
    for one in standings(study):
        cold = f"{one.cold_loads / peer.cold_loads:.1%}" if peer.cold_loads else "-"
        rows.append(
            (
                one.name,
                f"{one.goodput_rps:.3f}",
                f"{one.goodput_rps / peer.goodput_rps:.3f}",
                f"{one.cold_loads:,.0f}",
                cold,
                f"{one.near} of {count}",
                f"{one.near_goodput}",
                f"{one.near_ttft}",
                f"{one.best_goodput}",
            )
        )
    return rows


def _cross(
    study: Study,
    down: str,
    row: Callable[[Cell], Any],
    across: str,
    column: Callable[[Cell], Any],
) -> list[str]:
    """A table of the judged over the best peer by two keys, with a total of each row."""
    both = tally(study, lambda cell: (row(cell), column(cell)))
    rows, columns = tally(study, row), tally(study, column)

    def shown(found: tuple[float, int, int, int, int] | None) -> str:
        return "" if found is None else f"{found[0]:.3f} ({found[1]} of {found[4]})"

    return _table(
        (down, *(f"{across} {value:g}" for value in sorted(columns)), "all"),
        [
            (
                _label(value),
                *(shown(both.get((value, other))) for other in sorted(columns)),
                shown(rows[value]),
            )
            for value in rows
        ]
        + [("all", *(shown(columns[other]) for other in sorted(columns)), "")],
    )


def _label(value: Any) -> str:  # noqa: ANN401
    return f"{value:g}" if isinstance(value, float) else str(value)


def _missed(study: Study) -> list[Verdict]:
    found = [one for one in verdicts(study) if not one.near]
    return sorted(found, key=lambda one: -_badness(one))


def _badness(one: Verdict) -> float:
    """How far from the best, on what is worse: a share of the best's goodput, or of its p99's rise."""
    mine, best = one.ttft_p99_s, one.best_ttft_p99_s
    later = 0.0 if best is None else 1.0 if mine is None else 1.0 - best / mine if mine else 0.0
    return max(one.short, later)


def _beyond(missed: Iterable[Verdict]) -> int:
    """Of how many it is sure that the goodput is not near, as far as seeds tell."""
    return sum(one.short_half is not None and one.short - one.short_half > NEAR for one in missed)


def _reasons(missed: Sequence[Verdict]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for one in missed:
        key = ", ".join(one.why)
        counts[key] = counts.get(key, 0) + 1
    return [(key, str(count)) for key, count in sorted(counts.items(), key=lambda one: -one[1])]


def _missed_row(study: Study, one: Verdict) -> tuple[str, ...]:
    found = next(figures for figures in study.cells if figures.cell == one.cell)
    mine = found.by_contender[study.judged]
    best = found.by_contender[one.best_ttft if one.near_goodput else one.best_goodput]
    half = "" if one.short_half is None else f" ± {one.short_half:.1%}"
    return (
        one.cell.name,
        f"{one.goodput_rps:.2f}",
        f"{one.best_goodput_rps:.2f} {one.best_goodput}",
        f"{one.short:.1%}{half}",
        _seconds(one.ttft_p99_s),
        f"{_seconds(one.best_ttft_p99_s)} {one.best_ttft}",
        _pair(mine.cold_loads, best.cold_loads, "{:.0f}"),
        _pair(mine.hit_rate, best.hit_rate, "{:.1%}"),
        _pair(mine.unanswered, best.unanswered, "{:.1%}"),
        _pair(mine.busiest, best.busiest, "{:.2f}"),
        ", ".join(one.why),
    )


def _pair(mine: Mean, best: Mean, shown: str) -> str:
    return " / ".join("-" if one.mean is None else shown.format(one.mean) for one in (mine, best))


def _seconds(value: float | None) -> str:
    return "inf" if value is None or math.isinf(value) else f"{value:.3g} s"


def _all_cells(study: Study) -> list[str]:
    """Goodput and p99 of every contender in every cell."""
    names = [*dict.fromkeys([study.judged, *peers(study.contenders)])]
    names += [one.name for one in study.contenders if one.name not in names]
    lines = [
        "## Every cell",
        "",
        "Goodput in requests a second, mean ± half the 95% interval over seeds, and p99 time to first "
        "token. What was offered is in brackets.",
        "",
    ]
    for source, group in itertools.groupby(study.cells, key=lambda one: one.cell.source):
        kind = "generated" if source in GENERATED else "trace"
        lines += [f"### {source} ({kind})", ""]
        lines += _table(
            ("load, adapters/slots, locality", *names),
            [_cell_row(one, names) for one in group],
        )
    return lines


def _cell_row(one: CellFigures, names: Sequence[str]) -> tuple[str, ...]:
    cell = one.cell
    shown = []
    for name in names:
        found = one.by_contender[name]
        goodput = estimate(found.goodput_rps)
        half = "" if goodput.half is None else f" ± {goodput.half:.2g}"
        p99 = _seconds(estimate(found.ttft_p99_s).mean)
        shown.append(f"{goodput.mean:.2f}{half}, {p99}")
    where = f"{cell.load:g}, {cell.ratio:g}, {cell.locality:g} ({one.offered_rps:.3g})"
    return (where, *shown)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table and the empty line after it."""
    return [
        "| " + " | ".join(columns) + " |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _print(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
