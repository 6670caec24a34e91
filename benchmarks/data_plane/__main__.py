"""`python -m benchmarks.data_plane`: measure all contenders in turn, round after round.

Needs two cores: the router has one, engines and clients the other. Progress is on standard error.
"""

import argparse
import contextlib
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from benchmarks.data_plane import paired, profile
from benchmarks.data_plane.cases import Case, Lost, Round, Sizes, measure, running
from benchmarks.data_plane.contenders import DIRECT, Absent, Contender, lorayard
from benchmarks.data_plane.paired import KWARGS
from benchmarks.data_plane.peers import haproxy, haproxy_delaying, smg, vllm_router
from benchmarks.data_plane.processes import (
    ClientProcess,
    Cores,
    StartError,
    client_process,
    engine_process,
)
from benchmarks.data_plane.report import as_data, goal_table, table
from benchmarks.data_plane.verdict import OURS, Goal, goals
from benchmarks.data_plane.wire import BASE, WORKERS
from benchmarks.support import parser, report

FILES_SPARE: Final = 80
LOG_SHOWN: Final = 1500
CONTENDERS: Final[dict[str, Callable[[], Contender] | None]] = {
    DIRECT: None,
    "lorayard": lorayard,
    "vllm-router": vllm_router,
    "smg": smg,
    "haproxy": haproxy,
    "haproxy-delaying": haproxy_delaying,
}


class Run(msgspec.Struct):
    """All that was found. By contender and case the figures of each round."""

    rounds: dict[str, dict[Case, list[dict[str, float]]]] = {}
    lost: list[Lost] = []
    absent: dict[str, str] = {}
    commands: dict[str, str] = {}
    versions: dict[str, str] = {}


def main() -> None:
    """Run it all."""
    top = parser("data_plane", __doc__ or "")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    plain = Sizes()
    cases = [case.value for case in Case]
    names = list(CONTENDERS)
    top.add_argument("--seconds", type=float, default=plain.seconds, help="of a case in a round")
    top.add_argument("--only", type=_some(cases), default=cases, metavar="CASE,...",
                     help=f"of {', '.join(cases)}")  # fmt: skip
    top.add_argument("--contenders", type=_some(names), default=names[:-1], metavar="NAME,...",
                     help=f"of {', '.join(names)}")  # fmt: skip
    top.add_argument("--crowd", type=int, default=plain.crowd, metavar="N", help="streams at once")
    top.add_argument("--profile", action="store_true",
                     help="write where the router's time goes beside the JSON file")  # fmt: skip
    top.add_argument("--engine", choices=("fixed", *KWARGS), default="fixed",
                     help="vllm: only throughput against two real engines, in pairs")  # fmt: skip
    top.add_argument("--model", default=BASE, help="with --engine vllm: the model's folder")
    top.add_argument("--pairs", type=int, default=30, help="with --engine vllm")
    top.add_argument("--requests", type=int, default=32, help="with --engine vllm: of one round")
    top.add_argument("--tokens", type=int, default=16, help="with --engine vllm: of an answer")
    arguments = top.parse_args()
    signal.signal(signal.SIGTERM, _as_interrupt)
    sizes = msgspec.structs.replace(plain, seconds=arguments.seconds, crowd=arguments.crowd)
    chosen = [Case(case) for case in arguments.only]
    allowed = _crowd(sizes.crowd)
    if Case.CROWD in chosen and allowed < sizes.crowd:
        _say(f"crowd: {allowed} streams, since no more files may be open; asked for {sizes.crowd}")
    sizes = msgspec.structs.replace(sizes, crowd=allowed)
    with tempfile.TemporaryDirectory(prefix="lorayard-bench-") as folder:
        if arguments.engine != "fixed":
            _paired(arguments, Path(folder))
            return
        found = run(arguments.contenders, chosen, sizes, arguments.rounds, Path(folder), _say)
        show(found, sizes, arguments.rounds, arguments.json)
        if arguments.profile:
            path = arguments.json.with_name(f"{arguments.json.stem}_profile.txt")
            cores = Cores.of_this_machine()
            with (
                engine_process(WORKERS, cores, Path(folder)) as engines,
                client_process(cores, Path(folder)) as client,
            ):
                profile.write(path, engines, client, cores, sizes, _say)
            print(f"written to {path}")


def _paired(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure against real engines and write it beside the other file."""
    path: Path = arguments.json
    if path.stem == "data_plane":
        path = path.with_name(f"data_plane_{arguments.engine}.json")
    found = paired.measure(
        arguments.engine,
        arguments.model,
        pairs=arguments.pairs,
        requests=arguments.requests,
        tokens=arguments.tokens,
        folder=folder,
        say=_say,
    )
    goal = Goal("throughput, of that direct", paired.THROUGHPUT_GOAL, "×", found.ratio, least=True)
    shown = f"{found.ratio:.3f} ({found.least:.3f}-{found.most:.3f})"
    report(
        f"Requests through the router and directly to two {arguments.engine} engines, "
        f"{arguments.pairs} pairs; the ratio's median and its 95% interval",
        ("", "direct /s", "router /s", "ratio", "asked", ""),
        [
            (
                f"{paired.CLIENTS} clients, {found.tokens} tokens",
                f"{statistics.median(found.direct_per_s):.2f}",
                f"{statistics.median(found.router_per_s):.2f}",
                shown,
                f"≥ {goal.limit}",
                goal.verdict.value,
            ),
            ("Ray Serve LLM", "", "", found.ray_serve, "", ""),
        ],
        path,
        {**msgspec.to_builtins(found), "ratios": found.ratios, "verdict": goal.verdict.value},
    )


def run(
    names: Sequence[str],
    cases: Sequence[Case],
    sizes: Sizes,
    rounds: int,
    folder: Path,
    say: Callable[[str], None],
) -> Run:
    """Measure contenders in turn, in every round; one that does not start is left out from then on."""
    found = Run()
    contenders: dict[str, Contender | None] = {}
    for name in names:
        make = CONTENDERS[name]
        try:
            contenders[name] = None if make is None else make()
        except Absent as error:
            found.absent[name] = str(error)
            say(f"{name}: left out: {error}")
    cores = Cores.of_this_machine()
    with engine_process(WORKERS, cores, folder) as engines, client_process(cores, folder) as client:
        for number in range(rounds):
            for name, contender in contenders.items():
                if name in found.absent:
                    continue
                say(f"round {number + 1} of {rounds}: {name}")
                try:
                    one = _round(contender, engines, cores, client, cases, sizes, folder / name)
                except StartError as error:
                    found.absent[name] = str(error)
                    say(f"{name}: left out: {error}")
                    continue
                of_name = found.rounds.setdefault(name, {})
                for case, figures in one.figures.items():
                    of_name.setdefault(case, []).append(figures)
                found.lost += one.lost
                for lost in one.lost:
                    say(f"  {name}, {lost.case}: {lost.good} of {lost.asked} good: {lost.wrong}")
                log = folder / name / f"{name}.log"
                if one.lost and log.exists():
                    say(f"  the end of its log:\n{log.read_text(errors='replace')[-LOG_SHOWN:]}")
                if contender is not None:
                    found.commands[name] = one.command
                    found.versions[name] = contender.version
    return found


def _round(
    contender: Contender | None,
    engines: Sequence[int],
    cores: Cores,
    client: ClientProcess,
    cases: Sequence[Case],
    sizes: Sizes,
    folder: Path,
) -> Round:
    folder.mkdir(exist_ok=True)
    found = Round(figures={}, lost=[])
    for some in ([case for case in cases if case is not Case.CROWD],
                 [case for case in cases if case is Case.CROWD]):  # fmt: skip
        if some:
            with running(contender, engines, cores, folder) as target:
                found.command = target.command
                measure(target, client, some, sizes, found)
    return found


def show(found: Run, sizes: Sizes, rounds: int, path: Path) -> None:
    """Print the tables and write the file."""
    ours = [lost.asked - lost.good for lost in found.lost if lost.contender == OURS]
    judged = list(
        goals(found.rounds, lost=sum(ours) if OURS in found.rounds else None, crowd=sizes.crowd)
    )
    console = Console(width=180)
    console.print(table(found.rounds, list(found.rounds), rounds))
    for name, why in found.absent.items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False)
    for lost in found.lost:
        console.print(
            f"lost: {lost.contender}, {lost.case}: {lost.asked - lost.good} of {lost.asked}: "
            f"{lost.wrong}",
            highlight=False,
            markup=False,
        )
    console.print(goal_table(judged))
    data: dict[str, Any] = {
        "kernel": platform.release(),
        "processor": _processor(),
        "sizes": msgspec.to_builtins(sizes),
        "rounds": rounds,
        "versions": found.versions,
        "commands": found.commands,
        "left_out": found.absent,
        "lost": msgspec.to_builtins(found.lost),
        **as_data(found.rounds, judged),
    }
    report("The data plane", (), (), path, data)


def _crowd(wanted: int) -> int:
    """Raise the limit of open files for it; as many streams as the limit allows."""
    needed = 2 * wanted + FILES_SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(hard, needed)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(needed, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
        soft = min(needed, hard)
    return min(wanted, (soft - FILES_SPARE) // 2)


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _some(known: Sequence[str]) -> Callable[[str], list[str]]:
    def some(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [one for one in given if one not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return given

    return some


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
