"""`python -m sim sweep TRACE --vary ...`: a grid of configurations, and what it says in words."""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from router.core.policies import POLICIES
from sim.answers import (
    Choosing,
    Fleet,
    Knee,
    knees,
    measured,
    say_choosing,
    say_fleet,
    say_knee,
    smallest_fleets,
    thresholds,
)
from sim.commands import arguments as shared
from sim.commands import many
from sim.experiment import Point
from sim.pool import PoolError
from sim.report.table import output, point_table, print_table
from sim.slo import Target, parse_target, parse_targets
from sim.variants import Base, grid, parse_axes

if TYPE_CHECKING:
    from sim.commands import Commands

DEFAULT_TARGET = "attainment=99%"
SENTENCES_MAX = 12  # of one sort; a grid has an answer for each state of the world


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "sweep",
        help="replay a grid of configurations and say which fleet and threshold to take",
        description=(
            "Replay a trace at every point of a grid, on all cores. VALUES are separated by commas "
            "and may be ranges (2..16, 2..16:2). PATH is workers, slots, threshold, policy, speed, "
            "adapters, locality, zipf, a field of llm_configs such as engine_kwargs.max_num_seqs, "
            "or router.FIELD."
        ),
        epilog=(
            "example: python -m sim sweep azure.csv --adapters 200 --vary workers=2..8 "
            "--vary threshold=16,32,64 --slo ttft_p99=500ms --report sweep.html"
        ),
    )
    shared.add_workload(command)
    command.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        help="instead of the configuration's (or vary it: --vary policy=a,b)",
    )
    command.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="PATH=VALUES",
        help="what varies; may be given several times",
    )
    shared.add_targets(command, required=False)
    shared.add_many(command, seeds=3)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Replay the grid, print its table and answers, write what was asked for."""
    started = time.perf_counter()
    axes = parse_axes(arguments.vary)
    targets = parse_targets(arguments.slo) or (parse_target(DEFAULT_TARGET),)
    many.check_files(arguments)
    base = Base(arguments.config)
    choices = list(grid(axes))
    report = arguments.report is not None
    with many.experiment(arguments, errors, base, len(choices) + report) as (experiment, _):
        points = experiment.measure(choices, optional=True)
        known = measured(points)
        if not known:
            raise PoolError(points[0].refused)
        fleets = smallest_fleets(known, targets) if "workers" in known[0].choice else []
        chosen = thresholds(known, targets)
        overloads = knees(known, targets)
        shown: Point | None = None
        if report:
            shown = _shown(known, fleets, chosen)
            # Once more, with a timeline: one of each point would be too much to keep.
            shown = experiment.measure([tuple(shown.choice.items())], sample=True)[0]
    words = [f"{point.name}: {point.refused}" for point in points if point.refused is not None]
    words += _words(targets, fleets, chosen, overloads)
    table = point_table(points, f"mean over {arguments.seeds} seeds", mark_best=False)
    console = output()
    print_table(console, table)
    for line in words:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    result = {
        **many.workload_json(arguments, experiment),
        "targets": [str(target) for target in targets],
        "points": [point.to_json(targets) for point in points],
        "smallest_fleets": [
            {"world": fleet.world, "choice": fleet.point.choice if fleet.point else None}
            for fleet in fleets
        ],
        "thresholds": [
            {"choice": answer.point.choice, "plateau": answer.plateau} for answer in chosen
        ],
        "knees": [
            {
                "axis": knee.axis,
                "rest": knee.rest,
                "before": knee.before.choice[knee.axis] if knee.before else None,
                "at": knee.knee.choice[knee.axis] if knee.knee else None,
            }
            for knee in overloads
        ],
        "answers": words,
    }
    many.write_json(arguments.json, result, started)
    if arguments.report is not None:
        from sim.report.pages import sweep_page  # noqa: PLC0415  (only a page needs its parts)

        title = f"Sweep of {', '.join(axis.path for axis in axes)} on {arguments.trace.name}"
        page = sweep_page(title, words, points, targets, [table], shown=shown)
        arguments.report.write_text(page, encoding="utf-8")
    return 0


def _shown(points: Sequence[Point], fleets: Sequence[Fleet], chosen: Sequence[Choosing]) -> Point:
    """The point whose time is worth a look: the answer, or else the first."""
    for fleet in fleets:
        if fleet.point is not None:
            return fleet.point
    return chosen[0].point if chosen else points[0]


def _words(
    targets: Sequence[Target],
    fleets: Sequence[Fleet],
    chosen: Sequence[Choosing],
    overloads: Sequence[Knee],
) -> list[str]:
    lines = [f"SLO: {', '.join(str(target) for target in targets)}."]
    groups = (
        [say_fleet(fleet, targets) for fleet in fleets],
        [[say_choosing(answer)] for answer in chosen],
        [[say_knee(knee)] for knee in overloads],
    )
    for group in groups:
        for sentence in group[:SENTENCES_MAX]:
            lines.extend(sentence)
        if len(group) > SENTENCES_MAX:
            lines.append(f"  and {len(group) - SENTENCES_MAX} more of this sort, with --json.")
    return lines
