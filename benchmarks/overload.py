"""Goodput beyond capacity, and what one tenant notices of another's flood, in the simulator.

Two questions, on the fleet of benchmarks.policies (`--help` there) and with its measure of capacity:

  goodput   requests a second that are good under the SLO, at loads up to 3 times capacity: how much of
            the peak is left at the highest load? Policy `cost` with deadlines (the SLO's time to first
            token), without, and `affinity` without;
  tenants   two of equal weight, each with half of the adapters, all of which fit into the slots (0.5
            adapters to a slot) or do not (2). One is polite and always offers 0.3 of capacity; the
            other offers 0.3 (`base`), then 3.0 (`flood`). What does the polite one see? `busy`, where
            the other offers 0.65, is a fleet that is full and not overloaded: what is worse in a flood
            than there is the router's doing, what is worse there than in `base` is the batch's, whose
            steps take longer the more requests are in it.

Requests that come in the first seconds (`--warm-up`) are offered and not counted: the fleet is empty
then. A percentile is over all requests of a tenant, and one that was turned away is infinite.
Means over seeds, with the half of their 95% interval; ratios are paired by seed.
"""

import argparse
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import ceil, inf
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.policies.cells import BASE, Cell, Setting, Source, offered, why_not
from benchmarks.policies.replays import Contender, capacity_rps, configured
from benchmarks.policies.verdict import REPORTED_SEEDS
from benchmarks.support import parser, report
from router.core.job import Outcome
from sim.pool import all_cores
from sim.replay import Ended, Options, Replay
from sim.report.intervals import estimate
from sim.report.summary import Slo
from sim.traces import TraceRow

LOADS: Final = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
RATIO: Final = 2.0  # of adapters to all slots
TENANT_RATIOS: Final = (0.5, 2.0)
LOCALITY: Final = 0.8
POLITE: Final = "polite"
OTHER: Final = "other"
POLITE_LOAD: Final = 0.3
OTHER_LOADS: Final = {"base": 0.3, "busy": 0.65, "flood": 3.0}
OTHER_SEED: Final = 1_000_000  # beyond those of the polite tenant
WARM_UP_S: Final = 10.0
GOODPUT_GOAL: Final = 0.95
TAIL_GOAL: Final = 1.10


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How the fleet is run: a policy, with deadlines or not, and the polite tenant's priority."""

    policy: str
    deadline: bool
    priority: int = 0

    @property
    def name(self) -> str:
        """In words."""
        words = [self.policy, "deadlines" if self.deadline else "no deadlines"]
        return ", ".join(words + ([f"priority {self.priority}"] if self.priority else []))


GOODPUT_WAYS: Final = (
    Way(policy="cost", deadline=True),
    Way(policy="cost", deadline=False),
    Way(policy="affinity", deadline=False),
)
TENANT_WAYS: Final = (
    Way(policy="cost", deadline=True),
    Way(policy="cost", deadline=True, priority=-1),
    Way(policy="cost", deadline=False),
    Way(policy="cost", deadline=False, priority=-1),
    Way(policy="affinity", deadline=False),
)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant saw in one replay. Latencies in seconds, None for infinite."""

    requests: int
    goodput_rps: float
    rejected: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One replay: by tenant, the share of capacity that it offers. Adapters are `ratio` x slots."""

    setting: Setting
    way: Way
    loads: dict[str, float]
    ratio: float
    seed: int
    capacity_rps: float
    warm_up_s: float


def main() -> None:
    """Replay everything, print both answers, and compare them with the goals."""
    top = parser("overload", __doc__ or "")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    plain = Setting()
    top.set_defaults(rounds=5)
    top.add_argument("--first-seed", type=int, default=REPORTED_SEEDS, metavar="N")
    top.add_argument("--loads", type=shares, default=LOADS, metavar="A,B")
    top.add_argument("--duration", type=float, default=60.0, metavar="S")
    top.add_argument("--warm-up", type=float, default=WARM_UP_S, metavar="S")
    top.add_argument("--workers", type=int, default=plain.workers)
    top.add_argument("--slots", type=int, default=plain.slots)
    top.add_argument("--max-ongoing-requests", type=int, default=plain.max_ongoing_requests)
    top.add_argument("--azure", type=type(plain.azure), default=plain.azure, metavar="CSV")
    top.add_argument("--jobs", type=int, default=all_cores(), metavar="N")
    arguments = top.parse_args()
    setting = msgspec.structs.replace(
        plain,
        workers=arguments.workers,
        slots=arguments.slots,
        max_ongoing_requests=arguments.max_ongoing_requests,
        duration_s=arguments.duration,
        azure=arguments.azure,
    )
    if (reason := why_not(Source.STEADY, setting)) is not None:
        raise SystemExit(f"no lengths: {reason}")
    capacity = capacity_rps(Source.STEADY, setting)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.rounds)

    def task(way: Way, loads: dict[str, float], ratio: float, seed: int) -> Task:
        return Task(
            setting=setting,
            way=way,
            loads=loads,
            ratio=ratio,
            seed=seed,
            capacity_rps=capacity,
            warm_up_s=arguments.warm_up,
        )

    curve = [
        task(way, {OTHER: load}, RATIO, seed)
        for way in GOODPUT_WAYS
        for load in arguments.loads
        for seed in seeds
    ]
    shared = [
        task(way, {POLITE: POLITE_LOAD, OTHER: load}, ratio, seed)
        for ratio in TENANT_RATIOS
        for way in TENANT_WAYS
        for load in OTHER_LOADS.values()
        for seed in seeds
    ]
    found = run([*curve, *shared], arguments.jobs)
    goodputs = goodput_points(curve, found[: len(curve)])
    tenants = tenant_points(shared, found[len(curve) :])
    console = Console(width=150)
    console.print(goodput_table(goodputs, capacity))
    console.print(tenant_table(tenants))
    report(
        "Overload: goals",
        ("goal", "way", "asked", "found", ""),
        list(goals(goodputs, tenants)),
        arguments.json,
        {
            "capacity_rps": round(capacity, 4),
            "setting": {
                "workers": setting.workers,
                "slots": setting.slots,
                "max_ongoing_requests": setting.max_ongoing_requests,
                "calibration": setting.calibration,
                "duration_s": setting.duration_s,
                "warm_up_s": arguments.warm_up,
                "slo": msgspec.to_builtins(setting.slo),
                "azure": setting.azure.name,
            },
            "seeds": list(seeds),
            "goodput": goodputs,
            "tenants": tenants,
        },
    )


# One replay.


def requests(task: Task) -> list[TraceRow]:
    """What all tenants ask for, in order. A tenant's requests do not depend on the other's load."""
    rows: list[TraceRow] = []
    for tenant, load in task.loads.items():
        polite = tenant == POLITE
        ratio = task.ratio / len(task.loads)
        cell = Cell(source=Source.STEADY, load=load, ratio=ratio, locality=LOCALITY)
        seed = task.seed if polite else OTHER_SEED + task.seed
        for row in offered(cell, seed, task.setting, task.capacity_rps).rows:
            _, _, name = (row.model or "").partition(":")
            rows.append(
                msgspec.structs.replace(
                    row,
                    tenant=tenant,
                    model=f"{BASE}:{tenant}-{name}",
                    priority=task.way.priority if polite else 0,
                )
            )
    rows.sort(key=_moment)
    return rows


def seen(task: Task) -> dict[str, Seen]:
    """Replay; what each tenant saw."""
    router: dict[str, Any] = {"tenants": [{"name": tenant} for tenant in task.loads]}
    if task.way.deadline:
        router["ttft_deadline_s"] = task.setting.slo.ttft_s
    contender = Contender(name=task.way.name, policy=task.way.policy, router=router)
    rows = requests(task)
    ends: list[Ended] = []
    options = Options(policy=task.way.policy, seed=task.seed, slo=task.setting.slo)
    Replay(configured(task.setting, contender), rows, options, journal=ends.append).run()
    span_s = task.setting.duration_s - task.warm_up_s
    by_tenant: dict[str, list[tuple[TraceRow, Ended]]] = {tenant: [] for tenant in task.loads}
    for one in ends:
        row = rows[one.number - 1]
        if row.timestamp - rows[0].timestamp >= task.warm_up_s * 1000:
            by_tenant[row.tenant].append((row, one))
    return {tenant: figures(ended, span_s, task.setting.slo) for tenant, ended in by_tenant.items()}


def figures(ended: Sequence[tuple[TraceRow, Ended]], span_s: float, slo: Slo) -> Seen:
    """What the requests that came within `span_s` make together."""
    return Seen(
        requests=len(ended),
        goodput_rps=sum(good(row, one, slo) for row, one in ended) / span_s,
        rejected=sum(one.outcome is not Outcome.COMPLETED for _, one in ended) / max(1, len(ended)),
        ttft_p50_s=percentile([one.ttft_s for _, one in ended], 0.50),
        ttft_p99_s=percentile([one.ttft_s for _, one in ended], 0.99),
        itl_p50_s=percentile([itl_s(*pair) for pair in ended if pair[1].e2e_s is not None], 0.50),
    )


def itl_s(row: TraceRow, one: Ended) -> float:
    """The mean time between the tokens of an answer."""
    if one.e2e_s is None or one.ttft_s is None:
        return inf
    return (one.e2e_s - one.ttft_s) / (row.output_length - 1) if row.output_length > 1 else 0.0


def good(row: TraceRow, one: Ended, slo: Slo) -> bool:
    """Whether a request was answered as the SLO asks, as a replay counts it."""
    return one.ttft_s is not None and one.ttft_s <= slo.ttft_s and itl_s(row, one) <= slo.itl_s


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """Nearest rank; None stands for infinite, and for no values."""
    ordered = sorted(inf if value is None else value for value in values)
    if not ordered or (found := ordered[ceil(share * len(ordered)) - 1]) == inf:
        return None
    return found


def run(tasks: Sequence[Task], jobs: int) -> list[dict[str, Seen]]:
    """All replays, in the order of the tasks."""
    if jobs == 1:
        return [seen(task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        return list(executor.map(seen, tasks))


# All of them.


def goodput_points(
    tasks: Sequence[Task], found: Sequence[Mapping[str, Seen]]
) -> list[dict[str, Any]]:
    """A point for each way and load."""
    return [
        {
            "way": way,
            "load": load,
            "goodput_rps": mean([one[OTHER].goodput_rps for one in ones]),
            "rejected": mean([one[OTHER].rejected for one in ones]),
            "ttft_p50_s": mean([one[OTHER].ttft_p50_s for one in ones]),
            "ttft_p99_s": mean([one[OTHER].ttft_p99_s for one in ones]),
            "itl_p50_s": mean([one[OTHER].itl_p50_s for one in ones]),
        }
        for (_, way, load), ones in grouped(tasks, found).items()
    ]


def tenant_points(
    tasks: Sequence[Task], found: Sequence[Mapping[str, Seen]]
) -> list[dict[str, Any]]:
    """A point for each way and load of the other tenant; `to_base` is the ratio of p99 to `base`."""
    groups = grouped(tasks, found)
    named = {load: name for name, load in OTHER_LOADS.items()}
    points = []
    for (adapters, way, load), ones in groups.items():
        polite = [one[POLITE] for one in ones]

        base, busy = (
            [one[POLITE] for one in groups[adapters, way, OTHER_LOADS[name]]]
            for name in ("base", "busy")
        )
        points.append(
            {
                "ratio": adapters,
                "way": way,
                "other": named[load],
                "ttft_p50_s": mean([one.ttft_p50_s for one in polite]),
                "ttft_p99_s": mean([one.ttft_p99_s for one in polite]),
                "itl_p50_s": mean([one.itl_p50_s for one in polite]),
                "p99_to_base": mean(ratios(polite, base)),
                "p99_to_busy": mean(ratios(polite, busy)),
                "goodput_rps": mean([one.goodput_rps for one in polite]),
                "offered": mean([float(one.requests) for one in polite]),
                "rejected": mean([one.rejected for one in polite]),
                "other_goodput_rps": mean([one[OTHER].goodput_rps for one in ones]),
            }
        )
    return points


def ratios(ones: Sequence[Seen], bases: Sequence[Seen]) -> list[float | None]:
    """Of the p99, seed by seed; None where either is infinite."""
    return [
        one.ttft_p99_s / base.ttft_p99_s
        if one.ttft_p99_s is not None and base.ttft_p99_s is not None
        else None
        for one, base in zip(ones, bases, strict=True)
    ]


def grouped(
    tasks: Sequence[Task], found: Sequence[Mapping[str, Seen]]
) -> dict[tuple[float, str, float], list[Mapping[str, Seen]]]:
    """By adapters, way and the other tenant's load, in the order of the seeds."""
    groups: dict[tuple[float, str, float], list[Mapping[str, Seen]]] = {}
    for task, one in zip(tasks, found, strict=True):
        groups.setdefault((task.ratio, task.way.name, task.loads[OTHER]), []).append(one)
    return groups


def mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """Over seeds, and half the interval; None where one of them is infinite."""
    got = estimate(values)
    return {
        "mean": None if got.mean is None else round(got.mean, 5),
        "half": None if got.half is None else round(got.half, 5),
    }


# What is printed.


def goodput_table(points: Sequence[Mapping[str, Any]], capacity: float) -> Table:
    """A row for each load, a column for each way."""
    ways = list(dict.fromkeys(point["way"] for point in points))
    table = Table(title=f"Good requests a second by load; capacity is {capacity:.1f} a second")
    table.add_column("load", justify="right")
    for way in ways:
        table.add_column(way, justify="right")
    for load in dict.fromkeys(point["load"] for point in points):
        row = [point for point in points if point["load"] == load]
        table.add_row(f"{load:g}", *(told(point["goodput_rps"]) for point in row))
    return table


def tenant_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each way and load of the other tenant."""
    table = Table(title=f"What a tenant that offers {POLITE_LOAD:g} of capacity sees of the other")
    for name in ("adapters/slots, way", "other"):
        table.add_column(name)
    for name in ("TTFT p50", "p99", "to base", "token", "goodput", "turned away", "other's"):
        table.add_column(name, justify="right")
    for one in points:
        table.add_row(
            f"{one['ratio']:g}, {one['way']}",
            one["other"],
            told(one["ttft_p50_s"], 1000, "ms"),
            told(one["ttft_p99_s"], 1000, "ms"),
            told(one["p99_to_base"], 1, "", 2),
            told(one["itl_p50_s"], 1000, "ms"),
            told(one["goodput_rps"]),
            told(one["rejected"], 100, "%"),
            told(one["other_goodput_rps"]),
        )
    return table


def told(
    value: Mapping[str, float | None], factor: float = 1.0, unit: str = "", digits: int = 1
) -> str:
    """A mean with half its interval."""
    if value["mean"] is None:
        return "infinite"
    half = "" if value["half"] is None else f" ±{value['half'] * factor:.{digits}f}"
    return f"{value['mean'] * factor:.{digits}f}{half}{unit and ' ' + unit}"


def goals(
    goodputs: Sequence[Mapping[str, Any]], tenants: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, ...]]:
    """A row for each goal and way."""
    for way in dict.fromkeys(point["way"] for point in goodputs):
        mine = [point for point in goodputs if point["way"] == way]
        peak = max(mine, key=lambda point: point["goodput_rps"]["mean"])
        last = max(mine, key=lambda point: point["load"])
        kept = last["goodput_rps"]["mean"] / (peak["goodput_rps"]["mean"] or 1.0)
        yield (
            f"goodput at {last['load']:g}",
            way,
            f">= {GOODPUT_GOAL:.0%} of peak",
            f"{kept:.1%} of {peak['goodput_rps']['mean']:.1f} (at {peak['load']:g})",
            "met" if kept >= GOODPUT_GOAL else "missed",
        )
    for point in tenants:
        if point["other"] == "flood":
            found = point["p99_to_base"]["mean"]
            base, busy = (told(point[f"p99_to_{name}"], digits=2) for name in ("base", "busy"))
            yield (
                "polite p99 in a flood",
                f"{point['ratio']:g}, {point['way']}",
                f"<= {TAIL_GOAL:g} x base",
                f"{base} x base, {busy} x busy",
                "met" if found is not None and found <= TAIL_GOAL else "missed",
            )


def shares(text: str) -> tuple[float, ...]:
    """`0.5,1,3`."""
    return tuple(float(part) for part in text.split(","))


def _moment(row: TraceRow) -> float:
    return row.timestamp


if __name__ == "__main__":
    main()
