"""Simulated workers for the production router: engines, the loader, and reports that come late.

A load has two parts, as in production. The adapter is fetched from the store once, for all workers of
the host, while their batches run on; then the engine takes it in, which stalls its batch.

A worker reports itself at every change, and the router hears of it `staleness_s` later. Between two
boundaries of an engine's steps nothing is reported: there, KV use alone would differ, by a few blocks.
"""

import asyncio
from collections import deque

import msgspec

from router.config import LLMConfig
from router.core.fleet import Report, Worker
from router.core.job import AdapterRef
from router.core.residency import Eviction
from router.core.router import Router
from sim.engine import EngineLimits, SimEngine, engine_limits
from sim.environment import Environment, Moment
from sim.host import Host
from sim.latency import DEFAULT, LatencyModel, engine_times, read_calibration
from sim.loop import SimLoop


class EngineArgumentError(Exception):
    """`engine_kwargs` holds a value that the engine model cannot use."""


def engine_model(llm: LLMConfig) -> tuple[LatencyModel, EngineLimits]:
    """The latency model and the limits that the configuration describes.

    Raises `EngineArgumentError` and `sim.latency.CalibrationError`.
    """
    calibration = read_calibration(llm.calibration or DEFAULT)
    try:
        limits = engine_limits(llm.engine_arguments(), calibration.defaults)
    except msgspec.ValidationError as error:
        raise EngineArgumentError(f"{llm.model_id}: engine_kwargs: {error}") from None
    latency = LatencyModel(calibration, slots=llm.slots, rank_max=limits.max_lora_rank)
    return latency, limits


class Reports:
    """What the workers have said of themselves and the router has not yet heard.

    The rule: the router knows a report from `staleness_s` after it on. Only a decision, a change of
    the adapters' ledger, or somebody who waits can tell when it was told. So what is said while nobody
    waits, and is of mere load, is handed over before the next decision (`due`); the rest in its time.
    """

    def __init__(self, env: Environment, router: Router, staleness_s: float) -> None:
        self._env = env
        self._router = router
        self._observe = router.observe
        self._staleness_s = staleness_s
        self._said: deque[tuple[float, Worker, Report]] = deque()
        self._scheduled = -1.0  # until when they come by themselves

    def say(self, worker: Worker, report: Report, *, adapters: bool) -> None:
        """A worker reports; `adapters` says whether those have changed."""
        moment = self._env.now + self._staleness_s
        self._said.append((moment, worker, report))
        if adapters or self._router.queued:
            self._env.at(moment, self._arrive)
            self._scheduled = moment

    def wake(self) -> None:
        """Somebody waits from now on: what is on its way is to come in its time."""
        for moment, _, _ in self._said:
            if moment > self._scheduled:
                self._env.at(moment, self._arrive)
                self._scheduled = moment

    def due(self) -> None:
        """Hand over what has arrived by now."""
        said, now, observe = self._said, self._env.now, self._observe
        while said and said[0][0] <= now:
            _, worker, report = said.popleft()
            observe(worker, report)

    def _arrive(self, _: Moment) -> None:
        self.due()


class SimWorker:
    """One worker: its engine, and what it last said of itself."""

    def __init__(
        self,
        env: Environment,
        worker: Worker,
        latency: LatencyModel,
        limits: EngineLimits,
        host: Host,
        hash_block_tokens: int,
    ) -> None:
        self.worker = worker
        self.engine = SimEngine(
            env,
            latency,
            limits,
            host=host,
            segment_tokens=hash_block_tokens,
            on_change=self._changed,
        )
        self.reports: Reports | None = None
        self._said = Report()

    def _changed(self) -> None:
        engine, said = self.engine, self._said
        running, waiting, seq = engine.running, engine.waiting, engine.adapters_seq
        moved = seq != said.seq
        if self.reports is None or not (
            moved or running != said.running or waiting != said.waiting
        ):
            return
        gpu, host = said.gpu, said.host
        if moved:
            gpu = tuple(item for item in engine.gpu if isinstance(item, AdapterRef))
            host = tuple(
                item
                for item in engine.host
                if item not in engine.gpu and isinstance(item, AdapterRef)
            )
        report = self._said = Report(seq, running, waiting, engine.kv_usage, gpu, host)
        self.reports.say(self.worker, report, adapters=moved)


class SimWorkers:
    """The workers of one model, by id, and the `Loader` for them. All share one host."""

    def __init__(
        self,
        loop: SimLoop,
        llm: LLMConfig,
        count: int,
        hash_block_tokens: int,
        host: Host,
        eviction: Eviction,
    ) -> None:
        self._loop = loop
        self.latency, limits = engine_model(llm)
        self.times = engine_times(self.latency, limits.max_lora_rank)
        self.by_id = {
            worker.id: SimWorker(loop.env, worker, self.latency, limits, host, hash_block_tokens)
            for worker in (
                Worker(
                    f"{llm.model_id}-{number}",
                    max_ongoing=llm.deployment_config.max_ongoing_requests,
                    slots=llm.slots,
                    eviction=eviction,
                    kv_tokens=self.latency.kv_tokens,
                )
                for number in range(count)
            )
        }
        self._staged: dict[AdapterRef, None] = {}

    def staged(self, adapter: AdapterRef) -> bool:
        """Whether the host has the adapter: what it has fetched once it keeps, as in production."""
        return adapter in self._staged

    async def fetch(self, adapter: AdapterRef) -> None:
        """Fetch the adapter from the store."""
        await asyncio.sleep(self.latency.fetch_s)
        self._staged[adapter] = None

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        """Fetch the adapter unless the host has it, then load it into the engine."""
        try:
            return await self._load(worker, adapter, evict)
        except Exception as error:
            # The router would take it for a load that failed; it is a fault of the simulator.
            self._loop.call_exception_handler({"message": "a load", "exception": error})
            raise

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        """Have the engine drop the adapter, at the end of the step that it is in."""
        engine = self.by_id[worker.id].engine
        await self._loop.happens(engine.unload(adapter))
        return engine.adapters_seq

    async def _load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        engine = self.by_id[worker.id].engine
        if adapter not in self._staged and adapter not in engine.host:
            await self.fetch(adapter)
        await self._loop.happens(engine.load(adapter, evict))
        return engine.adapters_seq
