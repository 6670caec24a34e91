"""A validation's figures as a table for a terminal, and as a report in Markdown."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sim.validate.compare import Comparison
from sim.validate.workloads import Case

OVERVIEW = ("mean", "p50", "p99")
COLUMNS = ("figure", "real", "simulated", "error", "noise", "goal", "")


def _number(value: float, group: str) -> str:
    if not math.isfinite(value):
        return "-"
    if group == "adapters":
        return f"{value:.4g}"
    if group == "throughput":
        return f"{value:.1f}"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def cells(one: Comparison) -> tuple[str, ...]:
    """A figure's cells, in the order of `COLUMNS`."""
    verdict = {True: "met", False: "missed", None: ""}[one.met]
    return (
        f"{one.group} {one.name}",
        ", ".join(_number(value, one.group) for value in one.real),
        _number(one.simulated, one.group),
        _share(one.error),
        _share(one.noise),
        _share(one.goal) if one.goal is not None else "",
        verdict,
    )


def print_comparisons(console: Console, found: Sequence[Comparison]) -> None:
    """A table for each workload."""
    for case in dict.fromkeys(one.case for one in found):
        table = Table(title=f"{case}: real against simulated", title_style="bold")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in {"figure", ""} else "right")
        for one in found:
            if one.case == case:
                table.add_row(*cells(one))
        console.print(table)


def markdown(found: Sequence[Comparison], about: dict[str, Any], cases: Sequence[Case]) -> str:
    """The report: how it was made, a table for each workload, what was met."""
    goals = [one for one in found if one.met is not None]
    met = sum(bool(one.met) for one in goals)
    parts = [
        "# Real against simulated",
        "",
        f"{met} of {len(goals)} goals met. `{about['command']}`, {about['date']}, over "
        f"{about['ran_on']}: {about['workers']} workers of {about['model']}, {about['slots']} slots "
        f"each. Calibration `{about['calibration']}`: {about['calibrated']}.",
        "",
        f"Each workload was served {about['runs']} times by the real router over real workers; *noise* "
        "is how far two of those runs are from each other, *error* that between their mean and the "
        f"mean of {about['simulations']} simulations of each with other placement seeds. A goal is "
        "met where the error is within it, or within the noise.",
        "",
        *_overview(found, cases),
    ]
    for case in cases:
        parts += [f"## {case.name}: {case.why}", "", "| " + " | ".join(COLUMNS) + " |"]
        parts.append("|---" + "|---:" * 5 + "|---|")
        parts += ["| " + " | ".join(cells(one)) + " |" for one in found if one.case == case.name]
        parts.append("")
    return "\n".join(parts)


def _overview(found: Sequence[Comparison], cases: Sequence[Case]) -> list[str]:
    """Error and noise of what has a goal, and of the mean, by workload."""
    shown = [
        key
        for key in dict.fromkeys((one.group, one.name) for one in found)
        if key[1] in OVERVIEW or key[0] == "adapters"
    ]
    by_key = {(one.case, one.group, one.name): one for one in found}
    lines = ["| error (noise) | " + " | ".join(case.name for case in cases) + " |"]
    lines.append("|---" + "|---:" * len(cases) + "|")
    for group, name in shown:
        ones = [by_key[case.name, group, name] for case in cases]
        row = " | ".join(f"{_share(one.error)} ({_share(one.noise)})" for one in ones)
        lines.append(f"| {group} {name} | {row} |")
    return [*lines, ""]
