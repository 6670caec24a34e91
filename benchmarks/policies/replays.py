"""Measure: replay each cell and seed under every contender, over all cores.

A task is one cell and seed: its requests are made once and every contender gets them, so what differs
between two contenders is the policy and nothing else.
"""

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import yaml

from benchmarks.policies.cells import (
    BASE,
    Cell,
    Setting,
    Source,
    backlog,
    capacity_source,
    offered,
)
from router.config import Config, parse
from router.core.policies import POLICIES
from sim.replay import Ended, Options, Replay
from sim.traces import TraceRow

PATIENT: Final = {"max_queued_requests": 1_000_000, "queue_timeout_s": 1e6}
# In order: who measures capacity. With so few adapters it hardly matters.
CAPACITY_BY: Final = ("least_loaded", "round_robin")


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """A policy of `router.core.policies.POLICIES`, and what it changes in the `router` section.

    All are peers but `ours`, of which one is judged at a time: a variant of ours is no peer of it.
    """

    name: str
    policy: str
    router: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    ours: bool = False


# The time to the first token that is good enough is also the latest that is of use.
DEADLINE: Final = {"ttft_deadline_s": 2.0}
OURS: Final = "cost+deadline"
# Beside every policy as it is. No variant is a peer: no other router has these deadlines.
VARIANTS: Final = (
    Contender(name=OURS, policy="cost", router=DEADLINE, ours=True),
    Contender(
        name="cost+deadline+gdsf",
        policy="cost",
        router=DEADLINE,
        lora={"eviction": "gdsf"},
        ours=True,
    ),
    Contender(name="affinity+deadline", policy="affinity", router=DEADLINE, ours=True),
    Contender(name="least_loaded+deadline", policy="least_loaded", router=DEADLINE, ours=True),
)
CONTENDERS: Final = (
    *(Contender(name=name, policy=name, ours=name == "cost") for name in POLICIES),
    *VARIANTS,
)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One replay. `ttft_p99_s` is over all requests offered, None for infinite.

    `unanswered` is the share that was rejected, failed or never finished; `busiest` the requests of
    the worker with most of them, over their mean.
    """

    requests: int
    good: int
    ttft_p99_s: float | None
    cold_loads: int
    hit_rate: float | None
    unanswered: float
    busiest: float
    digest: str


class CellRun(msgspec.Struct, frozen=True, kw_only=True):
    """A cell's replays: by contender, one a seed in the order of the seeds."""

    cell: Cell
    span_s: float
    runs: dict[str, list[Measured]]


def configured(setting: Setting, contender: Contender, **router: Any) -> Config:  # noqa: ANN401
    """The fleet under one contender. Raises `ConfigError` for what its `router` has wrong."""
    slots = setting.slots
    llm = {
        "model_loading_config": {"model_id": BASE, "model_source": BASE},
        "lora_config": {
            "dynamic_lora_loading_path": "s3://example/adapters",
            "max_num_adapters_per_replica": slots,
            **contender.lora,
        },
        "engine_kwargs": {"max_loras": slots, "max_lora_rank": 16, "max_cpu_loras": slots * 4},
        "deployment_config": {
            "max_ongoing_requests": setting.max_ongoing_requests,
            "autoscaling_config": {
                "min_replicas": setting.workers,
                "max_replicas": setting.workers,
            },
        },
        "calibration": setting.calibration,
    }
    document = {
        "llm_configs": [llm],
        "router": {"policy": contender.policy, **contender.router, **router},
    }
    return parse(yaml.safe_dump(document), name=f"contender {contender.name}", folder=Path())


def capacity_rps(source: Source, setting: Setting) -> float:
    """Requests a second that the fleet completes of a backlog."""
    policy = next(name for name in (*CAPACITY_BY, *POLICIES) if name in POLICIES)
    config = configured(setting, Contender(name="capacity", policy=policy), **PATIENT)
    last_s = 0.0

    def ended(one: Ended) -> None:
        nonlocal last_s
        last_s = max(last_s, one.e2e_s or 0.0)  # all came at time 0

    rows = backlog(source, setting)
    result = Replay(config, rows, Options(policy=policy, slo=setting.slo), journal=ended).run()
    return float(result["completed"] / last_s)


def capacities(cells: Sequence[Cell], setting: Setting) -> dict[Source, float]:
    """The capacity that each source's loads are shares of."""
    by = {capacity_source(cell.source): 0.0 for cell in cells}
    for source in by:
        by[source] = capacity_rps(source, setting)
    return {cell.source: by[capacity_source(cell.source)] for cell in cells}


def measured(
    rows: Sequence[TraceRow], config: Config, policy: str, seed: int, setting: Setting
) -> Measured:
    """One replay."""
    result = Replay(config, rows, Options(policy=policy, seed=seed, slo=setting.slo)).run()
    requests = result["requests"]
    taken = [worker["requests"] for worker in result["workers"]]
    return Measured(
        requests=requests,
        good=round(result["slo"]["attainment"] * requests),
        ttft_p99_s=result["ttft_s"]["p99"],
        cold_loads=result["adapters"]["cold_loads"],
        hit_rate=result["adapters"]["hit_rate"],
        unanswered=1.0 - result["completed"] / requests if requests else 0.0,
        busiest=max(taken) * len(taken) / sum(taken) if any(taken) else 1.0,
        digest=result["digest"],
    )


class _Task(msgspec.Struct, frozen=True):
    setting: Setting
    cell: Cell
    seed: int
    capacity_rps: float
    contenders: tuple[tuple[str, str, Config], ...]  # name, policy, fleet


def _run(task: _Task) -> tuple[float, dict[str, Measured]]:
    requests = offered(task.cell, task.seed, task.setting, task.capacity_rps)
    return requests.span_s, {
        name: measured(requests.rows, config, policy, task.seed, task.setting)
        for name, policy, config in task.contenders
    }


def run(
    cells: Sequence[Cell],
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    setting: Setting,
    capacity: Mapping[Source, float],
    *,
    jobs: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> list[CellRun]:
    """Replay everything. `progress` is told how many cells and seeds have ended."""
    fleets = tuple((one.name, one.policy, configured(setting, one)) for one in contenders)
    tasks = [
        _Task(setting, cell, seed, capacity[cell.source], fleets)
        for cell in cells
        for seed in seeds
    ]
    found: dict[int, tuple[float, dict[str, Measured]]] = {}
    for number, (index, outcome) in enumerate(_spread(tasks, jobs), 1):
        found[index] = outcome
        progress(number)
    each = len(seeds)
    result = []
    for index, cell in enumerate(cells):
        ones = [found[number] for number in range(index * each, (index + 1) * each)]
        runs = {one.name: [by_name[one.name] for _, by_name in ones] for one in contenders}
        result.append(CellRun(cell=cell, span_s=ones[0][0], runs=runs))
    return result


def _spread(
    tasks: Sequence[_Task], jobs: int
) -> Iterator[tuple[int, tuple[float, dict[str, Measured]]]]:
    # The longest cells are neighbours: mixed, what is left to do can be told from what was done.
    order = list(range(len(tasks)))
    Random(0).shuffle(order)  # noqa: S311
    if jobs == 1:
        for index in order:
            yield index, _run(tasks[index])
        return
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts
    ) as executor:
        try:
            under_way = {executor.submit(_run, tasks[index]): index for index in order}
            for future in as_completed(under_way):
                yield under_way[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _ignore_interrupts() -> None:
    """An interrupt is the parent's: it hands out nothing more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def digest(runs: Sequence[Measured]) -> str:
    """One hash over the digests of all seeds."""
    return hashlib.blake2b("".join(run.digest for run in runs).encode(), digest_size=8).hexdigest()
