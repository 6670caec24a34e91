"""`python -m sim generate OUT.jsonl`: a workload made up by rule, which says how in its first row."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from router.config import ConfigError
from sim.commands import arguments as shared
from sim.commands.workload_syntax import SYNTAX, flash, law, priorities, states, tenants
from sim.generate.arrivals import Arrivals, Diurnal, Gamma, Mmpp, Poisson
from sim.generate.lengths import Empirical, Independent, Lengths, LogNormal, Pair, empirical
from sim.generate.workload import Adapters, Sessions, Workload, generate
from sim.report.profile import print_profile
from sim.report.progress import watched
from sim.traces import no_rows, read
from sim.traces.profile import Profile
from sim.traces.row import BadRows
from sim.traces.write import write

if TYPE_CHECKING:
    from sim.commands import Commands

DEFAULT_REQUESTS: Final = 10_000
DEFAULT_RATE_RPS: Final = 5.0
PAIRS_MAX: Final = 1_000_000
DEFAULT_INPUT: Final = LogNormal(1024, 1.0)
DEFAULT_OUTPUT: Final = LogNormal(256, 1.0)
# process -> the options that say more about it
PROCESSES: Final = {
    "poisson": {"rate"},
    "gamma": {"rate", "cv"},
    "mmpp": {"states"},
    "diurnal": {"rate", "swing", "period"},
}
OF_A_PROCESS: Final = ("rate", "cv", "states", "swing", "period")


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "generate",
        help="make up a workload: arrivals, lengths, adapters, tenants, sessions",
        description=(
            "Make up a workload and write it as JSON lines. The same options give the same file,\n"
            "byte for byte, on any machine; `extra.generated` in its first row records them."
        ),
        epilog=SYNTAX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("output", type=Path, metavar="OUT.jsonl", help="the file to write")
    size = command.add_argument_group("size: whichever ends first")
    size.add_argument(
        "--requests", type=shared.positive, metavar="N", help=f"(default {DEFAULT_REQUESTS:,})"
    )
    size.add_argument("--duration", type=shared.above_zero, metavar="S", help="seconds")
    size.add_argument("--seed", type=int, default=0, help="for every random choice (default 0)")
    _add_arrivals(command.add_argument_group("arrivals"))
    lengths = command.add_argument_group("lengths, in tokens")
    lengths.add_argument(
        "--input-tokens", type=law, metavar="LAW", help="prompts (default lognormal:1024:1)"
    )
    lengths.add_argument(
        "--output-tokens", type=law, metavar="LAW", help="answers (default lognormal:256:1)"
    )
    lengths.add_argument(
        "--lengths-from",
        type=Path,
        metavar="TRACE",
        help="draw them in pairs from another trace instead (its first million rows)",
    )
    _add_users(command)
    command.set_defaults(run=run)


def _add_arrivals(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--arrivals", choices=list(PROCESSES), default="poisson")
    group.add_argument(
        "--rate",
        type=shared.above_zero,
        metavar="RPS",
        help=f"mean requests a second (default {DEFAULT_RATE_RPS:g})",
    )
    group.add_argument(
        "--cv",
        type=shared.above_zero,
        help="gamma: coefficient of variation of the gaps (default 2; 1 is Poisson)",
    )
    group.add_argument(
        "--states", type=states, metavar="STATES", help="mmpp: two or more of RPS:SECONDS"
    )
    group.add_argument(
        "--swing", type=shared.share, metavar="P", help="diurnal: 0 to 1 (default 0.8)"
    )
    group.add_argument(
        "--period", type=shared.above_zero, metavar="S", help="diurnal: seconds (default 86,400)"
    )
    group.add_argument(
        "--flash",
        type=flash,
        action="append",
        default=[],
        metavar="CROWD",
        help="a crowd that comes at once, of one adapter or of all; may be given again",
    )


def _add_users(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=shared.base_model, metavar="NAME", help="(default base)")
    command.add_argument(
        "--adapters", type=shared.positive, metavar="N", help="each request asks for one of N"
    )
    shared.add_popularity(command)
    command.add_argument(
        "--sessions",
        type=shared.at_least_one,
        metavar="TURNS",
        help="requests come in sessions of so many on average, each with one adapter and tenant",
    )
    command.add_argument(
        "--open-sessions",
        type=shared.positive,
        metavar="N",
        help=f"sessions that are open at a time (default {Sessions(1).open})",
    )
    command.add_argument("--tenants", type=tenants, metavar="NAMES", help="with their weights")
    command.add_argument("--priorities", type=priorities, metavar="P", help="with their weights")


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Generate, and print what the trace is like; return the exit status."""
    shared.check_trace_output(arguments.output)
    lengths, pairs = _lengths(arguments)
    requests = arguments.requests
    if requests is None and arguments.duration is None:
        requests = DEFAULT_REQUESTS
    workload = Workload(
        seed=arguments.seed,
        arrivals=_arrivals(arguments),
        lengths=lengths,
        requests=requests,
        duration_s=arguments.duration,
        flashes=tuple(arguments.flash),
        base=arguments.base,
        adapters=_adapters(arguments),
        sessions=_sessions(arguments),
        tenants=arguments.tenants or (("", 1.0),),
        priorities=arguments.priorities or ((0, 1.0),),
    )
    profile = Profile()
    rows = generate(workload, pairs)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"--duration: no request comes in {arguments.duration:g} s at this rate")
    rows = itertools.chain([first], rows)
    write(
        arguments.output,
        watched(rows, profile, errors, "generating"),
        generated=workload.record(),
    )
    console = Console()
    print_profile(console, profile)
    console.print(f"wrote {arguments.output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _arrivals(arguments: argparse.Namespace) -> Arrivals:
    process = arguments.arrivals
    for option in OF_A_PROCESS:
        if getattr(arguments, option) is not None and option not in PROCESSES[process]:
            takes = ", ".join(f"--{name}" for name in sorted(PROCESSES[process]))
            raise ConfigError(f"--{option}: says nothing about {process}, which takes {takes}")
    rate_rps = arguments.rate or DEFAULT_RATE_RPS
    if process == "gamma":
        return Gamma(rate_rps, arguments.cv or 2.0)
    if process == "mmpp":
        if arguments.states is None:
            raise ConfigError("--states: name mmpp's states, such as --states 2:60,20:10")
        return Mmpp(arguments.states)
    if process == "diurnal":
        swing = 0.8 if arguments.swing is None else arguments.swing
        return Diurnal(rate_rps, swing, arguments.period or 86_400.0)
    return Poisson(rate_rps)


def _lengths(arguments: argparse.Namespace) -> tuple[Lengths, list[Pair]]:
    source: Path | None = arguments.lengths_from
    if source is None:
        return Independent(
            arguments.input_tokens or DEFAULT_INPUT, arguments.output_tokens or DEFAULT_OUTPUT
        ), []
    if arguments.input_tokens or arguments.output_tokens:
        raise ConfigError("--lengths-from: leave --input-tokens and --output-tokens out")
    rows = itertools.islice(read(source), PAIRS_MAX)
    pairs = [(row.input_length, row.output_length) for row in rows]
    if not pairs:
        raise no_rows(source, BadRows())
    recorded: Empirical = empirical(source.name, pairs)
    return recorded, pairs


def _adapters(arguments: argparse.Namespace) -> Adapters | None:
    if arguments.adapters is None:
        return None
    return Adapters(arguments.adapters, arguments.zipf, arguments.locality)


def _sessions(arguments: argparse.Namespace) -> Sessions | None:
    if arguments.sessions is None:
        if arguments.open_sessions is not None:
            raise ConfigError("--open-sessions: say with --sessions how long they are")
        return None
    return Sessions(arguments.sessions, arguments.open_sessions or Sessions(1).open)
