"""What one decision costs in CPU time, and how it grows with workers, adapters and who waits.

A fleet stands as it would under load: every slot is taken, the popular adapters have several holders,
each worker has requests in flight, and all known adapters are staged and have been asked for. No engine
and no socket is there, loads take no time, and prompts are computed at once, so that nothing but the
core is measured:

  place   the policy alone: which worker;
  lease   entered and left: admission, placement, reservation, release. One job in ten is for any
          adapter by its popularity, so that some begin a load and evict; the others' is resident;
  turn    the fleet is full and so many wait: one leaves, who is next is served, another one joins.
          A task of asyncio for each is part of it;
  hard    the worst that the request path was found to meet (named in the table).

Times are CPU microseconds of the process for one operation, the median of the rounds.
"""

import argparse
import asyncio
import gc
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.support import parser, report, spread
from router.core.fleet import Fleet, Hold, Worker
from router.core.job import AdapterRef, Job, Prefix
from router.core.policies import POLICIES
from router.core.prefixes import marks
from router.core.router import Router
from router.core.timing import EngineTimes

COMPARED: Final = ("cost", "affinity")
WORKERS: Final = (1, 8, 64, 512)
ADAPTERS: Final = (100, 10_000, 100_000)
WAITING: Final = (0, 1_000, 10_000)
TURN_WORKERS: Final = (8, 512)
TURN_ADAPTERS: Final = 10_000
SLOTS: Final = 16
IN_FLIGHT: Final = 12
MAX_ONGOING: Final = 64
KV_TOKENS: Final = 400_000
PROMPT_TOKENS: Final = 1_000
COLD_SHARE: Final = 0.1
DECISIONS: Final = 2_000
TURNS: Final = 500
PREFIX_BLOCKS: Final = 32
# Operation, workers, adapters, microseconds.
GOALS: Final = (
    ("place", 8, 100_000, 20.0),
    ("place", 512, 100_000, 100.0),
    ("lease", 8, 100_000, 20.0),
    ("lease", 512, 100_000, 100.0),
)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One operation in one scene. `us` are the median, least and most of the rounds."""

    operation: str
    policy: str
    workers: int
    adapters: int
    waiting: int = 0
    us: dict[str, float]


class Scene(NamedTuple):
    """A fleet under load, its router, and jobs to be placed."""

    fleet: Fleet
    router: Router
    jobs: list[Job]


class Instant:
    """A loader that has every adapter and takes no time."""

    def __init__(self) -> None:
        self._seq = 0

    def staged(self, adapter: AdapterRef) -> bool:  # noqa: ARG002
        """Yes."""
        return True

    async def fetch(self, adapter: AdapterRef) -> None:
        """Nothing is left to fetch."""

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:  # noqa: ARG002
        """It is there."""
        self._seq += 1
        return self._seq

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:  # noqa: ARG002
        """It is gone."""
        self._seq += 1
        return self._seq


def main() -> None:
    """Measure every scene, print how the costs grow, and compare with the goals."""
    top = parser("decisions", __doc__ or "")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--workers", type=numbers, default=WORKERS, metavar="A,B")
    top.add_argument("--adapters", type=numbers, default=ADAPTERS, metavar="A,B")
    top.add_argument("--waiting", type=numbers, default=WAITING, metavar="A,B")
    top.add_argument("--turn-workers", type=numbers, default=TURN_WORKERS, metavar="A,B")
    top.add_argument("--decisions", type=int, default=DECISIONS, help="of each round")
    top.add_argument("--turns", type=int, default=TURNS, help="of each round")
    arguments = top.parse_args()
    costs: list[Cost] = []
    for policy in COMPARED:
        for workers in arguments.workers:
            for adapters in arguments.adapters:
                costs += asyncio.run(
                    decisions(policy, workers, adapters, arguments.rounds, arguments.decisions)
                )
        for workers in arguments.turn_workers:
            for waiting in arguments.waiting:
                costs.append(
                    asyncio.run(turns(policy, workers, waiting, arguments.rounds, arguments.turns))
                )
        for workers in arguments.turn_workers:
            costs += asyncio.run(hard(policy, workers, arguments.rounds, arguments.decisions))
        costs += [
            asyncio.run(no_memory(policy, min(arguments.turn_workers), waiting, arguments.rounds))
            for waiting in arguments.waiting
            if waiting
        ]
    console = Console(width=110)
    for table in tables(costs):
        console.print(table)
    report(
        "A decision's CPU time against its goals",
        ("policy cost", "workers", "adapters", "goal", "found", "least to most", ""),
        list(goals(costs)),
        arguments.json,
        [msgspec.to_builtins(cost) for cost in costs],
    )


# Scenes.


def scene(
    policy: str,
    workers: int,
    adapters: int,
    jobs: int,
    *,
    in_flight: int = IN_FLIGHT,
    max_ongoing: int = MAX_ONGOING,
    kv_tokens: int = KV_TOKENS,
    max_queued: int = 1 << 16,
) -> Scene:
    """A fleet as it stands under load; to be made inside a running loop. The same every time."""
    rng = random.Random(f"{workers} {adapters}")  # noqa: S311
    now = asyncio.get_running_loop().time()
    fleet = Fleet("base", EngineTimes(prefill_per_token_s=1e-9))
    known = [AdapterRef("base", f"adapter-{number:06d}") for number in range(adapters)]
    popularity = list(accumulate(1.0 / (rank + 1) for rank in range(adapters)))
    for adapter in reversed(known):  # the most popular last: what is bounded forgets the others
        fleet.stage(adapter)
        fleet.demand.arrived(adapter, now - 60.0 * rng.random())
    router = Router(
        fleet,
        POLICIES[policy](random.Random(0)),  # noqa: S311
        Instant(),
        max_queued=max_queued,
        queue_timeout_s=3600.0,
    )
    held: list[AdapterRef] = []
    for number in range(workers):
        worker = Worker(
            f"worker-{number}", max_ongoing=max_ongoing, slots=SLOTS, kv_tokens=kv_tokens
        )
        router.add_worker(worker)
        mine: dict[AdapterRef, None] = {}
        while len(mine) < min(SLOTS, adapters):
            mine.update(dict.fromkeys(rng.choices(known, cum_weights=popularity, k=SLOTS)))
        chosen = list(mine)[:SLOTS]
        for adapter in chosen:
            fleet.finish_load(worker, fleet.begin_load(worker, adapter), 0, now)
        held += chosen
        for _ in range(in_flight):
            job = Job("held", rng.choice(chosen[: SLOTS // 2]), prompt_tokens=PROMPT_TOKENS)
            fleet.reserve(worker, job.adapter)
            fleet.begin_work(worker, job, 0, now)
    wanted = [
        rng.choices(known, cum_weights=popularity)[0]
        if rng.random() < COLD_SHARE
        else rng.choice(held)
        for _ in range(jobs)
    ]
    return Scene(
        fleet,
        router,
        [Job(str(n), one, PROMPT_TOKENS, 200) for n, one in enumerate(wanted)],
    )


async def decisions(
    policy: str, workers: int, adapters: int, rounds: int, count: int
) -> list[Cost]:
    """`place` and `lease` in one scene."""
    fleet, router, jobs = scene(policy, workers, adapters, count)
    deciding = POLICIES[policy](random.Random(1))  # noqa: S311

    async def place() -> int:
        now, place = router.loop.time(), deciding.place
        for job in jobs:
            place(job, fleet, now)
        return len(jobs)

    async def lease() -> int:
        for job in jobs:
            async with router.lease(job):
                pass
        return len(jobs)

    found = [
        Cost(
            operation=name,
            policy=policy,
            workers=workers,
            adapters=adapters,
            us=await measured(operation, rounds),
        )
        for name, operation in (("place", place), ("lease", lease))
    ]
    await router.aclose()
    return found


async def turns(policy: str, workers: int, waiting: int, rounds: int, count: int) -> Cost:
    """One leaves, the next is served, another joins: with `waiting` in the queue all the while."""
    adapters = TURN_ADAPTERS
    enough = waiting + workers + count * (rounds + 1)
    # The fleet has one place for each worker: what runs beside it never ends.
    _, router, jobs = scene(policy, workers, adapters, enough, max_ongoing=IN_FLIGHT + 1)
    loop = router.loop
    holding: deque[asyncio.Future[None]] = deque()

    async def one(job: Job) -> None:
        async with router.lease(job):
            leave = loop.create_future()
            holding.append(leave)
            await leave

    coming = iter(jobs)
    tasks: dict[asyncio.Task[None], None] = {}

    def come() -> None:
        task = loop.create_task(one(next(coming)))
        tasks[task] = None
        task.add_done_callback(tasks.pop)

    for _ in range(workers + waiting):
        come()
    while len(holding) < workers or router.queued < waiting:
        await asyncio.sleep(0)

    async def turn() -> int:
        for _ in range(count):
            while not holding:
                await asyncio.sleep(0)
            holding.popleft().set_result(None)
            come()
            await asyncio.sleep(0)
        return count

    us = await measured(turn, rounds)
    for task in tuple(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await router.aclose()
    return Cost(
        operation="turn",
        policy=policy,
        workers=workers,
        adapters=adapters,
        waiting=waiting,
        us=us,
    )


async def hard(policy: str, workers: int, rounds: int, count: int) -> list[Cost]:
    """What a decision costs where nothing is easy."""
    adapters = max(TURN_ADAPTERS, 4 * workers * SLOTS)
    fleet, router, jobs = scene(policy, workers, adapters, count)
    now = router.loop.time()
    width = 16
    blocks = marks(PREFIX_BLOCKS)
    long = [
        msgspec.structs.replace(
            job, prefix=tuple(Prefix(hash((number % 50, mark)), mark * width) for mark in blocks)
        )
        for number, job in enumerate(jobs)
    ]

    async def prefixes() -> int:
        for job in long:
            async with router.lease(job):
                pass
        return count

    found = {f"lease, a prompt of {len(blocks)} marks": await measured(prefixes, rounds)}
    # Every slot is in use, and the adapter is in none.
    for worker in fleet:
        for slot in tuple(worker.slots):
            if not slot.users:
                fleet.reserve(worker, slot.adapter)
    nowhere = [job for job in jobs if job.adapter and not fleet.holders(job.adapter)] or [
        Job("cold", AdapterRef("base", "new"), PROMPT_TOKENS)
    ]
    few = [nowhere[number % len(nowhere)] for number in range(min(count, 200))]
    deciding = POLICIES[policy](random.Random(1))  # noqa: S311

    async def no_slot() -> int:
        for job in few:
            deciding.place(job, fleet, now)
        return len(few)

    found["place, every slot in use"] = await measured(no_slot, rounds)
    await router.aclose()
    return [
        Cost(operation=name, policy=policy, workers=workers, adapters=adapters, us=us)
        for name, us in found.items()
    ]


async def no_memory(policy: str, workers: int, waiting: int, rounds: int) -> Cost:
    """One leaves, and what it held in the engine's memory is not enough for any of those who wait."""
    each = PROMPT_TOKENS + 200
    fleet, router, _ = scene(policy, workers, TURN_ADAPTERS, 0, kv_tokens=each * IN_FLIGHT)
    # The others know nothing of memory: for them the fleet is full by count.
    full = policy == "cost"
    ones = list(fleet)
    held = [slot.adapter for worker in ones for slot in worker.slots]
    if not full:
        for worker in ones:
            while not worker.overloaded:
                fleet.reserve(worker, None)
    small = Job("small", None, prompt_tokens=1)
    tasks = [
        router.loop.create_task(
            router.lease(Job(str(number), held[number % len(held)], 8 * PROMPT_TOKENS)).__aenter__()
        )
        for number in range(waiting)
    ]
    await asyncio.sleep(0)
    count = 3

    async def leave() -> int:
        for number in range(count):
            worker = ones[number % len(ones)]
            if full:
                fleet.reserve(worker, None)
                context = fleet.begin_work(worker, small, 0, 0.0)
                fleet.release(worker, None)
                fleet.end_work(worker, context)
            router.hold(worker, Hold.DRAIN, held=False)  # as after a release: who waits is served
        return count

    us = await measured(leave, min(rounds, 3))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await router.aclose()
    return Cost(
        operation="release, no memory for any who wait",
        policy=policy,
        workers=workers,
        adapters=TURN_ADAPTERS,
        waiting=waiting,
        us=us,
    )


async def measured(operation: Callable[[], Awaitable[int]], rounds: int) -> dict[str, float]:
    """CPU microseconds of one operation: median, least and most of the rounds, after one to warm up.

    An operation returns how often it did it.
    """
    await operation()
    gc.collect()
    gc.freeze()  # the scene is not the operation's: let the collector not walk it again and again
    found = []
    for _ in range(rounds):
        started = time.process_time()
        done = await operation()
        found.append((time.process_time() - started) / done * 1e6)
    gc.unfreeze()
    return {name: round(value, 3) for name, value in spread(found).items()}


# What is printed.


def growth(values: Sequence[float]) -> float:
    """The last over the first."""
    return values[-1] / values[0]


def tables(costs: Sequence[Cost]) -> Iterator[Table]:
    """How each operation's cost grows: with adapters, with workers, with who waits."""
    adapters = sorted({cost.adapters for cost in costs if cost.operation in ("place", "lease")})
    table = Table(title="CPU microseconds of one decision, by the number of known adapters")
    for name in ("operation", "policy"):
        table.add_column(name)
    for name in ("workers", *(f"{count:,}" for count in adapters), "growth", "by workers"):
        table.add_column(name, justify="right")
    for policy in dict.fromkeys(cost.policy for cost in costs):
        for operation in ("place", "lease"):
            mine = [one for one in costs if (one.policy, one.operation) == (policy, operation)]
            first: float | None = None
            for workers in dict.fromkeys(one.workers for one in mine):
                row = [one.us["median"] for one in mine if one.workers == workers]
                first = first or row[-1]
                table.add_row(
                    operation,
                    policy,
                    f"{workers}",
                    *(f"{us:.1f}" for us in row),
                    f"x {growth(row):.2f}",
                    f"x {row[-1] / first:.2f}",
                )
    yield table
    table = Table(title="CPU microseconds, by how many wait")
    waiting = sorted({cost.waiting for cost in costs if cost.operation == "turn"})
    for name in ("operation", "policy"):
        table.add_column(name)
    for name in ("workers", *(f"{count:,}" for count in waiting), "growth"):
        table.add_column(name, justify="right")
    turning: dict[tuple[str, str, int], dict[int, float]] = {}
    for one in costs:
        if one.operation not in ("place", "lease"):
            turning.setdefault((one.operation, one.policy, one.workers), {})[one.waiting] = one.us[
                "median"
            ]
    for (operation, policy, workers), by_waiting in turning.items():
        found = list(by_waiting.values())
        table.add_row(
            operation,
            policy,
            f"{workers}",
            *(f"{by_waiting[count]:,.1f}" if count in by_waiting else "" for count in waiting),
            f"x {growth(found):.2f}" if len(found) > 1 else "",
        )
    yield table


def goals(costs: Sequence[Cost]) -> Iterator[tuple[str, ...]]:
    """A row for each goal that was measured."""
    for operation, workers, adapters, goal in GOALS:
        for one in costs:
            if (one.operation, one.policy, one.workers, one.adapters) == (
                operation,
                COMPARED[0],
                workers,
                adapters,
            ):
                yield (
                    operation,
                    f"{workers}",
                    f"{adapters:,}",
                    f"< {goal:.0f} us",
                    f"{one.us['median']:.1f} us",
                    f"{one.us['min']:.1f} to {one.us['max']:.1f}",
                    "met" if one.us["median"] < goal else "missed",
                )


def numbers(text: str) -> tuple[int, ...]:
    """`1,8,64`."""
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
