"""Compare routing policies in the simulator: all of them, on equal hardware, with equal requests.

Seeds 100 and above are for reports, 0 to 99 for tuning: no threshold is chosen by what is reported.
"""

import argparse
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks.policies.cells import GENERATED, Cell, Setting, Source, all_cells, is_quick, why_not
from benchmarks.policies.replays import CONTENDERS, OURS, Contender, capacities, run
from benchmarks.policies.report import markdown, print_study
from benchmarks.policies.verdict import REPORTED_SEEDS, Study, figures, load, write
from benchmarks.support import RESULTS, ROOT
from router.config import ConfigError
from sim.commands.arguments import above_zero, check_writable, positive, seeds_number
from sim.latency import CalibrationError
from sim.machine import machine
from sim.pool import all_cores
from sim.report.progress import counted
from sim.report.summary import Slo

TITLE = "Routing policies on equal hardware"
JSON = RESULTS / "policies.json"
REPORT = ROOT / "docs" / "policies.md"
PLAIN = Setting()


def main(given: Sequence[str] | None = None) -> int:
    """Run the cells that the command line asks for, or only write the report again."""
    given = sys.argv[1:] if given is None else list(given)
    arguments = parser().parse_args(given)
    out = Console(width=None if sys.stdout.isatty() else 200)
    errors = Console(stderr=True)
    if arguments.render is not None:
        try:
            study = load(arguments.render)
        except (OSError, msgspec.MsgspecError) as error:
            raise SystemExit(f"--render: {arguments.render} holds no study: {error}") from None
    else:
        try:
            check_writable("--json", arguments.json, arguments.azure, arguments.mooncake)
            check_writable("--report", arguments.report, arguments.json)
            study = measure(arguments, given, errors)
        except (ConfigError, CalibrationError) as error:
            errors.print(str(error), style="red", markup=False, soft_wrap=True)
            return 2
        write(study, arguments.json)
        out.print(f"written to {arguments.json}", highlight=False)
    print_study(out, study)
    arguments.report.write_text(markdown(study), encoding="utf-8")
    out.print(f"written to {arguments.report}", highlight=False)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=(__doc__ or "").strip()
    )
    top.add_argument("--seeds", type=seeds_number, default=5, metavar="K", help="default 5")
    top.add_argument(
        "--first-seed",
        type=int,
        default=REPORTED_SEEDS,
        metavar="N",
        help="the first of them (default 100: seeds 0 to 99 are for tuning, and never reported)",
    )
    top.add_argument("--only", type=pattern, metavar="PATTERN", help="cells by their name")
    top.add_argument(
        "--contenders",
        metavar="A,B",
        help=f"of {', '.join(one.name for one in CONTENDERS)}; the judged one is always among them",
    )
    top.add_argument(
        "--judged",
        default=OURS,
        choices=[one.name for one in CONTENDERS if one.ours],
        help=f"which of ours the goals are about (default {OURS})",
    )
    top.add_argument("--quick", action="store_true", help="few cells, 2 seeds")
    top.add_argument("--jobs", type=positive, default=all_cores(), metavar="N")
    top.add_argument("--json", type=Path, default=JSON, metavar="FILE")
    top.add_argument("--report", type=Path, default=REPORT, metavar="FILE.md")
    top.add_argument(
        "--render", type=Path, metavar="JSON", help="write the report of a run, without running"
    )
    fleet = top.add_argument_group("the fleet and what is offered to it")
    fleet.add_argument("--workers", type=positive, default=PLAIN.workers)
    fleet.add_argument("--slots", type=positive, default=PLAIN.slots, help="of each worker")
    fleet.add_argument("--max-ongoing-requests", type=positive, default=PLAIN.max_ongoing_requests)
    fleet.add_argument("--calibration", default=PLAIN.calibration)
    fleet.add_argument(
        "--duration",
        type=above_zero,
        default=PLAIN.duration_s,
        metavar="S",
        help="seconds over which a cell's requests come, not of a trace (default 60)",
    )
    fleet.add_argument(
        "--trace-requests",
        type=positive,
        default=PLAIN.trace_requests,
        metavar="N",
        help="how many of a trace, at most (default 3000)",
    )
    fleet.add_argument("--slo-ttft", type=above_zero, default=PLAIN.slo.ttft_s, metavar="S")
    fleet.add_argument("--slo-itl", type=above_zero, default=PLAIN.slo.itl_s, metavar="S")
    fleet.add_argument("--azure", type=Path, default=PLAIN.azure, metavar="CSV")
    fleet.add_argument("--mooncake", type=Path, default=PLAIN.mooncake, metavar="JSONL")
    return top


def measure(arguments: argparse.Namespace, given: Sequence[str], errors: Console) -> Study:
    """Run. Raises `ConfigError`, `CalibrationError`, and `SystemExit` where there is nothing to do."""
    setting = Setting(
        workers=arguments.workers,
        slots=arguments.slots,
        max_ongoing_requests=arguments.max_ongoing_requests,
        calibration=arguments.calibration,
        duration_s=arguments.duration,
        trace_requests=arguments.trace_requests,
        slo=Slo(ttft_s=arguments.slo_ttft, itl_s=arguments.slo_itl),
        azure=arguments.azure,
        mooncake=arguments.mooncake,
    )
    contenders = wanted_contenders(arguments.contenders, arguments.judged)
    seeds = tuple(
        range(
            arguments.first_seed,
            arguments.first_seed
            + (min(2, arguments.seeds) if arguments.quick else arguments.seeds),
        )
    )
    left_out: list[str] = []
    cells = wanted_cells(arguments, setting, left_out)
    for text in left_out:
        errors.print(f"left out: {text}", style="yellow", markup=False, soft_wrap=True)
    began = time.monotonic()
    capacity = capacities(cells, setting)
    with counted(errors) as progress:
        task = progress.add_task("cells × seeds", total=len(cells) * len(seeds))
        runs = run(
            cells,
            contenders,
            seeds,
            setting,
            capacity,
            jobs=arguments.jobs,
            progress=lambda done: progress.update(task, completed=done),
        )
    return Study(
        benchmark=TITLE,
        command=shlex.join(["python", "-m", "benchmarks.policies", *given]),
        date=datetime.now(tz=UTC).date().isoformat(),
        machine=f"{machine()}, Python {platform.python_version()}",
        took_s=round(time.monotonic() - began, 1),
        # By name alone: where they lay on this machine is nobody's business.
        setting=msgspec.structs.replace(
            setting, azure=Path(setting.azure.name), mooncake=Path(setting.mooncake.name)
        ),
        seeds=seeds,
        judged=arguments.judged,
        capacities_rps={str(source): round(rps, 4) for source, rps in capacity.items()},
        contenders=contenders,
        left_out=tuple(left_out),
        cells=tuple(figures(one, setting) for one in runs),
    )


def pattern(text: str) -> "re.Pattern[str]":
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no pattern: {error}") from None


def wanted_contenders(names: str | None, judged: str) -> tuple[Contender, ...]:
    """Those that were asked for, and the judged one. Raises `SystemExit` for others."""
    if names is None:
        return CONTENDERS
    wanted = names.split(",")
    known = {one.name for one in CONTENDERS}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no contender {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    found = tuple(one for one in CONTENDERS if one.name in wanted or one.name == judged)
    if all(one.ours for one in found):
        raise SystemExit(f"name a peer too: {judged} is compared with peers")
    return found


def wanted_cells(
    arguments: argparse.Namespace, setting: Setting, left_out: list[str]
) -> list[Cell]:
    """Those that were asked for and can be had; the others' reasons go to `left_out`."""
    # Generated requests have the Azure trace's lengths: without it there is nothing to offer.
    if (reason := why_not(Source.STEADY, setting)) is not None:
        raise SystemExit(f"no lengths: {reason}")
    sources = []
    for source in Source:
        reason = None if source in GENERATED else why_not(source, setting)
        if reason is None:
            sources.append(source)
        else:
            left_out.append(reason)
    cells = [
        cell
        for cell in all_cells(sources)
        if (not arguments.quick or is_quick(cell))
        and (arguments.only is None or arguments.only.search(cell.name))
    ]
    if not cells:
        raise SystemExit("no cell is left; a name is such as: " + next(all_cells()).name)
    return cells


if __name__ == "__main__":
    sys.exit(main())
