"""`python -m sim replay TRACE`: what the router would have done with this traffic, and how fast."""

import argparse
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from router.config import ConfigError, load
from sim.commands import arguments as shared
from sim.explain import Witness
from sim.replay import Replay
from sim.report.pages import replay_page
from sim.report.progress import counted
from sim.report.table import latency_table, print_table, summary_table, worker_table
from sim.report.timeline import Sampler
from sim.traces import read, scan

if TYPE_CHECKING:
    from sim.commands import Commands

# getrusage counts kibibytes on Linux and bytes on macOS.
RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "replay",
        help="replay a trace and print latencies, hits, loads and goodput",
        description=(
            "Replay a trace through the production router over simulated vLLM workers. Traces are "
            "JSON lines (timestamp in ms, input_length, output_length, extra.model) or the CSV of "
            "Azure, BurstGPT or ServeGen, told apart by how they begin."
        ),
        epilog=(
            "example: python -m sim replay azure.csv --adapters 200 --seed 1 "
            "--json out.json --report out.html"
        ),
    )
    shared.add_workload(command)
    shared.add_policy(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    command.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page here")
    command.add_argument(
        "--explain",
        type=shared.positive,
        metavar="REQUEST_ID",
        help="tell all that happened to one request; its id is its number in order of arrival, from 1",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Replay, print, write what was asked for; return the exit status."""
    witness = Witness(arguments.explain) if arguments.explain is not None else None
    result = replay(arguments, errors, witness)
    console = Console()
    for table in (summary_table(result), latency_table(result), worker_table(result)):
        print_table(console, table)
    if witness is not None:
        for line in witness.lines():
            console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if result["unfinished"]:
        errors.print(f"error: {result['unfinished']} requests never ended", style="red")
        return 1
    return 0


def replay(
    arguments: argparse.Namespace, errors: Console, witness: Witness | None = None
) -> dict[str, Any]:
    """Run one replay and write its files."""
    config = load(arguments.config)
    read_too = (arguments.trace, arguments.config)
    shared.check_writable("--json", arguments.json, *read_too)
    shared.check_writable("--report", arguments.report, *read_too, arguments.json)
    reading = shared.reading(arguments)
    summary = scan(arguments.trace, limit=arguments.limit, reading=reading)
    shared.tell_skipped(errors, summary.bad)
    if witness is not None and witness.number > summary.requests:
        raise ConfigError(
            f"--explain: there is no request {witness.number:,}; "
            f"those of {arguments.trace.name} are 1 to {summary.requests:,}"
        )
    rows = itertools.islice(read(arguments.trace, reading), arguments.limit)
    options = shared.options(
        arguments, arguments.policy or config.router.policy, summary.hash_block_tokens
    )
    sampler = Sampler(summary.span_s / options.speed) if arguments.report is not None else None
    with counted(errors) as progress:
        task = progress.add_task(f"replaying {arguments.trace.name}", total=summary.requests)
        started = time.perf_counter()
        simulation = Replay(
            config,
            rows,
            options,
            models=summary.models,
            progress=lambda ended: progress.update(task, completed=ended),
            sampler=sampler,
            witness=witness,
        )
        result = simulation.run()
        wall_s = time.perf_counter() - started
    assert result["requests"] == summary.requests
    result["sim"] |= {
        "wall_s": wall_s,
        "requests_per_wall_s": summary.requests / wall_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_UNITS_PER_MIB,
    }
    if arguments.json is not None:
        text = json.dumps(result, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if sampler is not None:
        page = replay_page(
            f"Replay of {arguments.trace.name}", result, simulation.latencies, sampler.timeline()
        )
        arguments.report.write_text(page, encoding="utf-8")
    return result
