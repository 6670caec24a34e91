"""`python -m sim replay TRACE`: what the router would have done with this traffic, and how fast."""

import argparse
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from router.config import Config, ConfigError, load
from router.core.policies import POLICIES
from sim.fleet import EngineArgumentError
from sim.latency import CalibrationError
from sim.replay import Options, Replay, UnknownModelError
from sim.report.page import render
from sim.report.summary import Slo
from sim.report.table import print_result
from sim.traces import TraceError, read, scan
from sim.workload import DEFAULT_LOCALITY

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")
USER_ERRORS = (
    ConfigError,
    TraceError,
    CalibrationError,
    EngineArgumentError,
    UnknownModelError,
    OSError,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m sim",
        description="Run the production routing core over a trace, in simulated time.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    replay = commands.add_parser(
        "replay",
        help="replay a trace and print latencies, hits, loads and goodput",
        description=(
            "Replay a trace through the production router over simulated vLLM workers. Traces are "
            "JSON lines (timestamp in ms, input_length, output_length, extra.model) or Azure's CSV."
        ),
        epilog=(
            "example: python -m sim replay azure.csv --adapters 200 --seed 1 "
            "--json out.json --report out.html"
        ),
    )
    replay.add_argument("trace", type=Path, metavar="TRACE", help="a .jsonl or .csv trace")
    replay.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the router's configuration; without it, four H100 workers of 16 slots",
    )
    replay.add_argument("--policy", choices=sorted(POLICIES), help="instead of the configuration's")
    replay.add_argument("--seed", type=int, default=0, help="for every random choice (default 0)")
    replay.add_argument("--workers", type=_positive, help="instead of min_replicas")
    replay.add_argument(
        "--adapters",
        type=_natural,
        default=0,
        metavar="N",
        help="give requests that name no adapter one of N",
    )
    replay.add_argument(
        "--locality",
        type=_share,
        default=DEFAULT_LOCALITY,
        metavar="P",
        help="how often a request asks for a recently used adapter again, 0 to 1 "
        f"(default {DEFAULT_LOCALITY}; 0 draws independently)",
    )
    replay.add_argument(
        "--zipf",
        type=_not_negative,
        default=1.0,
        metavar="S",
        help="exponent of the adapters' popularity (default 1)",
    )
    replay.add_argument(
        "--speed",
        type=_above_zero,
        default=1.0,
        metavar="X",
        help="let requests come X times as fast (default 1)",
    )
    replay.add_argument("--limit", type=_positive, metavar="N", help="replay the first N requests")
    replay.add_argument(
        "--slo-ttft", type=_above_zero, default=2.0, metavar="S", help="first token in S seconds"
    )
    replay.add_argument(
        "--slo-itl", type=_above_zero, default=0.1, metavar="S", help="S seconds between tokens"
    )
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    replay.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page here")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        result = replay(arguments, errors)
    except USER_ERRORS as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted: nothing was written", style="red")
        return 130
    print_result(Console(), result)
    if result["unfinished"]:
        errors.print(f"error: {result['unfinished']} requests never ended", style="red")
        return 1
    return 0


def replay(arguments: argparse.Namespace, errors: Console) -> dict[str, Any]:
    """Run `replay` and write what was asked for. Raises one of `USER_ERRORS`."""
    config = _config(arguments)
    for option, path in (("--json", arguments.json), ("--report", arguments.report)):
        _check_writable(option, path)
    summary = scan(arguments.trace, limit=arguments.limit)
    rows = itertools.islice(read(arguments.trace), arguments.limit)
    options = Options(
        policy=arguments.policy or config.router.policy,
        seed=arguments.seed,
        workers=arguments.workers,
        adapters=arguments.adapters,
        locality=arguments.locality,
        zipf=arguments.zipf,
        speed=arguments.speed,
        slo=Slo(ttft_s=arguments.slo_ttft, itl_s=arguments.slo_itl),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(f"replaying {arguments.trace.name}", total=summary.requests)
        started = time.perf_counter()
        run = Replay(
            config,
            rows,
            options,
            models=summary.models,
            progress=lambda ended: progress.update(task, completed=ended),
        )
        result = run.run()
        wall_s = time.perf_counter() - started
    assert result["requests"] == summary.requests
    result["sim"] |= {
        "wall_s": wall_s,
        "requests_per_wall_s": summary.requests / wall_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MIB,
    }
    if arguments.json is not None:
        text = json.dumps(result, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.report is not None:
        page = render(result, run.latencies, f"Replay of {arguments.trace.name}")
        arguments.report.write_text(page, encoding="utf-8")
    return result


# getrusage counts kibibytes on Linux and bytes on macOS.
_RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def _check_writable(option: str, path: Path | None) -> None:
    """Find out before the run what would lose its result. Raises `ConfigError`."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option}: {path} cannot be written; name another file")


def _config(arguments: argparse.Namespace) -> Config:
    return load(arguments.config or DEFAULT_CONFIG)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
    return value


def _share(text: str) -> float:
    return _number(text, 0, 1)


def _not_negative(text: str) -> float:
    return _number(text, 0, 100)


def _above_zero(text: str) -> float:
    return _number(text, 1e-6, 1e6)


if __name__ == "__main__":
    sys.exit(main())
