"""The recorded workload again, in the simulator: the same arrivals, lengths and adapters."""

from collections.abc import Sequence

import msgspec

from router.config import Config
from sim.replay import Ended, Options, Replay
from sim.validate.record import Served


class Simulated(msgspec.Struct, frozen=True):
    """One simulation: what became of each request, and the evictions while each label's ran."""

    served: list[Served]
    evictions: dict[str, int]


def simulate(config: Config, served: Sequence[Served], policy: str, seed: int) -> Simulated:
    """What the simulator says became of each of the recorded requests, in the same order."""
    ended: list[Ended] = []
    Replay(
        config,
        [one.row for one in served],
        Options(policy=policy, seed=seed),
        models=dict.fromkeys(one.model for one in served),
        journal=ended.append,
    ).run()
    by_number = {one.number: one for one in ended}
    told = [_told(one, by_number[number]) for number, one in enumerate(served, 1)]
    so_far = {one.label: 0 for one in served}
    for end in ended:
        label = served[end.number - 1].label
        so_far[label] = max(so_far[label], end.evictions)
    evictions, before = {}, 0
    for label, until in so_far.items():
        evictions[label] = until - before
        before = until
    return Simulated(told, evictions)


def _told(one: Served, end: Ended) -> Served:
    return msgspec.structs.replace(
        one,
        worker=end.worker,
        use=end.use.value,
        completed=end.ttft_s is not None,
        ttft_s=end.ttft_s,
        e2e_s=end.e2e_s,
    )
