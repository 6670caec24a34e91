"""`python -m sim recommend TRACE --slo ...`: how many workers, how many slots, which threshold."""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from router.config import ConfigError
from router.core.policies import POLICIES
from sim.commands import arguments as shared
from sim.commands import many
from sim.experiment import Point
from sim.report.table import output, point_table, print_table
from sim.search import Recommendation, Search, Settings
from sim.slo import Target, Verdict, parse_targets, verdict
from sim.variants import SLOTS_PATHS, THRESHOLD_PATH, Base, Choice

if TYPE_CHECKING:
    from sim.commands import Commands

MAX_WORKERS = 64


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "recommend",
        help="say how many workers, how many slots and which threshold, and print the YAML",
        description=(
            "Search for the smallest fleet that gives a service level for a trace, with the slots "
            "and the threshold to configure, on all cores. Exits with 1 where there is none."
        ),
        epilog=(
            "example: python -m sim recommend azure.csv --adapters 200 --slo ttft_p99=500ms "
            "--slo attainment=99% --report recommend.html"
        ).replace("%", "%%"),
    )
    shared.add_workload(command)
    command.add_argument(
        "--policy", choices=sorted(POLICIES), help="instead of the configuration's"
    )
    shared.add_targets(command, required=True)
    command.add_argument(
        "--max-workers",
        type=shared.positive,
        default=MAX_WORKERS,
        metavar="N",
        help=f"the largest fleet to try (default {MAX_WORKERS})",
    )
    shared.add_many(command, seeds=3)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Search, print the answer and its YAML, write what was asked for; return the exit status."""
    started = time.perf_counter()
    targets = parse_targets(arguments.slo)
    many.check_files(arguments)
    base = Base(arguments.config)
    if arguments.workers is not None:
        raise ConfigError("--workers: this is what is searched for; give --max-workers instead")
    if len(base.config.llm_configs) > 1:
        raise ConfigError(
            f"{arguments.config}: recommend sizes the fleet of one model; leave one in llm_configs"
        )
    with many.experiment(arguments, errors, base, None) as (experiment, more):
        llm = base.config.llm_configs[0]
        asks = arguments.adapters or any(":" in model for model in experiment.models)
        start = Settings(
            workers=1,
            slots=llm.slots or None if asks else None,
            threshold=llm.deployment_config.max_ongoing_requests,
        )
        found = Search(experiment.measure, targets, more=more).run(start, arguments.max_workers)
        shown: Point | None = None
        if arguments.report is not None:
            more(1)
            shown = experiment.measure([found.settings.choice], sample=True)[0]
    policy: Choice = (("policy", arguments.policy),) if arguments.policy else ()
    yaml = base.text((*found.settings.choice, *policy)) if found.met else ""
    words = say(found, targets, arguments.max_workers)
    table = point_table(found.points, f"tried, mean over {arguments.seeds} seeds", mark_best=False)
    console = output()
    print_table(console, table)
    for line in words:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if yaml:
        console.print()
        console.print(yaml, highlight=False, markup=False, soft_wrap=True, end="")
    result = {
        **many.workload_json(arguments, experiment),
        "targets": [str(target) for target in targets],
        "met": found.met,
        "recommended": dict(found.settings.choice) if found.met else None,
        "points": [point.to_json(targets) for point in found.points],
        "answers": words,
        "yaml": yaml or None,
    }
    many.write_json(arguments.json, result, started)
    if arguments.report is not None:
        from sim.report.pages import sweep_page  # noqa: PLC0415  (only a page needs its parts)

        title = f"The fleet for {arguments.trace.name}"
        page = sweep_page(title, words, found.points, targets, [table], shown=shown, yaml=yaml)
        arguments.report.write_text(page, encoding="utf-8")
    return 0 if found.met else 1


def say(found: Recommendation, targets: Sequence[Target], max_workers: int) -> list[str]:
    """The answer in words: what, why, with which margin, and what its neighbours would give."""
    wanted = " and ".join(str(target) for target in targets)
    settings = found.settings
    if not found.met:
        return [
            f"No fleet of up to {max_workers} workers gives {wanted}. "
            f"The best of {max_workers}, {found.point.name}, gives:",
            *_margins(found.point, targets),
            "More workers may (--max-workers), or it is the engine: what one request alone takes "
            "no fleet can shorten.",
        ]
    lines = [
        f"{settings.workers} worker{'s' if settings.workers > 1 else ''} give {wanted}:",
        *_margins(found.point, targets),
    ]
    if found.smaller is not None:
        lines += [f"{settings.workers - 1} would give:", *_margins(found.smaller, targets)]
    larger = found.larger
    if larger is not None and (got := verdict(targets, larger.estimates)) is not Verdict.MET:
        how = "do so on average only" if got is Verdict.UNSURE else "do not"
        lines += [
            f"Careful: {settings.workers + 1} workers {how}, so luck is at work; more --seeds tell:",
            *_margins(larger, targets),
        ]
    if found.slots is not None:
        lines.append(_reason(SLOTS_PATHS[0], found.slots.value, found.slots.plateau))
    lines.append(_reason(THRESHOLD_PATH, found.threshold.value, found.threshold.plateau))
    return lines


def _margins(point: Point, targets: Sequence[Target]) -> list[str]:
    estimates = point.estimates
    return [f"  {target.margin(estimates[target.metric])}" for target in targets]


def _reason(path: str, value: object, plateau: Sequence[object]) -> str:
    others = [str(other) for other in plateau if other != value]
    if others:
        return f"{path}: {value}; {', '.join(others)} cannot be told from it here."
    return f"{path}: {value}, better than the others that were tried."
