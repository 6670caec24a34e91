"""What stands on the page of each command, from the same parts: answers first, then charts, tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from sim.answers import LOAD_AXES, measured
from sim.experiment import Point
from sim.report import charts
from sim.report.metrics import Metric
from sim.report.page import Page
from sim.report.summary import Latencies, curve
from sim.report.table import (
    Table,
    latency_table,
    summary_table,
    worker_table,
)
from sim.report.timeline import Timeline
from sim.slo import Target
from sim.variants import Value

LINES_MAX = 8  # of one chart: more cannot be told apart
RESIDENCY_ROW_PX = 11


def replay_page(
    title: str, result: dict[str, Any], latencies: Latencies, timeline: Timeline
) -> str:
    """One replay."""
    page = Page(title)
    page.table(summary_table(result))
    page.heading("Latency")
    page.table(latency_table(result))
    page.chart(
        charts.distribution(
            {
                "first token": curve(latencies.ttft_s, result["requests"]),
                "whole answer": curve(latencies.e2e_s, result["requests"]),
            },
            "time",
        ),
        "Share of all requests offered that were answered within a time",
    )
    page.text("A request that was not answered counts as infinite: its curve ends below 100%.")
    add_timelines(page, {result["policy"]: timeline})
    page.heading("Workers")
    page.table(worker_table(result))
    return page.render()


def compare_page(
    title: str, points: Sequence[Point], path: str, tables: Sequence[Table], notes: Sequence[str]
) -> str:
    """Several policies over the same seeds."""
    page = Page(title)
    for table in tables:
        page.table(table)
    for note in notes:
        page.text(note)
    page.heading("Latency")
    add_distributions(page, points, {str(point.choice[path]): point for point in points})
    add_timelines(
        page,
        {
            str(point.choice[path]): point.timeline
            for point in points[:LINES_MAX]
            if point.timeline is not None
        },
    )
    return page.render()


def sweep_page(
    title: str,
    answers: Sequence[str],
    points: Sequence[Point],
    targets: Sequence[Target],
    tables: Sequence[Table],
    *,
    shown: Point | None,
    yaml: str = "",
) -> str:
    """A grid or a search: its answers, each axis's charts, all its points. `shown` has a timeline."""
    page = Page(title)
    page.answers(answers)
    if yaml:
        page.heading("Configuration")
        page.code(yaml)
    known = measured(points)
    if shown is not None:
        # The curves of the answer and of what differs least from it.
        choice = shown.choice
        known.sort(key=lambda point: sum(point.choice[path] != choice[path] for path in choice))
    for path in known[0].choice if known else ():
        add_axis(page, known, path, targets)
    if known:
        page.heading("Latency")
        add_distributions(page, known, {point.name: point for point in known})
    if shown is not None and shown.timeline is not None:
        add_timelines(page, {shown.name: shown.timeline})
    page.heading("All points")
    for table in tables:
        page.table(table)
    return page.render()


# The parts.


def add_distributions(page: Page, points: Sequence[Point], names: Mapping[str, Point]) -> None:
    """The curves of the first token and of the whole answer."""
    some = dict(list(names.items())[:LINES_MAX])
    page.chart(
        charts.distribution(
            {name: point.ttft_curve for name, point in some.items()}, "time to first token"
        ),
        "Time to first token, over all requests offered (first seed)",
    )
    page.chart(
        charts.distribution(
            {name: point.e2e_curve for name, point in some.items()}, "time to last token"
        ),
        "End to end, over all requests offered (first seed)",
    )
    page.text("A request that was not answered counts as infinite: its curve ends below 100%.")
    if len(points) > len(some):
        page.text(f"Shown: {len(some)} of {len(points)} points.")


def add_timelines(page: Page, timelines: Mapping[str, Timeline]) -> None:
    """Queue, load, hits and residency over virtual time; residency for the first two."""
    if not timelines:
        return
    page.heading("Over time")
    page.chart(
        charts.over_time(
            {name: (line.at_s, line.queued) for name, line in timelines.items()}, "requests waiting"
        ),
        "Requests waiting in the router's queue",
        height=240,
    )
    for name, line in timelines.items():
        page.chart(
            charts.over_time(
                {worker: (line.load_at_s, load) for worker, load in line.in_flight.items()},
                "in flight",
            ),
            f"Requests in flight on each worker: {name}",
            height=260,
        )
    if any(rate is not None for line in timelines.values() for rate in line.hit_rate):
        page.chart(
            charts.over_time(
                {name: (line.rate_at_s, line.hit_rate) for name, line in timelines.items()},
                "hit rate",
                tickformat=".0%",
                range=[0, 1.01],
            ),
            "Hit rate: requests whose adapter was resident when they were placed",
            height=260,
        )
        page.chart(
            charts.over_time(
                {name: (line.rate_at_s, line.cold_loads_per_s) for name, line in timelines.items()},
                "cold loads a second",
            ),
            "Cold loads",
            height=220,
        )
    for name, line in list(timelines.items())[:2]:
        if line.residency:
            page.chart(
                charts.residency(line),
                f"Which adapters each worker holds: {name}",
                height=110 + RESIDENCY_ROW_PX * len(line.residency),
            )
            if line.omitted:
                page.text(line.omitted)


def add_axis(page: Page, points: Sequence[Point], path: str, targets: Sequence[Target]) -> None:
    """How the figures that matter change along one axis, a line for each choice of the others."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        rest = ", ".join(f"{name}={value}" for name, value in point.choice.items() if name != path)
        lines.setdefault(rest or "all", []).append(point)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return
    # A search has a few points with all else equal for each axis: the longest lines say the most.
    longest = sorted(lines.items(), key=lambda item: -len(item[1]))[:LINES_MAX]
    shown = {
        name: sorted(line, key=lambda point: _rank(point.choice[path])) for name, line in longest
    }
    page.heading(f"By {path}" + (": where overload begins" if path in LOAD_AXES else ""))
    bounds = {target.metric: target for target in targets}
    for metric in dict.fromkeys((*bounds, Metric.ATTAINMENT, Metric.GOODPUT, Metric.TTFT_P99)):
        page.chart(
            charts.against(
                {
                    name: [(point.choice[path], point.estimates[metric]) for point in line]
                    for name, line in shown.items()
                },
                path,
                metric,
                bounds.get(metric),
            ),
            f"{metric.heading} by {path}",
            height=260,
        )
    page.text("Bars are 95% intervals over the seeds. A gap in a line is infinite.")
    if len(lines) > len(shown):
        page.text(f"Shown: {len(shown)} lines of {len(lines)}.")


def _rank(value: Value) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, float(value) if isinstance(value, int | float) else 0.0, str(value))
