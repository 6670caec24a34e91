"""`python -m sim compare TRACE`: which policy is better, and whether that is more than luck."""

import argparse
import time
from typing import TYPE_CHECKING

from rich.console import Console

from router.config import ConfigError
from router.core.policies import POLICIES
from sim.commands import arguments as shared
from sim.commands import many
from sim.report.table import BEST, difference_table, output, point_table, print_table
from sim.variants import Base, check_option

if TYPE_CHECKING:
    from sim.commands import Commands

NOTES = (
    f"± is half of a 95% confidence interval over the seeds; {BEST.strip()} marks the best where its "
    "interval has nothing in common with any other, and a difference for the better that leaves out 0.",
    "Percentiles are over all requests offered; a dash is infinite for at least one seed.",
)


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "compare",
        help="compare policies over several seeds, with confidence intervals",
        description=(
            "Replay a trace with several policies and several seeds, on all cores. The seeds are the "
            "same for each policy, so that differences are told seed by seed."
        ),
        epilog=(
            "example: python -m sim compare azure.csv --adapters 200 --policies affinity,round_robin "
            "--seeds 5 --report compare.html"
        ),
    )
    shared.add_workload(command)
    command.add_argument(
        "--policies",
        default=",".join(POLICIES),
        metavar="A,B,C",
        help="which, separated by commas; differences are to the first (default: all)",
    )
    shared.add_many(command, seeds=5)
    command.set_defaults(run=run, policy=None)


def policies(text: str) -> list[str]:
    """The names in the order given. Raises `ConfigError`."""
    names = [name.strip() for name in text.split(",")]
    for index, name in enumerate(names):
        check_option("policy", name)
        if name in names[:index]:
            raise ConfigError(f"--policies: {name} stands there twice; remove one")
    return names


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Replay all, print the tables, write what was asked for; return the exit status."""
    started = time.perf_counter()
    names = policies(arguments.policies)
    many.check_files(arguments)
    base = Base(arguments.config)
    with many.experiment(arguments, errors, base, len(names)) as (experiment, _):
        choices = [(("policy", name),) for name in names]
        points = experiment.measure(choices, sample=arguments.report is not None)
    seeds = f"{arguments.seeds} seed{'s' if arguments.seeds > 1 else ''}"
    tables = [point_table(points, f"mean over {seeds}, latency over all requests offered")]
    if len(points) > 1:
        tables.append(difference_table(points, "policy"))
    console = output()
    for table in tables:
        print_table(console, table)
    for note in NOTES:
        console.print(note, style="dim", highlight=False)
    result = {
        **many.workload_json(arguments, experiment),
        "policies": [point.to_json() for point in points],
    }
    many.write_json(arguments.json, result, started)
    if arguments.report is not None:
        from sim.report.pages import compare_page  # noqa: PLC0415  (only a page needs its parts)

        title = f"Policies on {arguments.trace.name}"
        page = compare_page(title, points, "policy", tables, NOTES)
        arguments.report.write_text(page, encoding="utf-8")
    return 0
