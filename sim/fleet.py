"""Simulated workers for the production router: engines, and the loader between the two.

A load has two parts, as in production. The adapter is fetched from the store once a host, however
many workers want it, while their batches run on; then the engine takes it in, which stalls its batch.
"""

import asyncio
from typing import Any

import msgspec

from router.config import LLMConfig
from router.core.fleet import Worker
from router.core.job import AdapterRef
from sim.engine import EngineLimits, SimEngine
from sim.latency import DEFAULT, LatencyModel, read_calibration
from sim.loop import SimLoop


class EngineArgumentError(Exception):
    """`engine_kwargs` holds a value that the engine model cannot use."""


def engine_limits(llm: LLMConfig) -> EngineLimits:
    """The engine arguments that the model knows; the others do not change its timing.

    Raises `EngineArgumentError`.
    """
    given: dict[str, Any] = llm.engine_arguments()
    known = {
        name: given[name] for name in EngineLimits.__struct_fields__ if given.get(name) is not None
    }
    try:
        return msgspec.convert(known, EngineLimits)
    except msgspec.ValidationError as error:
        raise EngineArgumentError(f"{llm.model_id}: engine_kwargs: {error}") from None


def latency_model(llm: LLMConfig) -> LatencyModel:
    """The latency model that the configuration names. Raises `sim.latency.CalibrationError`."""
    limits = engine_limits(llm)
    calibration = read_calibration(llm.calibration or DEFAULT)
    return LatencyModel(calibration, slots=llm.slots, rank_max=limits.max_lora_rank)


class SimWorkers:
    """The engines of one model, by worker id, and the `Loader` for them. All share one host."""

    def __init__(self, loop: SimLoop, llm: LLMConfig, count: int) -> None:
        self._loop = loop
        self.latency = latency_model(llm)
        limits = engine_limits(llm)
        self.engines = {
            f"{llm.model_id}-{number}": SimEngine(loop.env, self.latency, limits)
            for number in range(count)
        }
        self._on_disk: dict[AdapterRef, asyncio.Future[None]] = {}

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        """Fetch the adapter unless the host has it, then load it into the engine."""
        engine = self.engines[worker.id]
        if adapter not in engine.host:
            fetched = self._on_disk.get(adapter)
            if fetched is None:
                fetched = self._on_disk[adapter] = self._loop.create_future()
                await asyncio.sleep(self.latency.fetch_s)
                fetched.set_result(None)
            else:
                await asyncio.shield(fetched)
        await self._loop.happens(engine.load(adapter, evict))
        return 0
