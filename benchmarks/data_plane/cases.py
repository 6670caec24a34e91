"""The cases: what is driven through a router, and the figures of it.

    answers  64 clients, each asking again when it has its answer: CPU a request
    tokens   256 streams of 100 tokens, one each 20 ms: CPU a chunk, and how much later tokens come
    single   one client, one request at a time: latency
    pace     500 streams of 20 tokens a second, 10,000 chunks a second: how much later tokens come
    crowd    10,000 streams at once, a token each 2 s, through a router that was just started: memory

A router is started anew for each round, and once more for the crowd. CPU is that of the router and all
below it. Each figure is a number; times are in seconds where a name does not say otherwise. A case in
which an answer did not come whole has no figures in that round, but for the crowd, which counts them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.data_plane.contenders import Contender
from benchmarks.data_plane.loads import Answers, Seen, Streams
from benchmarks.data_plane.processes import (
    ClientProcess,
    Cores,
    Watch,
    cpu_s,
    rss_kib,
    started,
    wait_for,
)
from benchmarks.data_plane.wire import MODELS
from benchmarks.support import free_port

SETTLE_S: Final = 1.0  # after its start a router may still have something to do
CROWD_LIMIT_S: Final = 180.0
Figures = dict[str, float]


class Case(StrEnum):
    """What is measured."""

    ANSWERS = "answers"
    TOKENS = "tokens"
    SINGLE = "single"
    PACE = "pace"
    CROWD = "crowd"


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each case. `seconds` is about how long one of them is driven in one round."""

    seconds: float = 4.0
    clients: int = 64
    streams: int = 256
    tokens: int = 100
    every_ms: int = 20
    pace_streams: int = 500
    pace_every_ms: int = 50
    crowd: int = 10_000
    crowd_tokens: int = 20
    crowd_every_ms: int = 2000
    crowd_per_s: int = 700
    warm_up: int = 16


class Lost(msgspec.Struct, frozen=True):
    """Answers that did not come whole, in one case and one round."""

    contender: str
    case: Case
    asked: int
    good: int
    wrong: str


class Round(msgspec.Struct):
    """One contender's figures in one round."""

    figures: dict[Case, Figures] = {}
    lost: list[Lost] = []
    command: str = ""


class Target(msgspec.Struct, frozen=True):
    """What is driven: a router's process and port, or the engines' ports and no process."""

    name: str
    ports: tuple[int, ...]
    pid: int | None = None
    models: tuple[str, ...] = MODELS
    command: str = ""


@contextmanager
def running(
    contender: Contender | None, engines: Sequence[int], cores: Cores, folder: Path
) -> Iterator[Target]:
    """A contender that can serve, ended afterwards; None stands for the engines themselves."""
    if contender is None:
        yield Target("direct", tuple(engines))
        return
    port = free_port()
    log = folder / f"{contender.name}.log"
    launch = contender.launch(engines, port, folder)
    command = " ".join(launch.command)
    with started(launch.command, cores.router, log) as process:
        wait_for(f"http://127.0.0.1:{port}{launch.ready}", process, log)
        time.sleep(SETTLE_S)
        yield Target(contender.name, (port,), process.pid, contender.models, command)


def measure(
    target: Target, client: ClientProcess, cases: Sequence[Case], sizes: Sizes, found: Round
) -> None:
    """Drive all cases but the crowd through a target."""
    if any(case is not Case.CROWD for case in cases):
        client.run(
            Answers(
                ports=target.ports, models=target.models, clients=sizes.clients, each=sizes.warm_up
            )
        )
    for case in cases:
        match case:
            case Case.ANSWERS:
                found.figures[case] = _answers(target, client, sizes, found)
            case Case.TOKENS:
                found.figures[case] = _tokens(target, client, sizes, found)
            case Case.SINGLE:
                found.figures[case] = _single(target, client, sizes, found)
            case Case.PACE:
                found.figures[case] = _pace(target, client, sizes, found)
            case Case.CROWD:
                found.figures[case] = _crowd(target, client, sizes, found)


def _answers(target: Target, client: ClientProcess, sizes: Sizes, found: Round) -> Figures:
    load = Answers(
        ports=target.ports, models=target.models, clients=sizes.clients, seconds=sizes.seconds / 2
    )
    seen, used_s = _timed(target, client, load)
    if not _whole(target, Case.ANSWERS, seen, found):
        return {}
    return {
        **_per("cpu_us", used_s, seen.asked),
        "per_s": seen.per_s,
        "p50_s": seen.latency_s.p50,
        "p99_s": seen.latency_s.p99,
    }


def _single(target: Target, client: ClientProcess, sizes: Sizes, found: Round) -> Figures:
    seen = client.run(
        Answers(ports=target.ports, models=target.models, clients=1, seconds=sizes.seconds / 4)
    )
    if not _whole(target, Case.SINGLE, seen, found):
        return {}
    return {"p50_s": seen.latency_s.p50, "p99_s": seen.latency_s.p99}


def _tokens(target: Target, client: ClientProcess, sizes: Sizes, found: Round) -> Figures:
    load = Streams(
        ports=target.ports,
        models=target.models,
        clients=sizes.streams,
        tokens=sizes.tokens,
        every_ms=sizes.every_ms,
        each=max(1, round(sizes.seconds * 1000 / (sizes.tokens * sizes.every_ms))),
    )
    return _streamed(target, Case.TOKENS, client, load, found)


def _pace(target: Target, client: ClientProcess, sizes: Sizes, found: Round) -> Figures:
    ramp_s = sizes.seconds / 4
    load = Streams(
        ports=target.ports,
        models=target.models,
        clients=sizes.pace_streams,
        tokens=max(2, round((sizes.seconds + ramp_s) * 1000 / sizes.pace_every_ms)),
        every_ms=sizes.pace_every_ms,
        ramp_s=ramp_s,
        from_s=ramp_s + sizes.seconds / 10,  # all have begun by then
        to_s=ramp_s + sizes.seconds,
    )
    return _streamed(target, Case.PACE, client, load, found)


def _streamed(
    target: Target, case: Case, client: ClientProcess, load: Streams, found: Round
) -> Figures:
    seen, used_s = _timed(target, client, load)
    if not _whole(target, case, seen, found):
        return {}
    return {
        **_per("cpu_us", used_s, seen.chunks),
        "per_s": seen.per_s,
        "transit_p50_s": seen.transit_s.p50,
        "transit_p99_s": seen.transit_s.p99,
        "late_p50_s": seen.late_s.p50,
        "late_p99_s": seen.late_s.p99,
    }


def _crowd(target: Target, client: ClientProcess, sizes: Sizes, found: Round) -> Figures:
    load = Streams(
        ports=target.ports,
        models=target.models,
        clients=sizes.crowd,
        tokens=sizes.crowd_tokens,
        every_ms=sizes.crowd_every_ms,
        ramp_s=sizes.crowd / sizes.crowd_per_s,
        limit_s=CROWD_LIMIT_S,
    )
    if target.pid is None:
        return {}
    base_kib = rss_kib(target.pid)
    with Watch(target.pid) as watch:
        seen = client.run(load)
    _whole(target, Case.CROWD, seen, found)
    return {
        "base_mib": base_kib / 1024,
        "peak_mib": watch.peak_kib / 1024,
        "kib_per_stream": (watch.peak_kib - base_kib) / sizes.crowd,
        "peak_open": float(seen.peak_open),
        "lost": float(seen.asked - seen.good),
    }


def _timed(
    target: Target, client: ClientProcess, load: Answers | Streams
) -> tuple[Seen, float | None]:
    """Drive, and the CPU seconds that the router used for it; None where there is none."""
    pid = target.pid
    if pid is None:
        return client.run(load), None
    before = cpu_s(pid)
    after = [before]
    seen = client.run(load, lambda: after.append(cpu_s(pid)))
    return seen, after[-1] - before


def _per(name: str, used_s: float | None, count: int) -> Figures:
    return {} if used_s is None or not count else {name: used_s * 1e6 / count}


def _whole(target: Target, case: Case, seen: Seen, found: Round) -> bool:
    """Whether all answers came whole; those that did not are told."""
    if seen.good == seen.asked:
        return True
    found.lost.append(Lost(target.name, case, seen.asked, seen.good, seen.wrong))
    return False
