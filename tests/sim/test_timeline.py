"""Sampling a replay: it changes nothing, and what it keeps is bounded."""

import asyncio
from pathlib import Path
from random import Random

import pytest
from traces import write_trace

from router.config import load
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, AdapterUse, Job
from router.core.policies import POLICIES
from router.core.router import Router
from sim.commands.arguments import DEFAULT_CONFIG
from sim.environment import Environment
from sim.loop import SimLoop
from sim.replay import Options, Replay
from sim.report.timeline import COLUMNS_MAX, ROWS_MAX, SAMPLES, Held, Sampler, Timeline
from sim.traces import read, scan


def sampled(trace: Path, options: Options) -> tuple[Timeline, dict[str, object], dict[str, object]]:
    """A replay's timeline, its result, and the result without a sampler."""
    config, summary = load(DEFAULT_CONFIG), scan(trace)
    plain = Replay(config, read(trace), options).run()
    sampler = Sampler(summary.span_s / options.speed)
    result = Replay(config, read(trace), options, sampler=sampler).run()
    return sampler.timeline(), result, plain


@pytest.mark.parametrize("workers", [2, 20])
def test_sampling_changes_nothing_and_sees_everything(tmp_path: Path, workers: int) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 600)
    options = Options(adapters=300, locality=0.3, workers=workers)
    timeline, result, plain = sampled(trace, options)
    assert result == plain, "digest and all"
    assert len(timeline.at_s) == len(timeline.queued) >= SAMPLES
    assert list(timeline.at_s) == sorted(timeline.at_s)
    loads = timeline.in_flight
    assert list(loads) == (["base-0", "base-1"] if workers == 2 else ["least", "mean", "most"])
    assert all(len(load) == len(timeline.load_at_s) for load in loads.values())
    assert max(max(load) for load in loads.values()) > 1
    assert all(rate is None or 0 <= rate <= 1 for rate in timeline.hit_rate)
    assert 0 < len(timeline.residency) <= ROWS_MAX
    assert all(len(row.held) == len(timeline.residency_s) for row in timeline.residency)
    assert len(timeline.residency_s) <= COLUMNS_MAX
    cells = {held for row in timeline.residency for held in row.held}
    assert cells == {held.value for held in Held}
    assert timeline.omitted.startswith("Shown: the ")


def test_without_adapters_there_is_no_residency(tmp_path: Path) -> None:
    timeline, _, _ = sampled(write_trace(tmp_path / "t.jsonl", 30), Options())
    assert timeline.residency == ()
    assert set(timeline.hit_rate) == {None}
    assert timeline.omitted == ""


def test_a_tail_of_any_length_is_thinned() -> None:
    loop = SimLoop(Environment())  # type: ignore[abstract]  # as in sim.replay

    class Never:
        def staged(self, adapter: AdapterRef) -> bool:
            return True

        async def fetch(self, adapter: AdapterRef) -> None:
            """Nothing to fetch."""

        async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
            await asyncio.sleep(500_000)
            return 0

        async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
            raise AssertionError

    sampler = Sampler(span_s=60)

    async def scenario() -> None:
        router = Router(Fleet("m"), POLICIES["affinity"](Random(1)), Never())
        router.add_worker(Worker("w", max_ongoing=4, slots=2))
        sampler.start(loop, [router], dict.fromkeys(AdapterUse, 0))
        async with router.lease(Job("1", AdapterRef("m", "a"))):
            pass

    loop.run_until_complete(scenario())
    loop.close()
    timeline = sampler.timeline()
    assert SAMPLES <= len(timeline.at_s) <= 2 * SAMPLES
    assert timeline.at_s[-1] > 60 * 2_000
    (row,) = timeline.residency
    assert set(row.held) <= {Held.COLD, Held.LOADING}
