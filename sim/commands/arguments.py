"""What several commands ask for in the same words: numbers, the workload, the files they write."""

import argparse
import os
from pathlib import Path

from rich.console import Console

from router.config import ConfigError
from router.core.policies import POLICIES
from sim.experiment import SEEDS_MAX
from sim.pool import all_cores
from sim.replay import STALENESS_S, Options
from sim.report.summary import Slo
from sim.traces import BadRows, Reading, TimeUnit
from sim.traces.jsonl import MODEL
from sim.workload import DEFAULT_LOCALITY

ADAPTERS_MAX = 10_000_000
DEFAULT_CONFIG = Path(__file__).parents[1] / "default.yaml"


def add_workload(command: argparse.ArgumentParser) -> None:
    """The trace, the configuration, and how the trace is to be read."""
    command.add_argument("trace", type=Path, metavar="TRACE", help="a .jsonl or .csv trace")
    command.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="the router's configuration; without it, four H100 workers of 16 slots",
    )
    command.add_argument("--workers", type=positive, help="instead of min_replicas")
    command.add_argument(
        "--adapters",
        type=adapters,
        default=0,
        metavar="N",
        help="give requests that name no adapter one of N",
    )
    add_popularity(command)
    command.add_argument(
        "--speed",
        type=above_zero,
        default=1.0,
        metavar="X",
        help="let requests come X times as fast (default 1)",
    )
    command.add_argument(
        "--staleness",
        type=not_negative,
        default=STALENESS_S,
        metavar="S",
        help="how late the router hears of a change at a worker, in seconds "
        f"(default {STALENESS_S})",
    )
    add_reading(command)
    command.add_argument("--limit", type=positive, metavar="N", help="replay the first N requests")
    command.add_argument(
        "--slo-ttft", type=above_zero, default=2.0, metavar="S", help="first token in S seconds"
    )
    command.add_argument(
        "--slo-itl", type=above_zero, default=0.1, metavar="S", help="S seconds between tokens"
    )


def add_popularity(command: argparse.ArgumentParser) -> None:
    """How adapters are drawn where a trace names none."""
    command.add_argument(
        "--locality",
        type=share,
        default=DEFAULT_LOCALITY,
        metavar="P",
        help="how often a request asks for a recently used adapter again, 0 to 1 "
        f"(default {DEFAULT_LOCALITY}; 0 draws independently)",
    )
    command.add_argument(
        "--zipf",
        type=not_negative,
        default=1.0,
        metavar="S",
        help="exponent of the adapters' popularity (default 1)",
    )


def add_reading(command: argparse.ArgumentParser) -> None:
    """What of a trace's file to let be, and what it does not say itself."""
    command.add_argument(
        "--skip-bad", action="store_true", help="leave bad rows out and count them"
    )
    command.add_argument(
        "--time-unit",
        type=TimeUnit,
        choices=list(TimeUnit),
        help="what timestamps of JSON lines count (default ms; vLLM's timed_trace often has s)",
    )


def reading(arguments: argparse.Namespace) -> Reading:
    """How the command line wants traces read."""
    return Reading(skip_bad=arguments.skip_bad, unit=arguments.time_unit)


def tell_skipped(errors: Console, bad: BadRows) -> None:
    """Say what was left out, if anything was."""
    if bad.count:
        errors.print(
            f"bad rows left out: {bad.count:,}; the first: {bad.first}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def add_policy(command: argparse.ArgumentParser) -> None:
    """One policy and one seed."""
    command.add_argument(
        "--policy", choices=sorted(POLICIES), help="instead of the configuration's"
    )
    command.add_argument("--seed", type=int, default=0, help="for every random choice (default 0)")


def add_many(command: argparse.ArgumentParser, *, seeds: int) -> None:
    """Several seeds, several cores, and the files to write."""
    command.add_argument(
        "--seeds",
        type=seeds_number,
        default=seeds,
        metavar="K",
        help=f"replay every point with K seeds, for confidence intervals (default {seeds})",
    )
    command.add_argument("--seed", type=int, default=0, help="the first of the seeds (default 0)")
    command.add_argument(
        "--jobs",
        type=positive,
        default=all_cores(),
        metavar="N",
        help="replay N at a time (default: one for each core)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    command.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page here")


def add_targets(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The service level that a fleet is to give."""
    command.add_argument(
        "--slo",
        action="append",
        default=[],
        required=required,
        metavar="METRIC=VALUE",
        help="what a fleet must give, such as ttft_p99=2s, itl_p99=100ms or attainment=99%% "
        "(of the requests within --slo-ttft and --slo-itl); may be given several times",
    )


def options(arguments: argparse.Namespace, policy: str, hash_block_tokens: int) -> Options:
    """What a replay is given of the command line, and of the trace."""
    return Options(
        policy=policy,
        seed=arguments.seed,
        workers=arguments.workers,
        adapters=arguments.adapters,
        locality=arguments.locality,
        zipf=arguments.zipf,
        speed=arguments.speed,
        staleness_s=arguments.staleness,
        hash_block_tokens=hash_block_tokens,
        slo=Slo(ttft_s=arguments.slo_ttft, itl_s=arguments.slo_itl),
    )


def check_writable(option: str, path: Path | None, *others: Path | None) -> None:
    """Find out before the run what would lose its result, or one of the `others`.

    Those are what is read, and what else is written. Raises `ConfigError`.
    """
    if path is None:
        return
    for other in others:
        if other is not None and path.resolve() == other.resolve():
            raise ConfigError(f"{option}: {path} is needed for something else; name another file")
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option}: {path} cannot be written; name another file")


def check_trace_output(path: Path) -> None:
    """The same of a trace that is to be written, which takes the place of a file. As above."""
    check_writable("OUT", path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"OUT: {path} is no file; name one")


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def seeds_number(text: str) -> int:
    """A number of seeds."""
    return int(_number(str(_whole(text, 1)), 1, SEEDS_MAX))


def natural(text: str) -> int:
    """A whole number, 0 or above."""
    return _whole(text, 0)


def base_model(text: str) -> str:
    """The name of a base model, without an adapter's."""
    if ":" in text or not MODEL.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is not a base model's name")
    return text


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
    return value


def adapters(text: str) -> int:
    """How many adapters: what fits into memory."""
    value = _whole(text, 0)
    if value > ADAPTERS_MAX:
        raise argparse.ArgumentTypeError(f"{text} is above {ADAPTERS_MAX:,}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, 0, 1)


def not_negative(text: str) -> float:
    """A number from 0 to 100."""
    return _number(text, 0, 100)


def at_least_one(text: str) -> float:
    """A number from 1 to a million."""
    return _number(text, 1, 1e6)


def above_zero(text: str) -> float:
    """A positive number of sensible size."""
    return _number(text, 1e-6, 1e6)
