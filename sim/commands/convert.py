"""`python -m sim convert IN... OUT.jsonl`: any trace as the contract's JSON lines, with adapters."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from router.config import ConfigError
from sim.commands import arguments as shared
from sim.report.profile import print_profile
from sim.report.progress import watched
from sim.traces import BadRows, no_rows, read
from sim.traces.assign import (
    DEFAULT_BASE,
    AdaptersFrom,
    BySession,
    Independent,
    InSequence,
    Source,
    assigned,
    sequence,
)
from sim.traces.join import Join, faster, joined
from sim.traces.profile import Profile
from sim.traces.write import write
from sim.workload import AdapterDraw

if TYPE_CHECKING:
    from sim.commands import Commands


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "convert",
        help="write any trace as JSON lines, and give its requests adapters",
        description=(
            "Write traces as JSON lines that `replay`, AIPerf, Mooncake's tools and vLLM's "
            "timed_trace read. Input is told by how it begins: Azure's CSV of 2023 and 2024, "
            "Mooncake's, AIPerf's, vLLM's and Qwen's JSON lines, BurstGPT's and ServeGen's CSV. "
            "Rows that name an adapter keep it."
        ),
        epilog=(
            "example: python -m sim convert azure.csv out.jsonl --adapters 200 --locality 0.6 "
            "--seed 1"
        ),
    )
    command.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="traces of any format")
    command.add_argument("output", type=Path, metavar="OUT.jsonl", help="the file to write")
    command.add_argument(
        "--join",
        type=Join,
        choices=list(Join),
        default=Join.OVERLAY,
        help="several inputs: all at once from time 0 (overlay, the default), or one after another",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--adapters",
        type=shared.positive,
        metavar="N",
        help="draw one of N adapters for each request that names none",
    )
    which.add_argument(
        "--adapter-sequence",
        type=Path,
        metavar="FILE",
        help="take them from this file in its order, one name a line or a trace's, repeated at need",
    )
    command.add_argument(
        "--adapters-from",
        type=AdaptersFrom,
        choices=list(AdaptersFrom),
        default=AdaptersFrom.SESSIONS,
        help="draw them with the locality of real traffic, one for each session (sessions, the "
        "default), or each independently (zipf)",
    )
    shared.add_popularity(command)
    command.add_argument(
        "--base",
        type=shared.base_model,
        metavar="NAME",
        help="the base model of every row (default: the row's own, "
        f"or `{DEFAULT_BASE}` where it gets an adapter)",
    )
    command.add_argument(
        "--speed",
        type=shared.above_zero,
        default=1.0,
        metavar="X",
        help="let requests come X times as fast (default 1)",
    )
    command.add_argument(
        "--limit", type=shared.positive, metavar="N", help="write the first N requests"
    )
    shared.add_reading(command)
    command.add_argument("--seed", type=int, default=0, help="for drawing adapters (default 0)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Convert, and print what the new trace is like; return the exit status."""
    shared.check_trace_output(arguments.output)
    for path in arguments.inputs:
        if path.exists() and arguments.output.exists() and path.samefile(arguments.output):
            raise ConfigError(f"OUT: {path} is read here; name another file")
    bad, profile = BadRows(), Profile()
    reading = shared.reading(arguments)
    source = _source(arguments)
    rows = joined([read(path, reading, bad) for path in arguments.inputs], arguments.join)
    rows = itertools.islice(rows, arguments.limit)
    rows = assigned(faster(rows, arguments.speed), source, arguments.base)
    first = next(rows, None)
    if first is None:
        raise no_rows(arguments.inputs[0], bad)
    rows = itertools.chain([first], rows)
    write(arguments.output, watched(rows, profile, errors, "converting"))
    shared.tell_skipped(errors, bad)
    if isinstance(source, InSequence) and source.rounds > 1:
        errors.print(
            f"{arguments.adapter_sequence} is shorter than the trace: used {source.rounds} times",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console = Console()
    print_profile(console, profile)
    console.print(f"wrote {arguments.output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _source(arguments: argparse.Namespace) -> Source | None:
    if arguments.adapter_sequence is not None:
        return sequence(arguments.adapter_sequence, shared.reading(arguments))
    if arguments.adapters is None:
        return None
    independent = arguments.adapters_from is AdaptersFrom.ZIPF
    draw = AdapterDraw(
        arguments.adapters,
        locality=0.0 if independent else arguments.locality,
        zipf=arguments.zipf,
        seed=arguments.seed,
    )
    return Independent(draw) if independent else BySession(draw)
