"""One base model in production: its catalog, its copy of adapters, its workers, its router."""

import asyncio
import logging
from pathlib import Path
from random import Random
from typing import Final
from urllib.parse import quote

import msgspec

from router.adapters.cache import AdapterCache, default_cache_dir
from router.adapters.catalog import AdapterCatalog
from router.adapters.open import open_store
from router.adapters.validate import adapter_rules
from router.config import ConfigError, LLMConfig, RouterConfig
from router.core.fleet import Fleet
from router.core.job import AdapterRef
from router.core.policies import POLICIES
from router.core.quotas import Quotas
from router.core.router import Router
from router.core.timing import EngineTimes
from router.telemetry.metrics import Metrics
from router.workers.devices import NOTHING, Machine
from router.workers.pool import WorkerPool
from sim.latency import DEFAULT, CalibrationError, LatencyModel, engine_times, read_calibration

log = logging.getLogger("lorayard")
RANK_DEFAULT: Final = 16  # vLLM's


def _expected_times(llm: LLMConfig) -> EngineTimes:
    """What to expect of the engine until it was observed: the calibration's word, or the default's."""
    rank = int(llm.engine_kwargs.get("max_lora_rank", RANK_DEFAULT))
    try:
        calibration = read_calibration(llm.calibration or DEFAULT)
        model = LatencyModel(calibration, slots=0, rank_max=rank)
    except CalibrationError as error:
        raise ConfigError(f"{llm.model_id}: {error}") from None
    return msgspec.structs.replace(engine_times(model, rank), kv_tokens=0)


class ModelService:
    """A base model and everything that serves it. To be made inside a running loop.

    `quotas` are those of the whole process: a limit is one over all models.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: RouterConfig,
        metrics: Metrics,
        quotas: Quotas,
        machine: Machine = NOTHING,
        first_place: int = 0,
    ) -> None:
        self.llm = llm
        self.model_id = llm.model_id
        cache_dir = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
        self.catalog: AdapterCatalog | None = None
        self._cache: AdapterCache | None = None
        if llm.lora_config is not None:
            store = open_store(llm.lora_config.dynamic_lora_loading_path)
            self.catalog = AdapterCatalog(store, refresh_s=config.store_refresh_s)
            self._cache = AdapterCache(
                store,
                cache_dir / "adapters" / quote(llm.model_id, safe=""),
                adapter_rules(llm),
                timeout_s=llm.lora_config.download_timeout_s,
                max_tries=llm.lora_config.max_download_tries,
            )
        self.pool = WorkerPool(
            llm,
            config,
            log_dir=Path(config.log_dir) if config.log_dir else cache_dir / "logs",
            catalog=self.catalog,
            cache=self._cache,
            machine=machine,
            first_place=first_place,
        )
        fleet = Fleet(llm.model_id, _expected_times(llm))
        self.router = Router(
            fleet,
            POLICIES[config.policy](Random(config.seed)),
            self.pool,
            max_queued=config.max_queued_requests,
            queue_timeout_s=config.queue_timeout_s,
            slot_patience_s=config.slot_patience_s,
            locality_tokens=config.locality_tokens,
            weights=config.weights,
            quotas=quotas,
        )
        watch = metrics.watch(llm.model_id, self.router, config.explain_sample)
        self.router.set_observer(watch)
        self._pins: dict[str, AdapterRef] = {}
        self._pins_missing: tuple[str, ...] = ()
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the listing and begin to start the workers. Raises `StoreError`, `OSError`."""
        if self.catalog is not None and self._cache is not None:
            await asyncio.to_thread(self._cache.prepare)
            await self.catalog.refresh()
            log.info("%s: %d adapters in the store", self.model_id, len(self.catalog.names))
            self._pin()
            self._refreshing = asyncio.create_task(self.catalog.keep_fresh(self._refreshed))
        self.pool.start(self.router)

    async def started(self) -> None:
        """Return when every worker can serve. Raises `WorkerStartError`."""
        await self.pool.started()
        self._warm_pins()

    def _refreshed(self) -> None:
        self._pin()
        self._warm_pins()

    def _pin(self) -> None:
        """Pin what the configuration names, at the version that is listed now."""
        assert self.catalog is not None
        listed = {name: self.catalog.get(name) for name in self.llm.pinned}
        missing = tuple(name for name, stored in listed.items() if stored is None)
        if missing and missing != self._pins_missing:
            log.warning(
                "%s: pinned_adapters that are not in the store: %s; put them there, or correct "
                "the names",
                self.model_id,
                ", ".join(missing),
            )
        self._pins_missing = missing
        for name, stored in listed.items():
            pin = AdapterRef(self.model_id, name, stored.version) if stored else None
            before = self._pins.get(name)
            if pin == before:
                continue
            if before is not None:
                self.router.pin(before, pinned=False)
                del self._pins[name]
            if pin is not None:
                self.router.pin(pin, pinned=True)
                self._pins[name] = pin

    def _warm_pins(self) -> None:
        """Load those that nobody holds, on one worker after another; under traffic the core does it."""
        fleet = self.router.fleet
        workers = [worker for worker in fleet if worker.accepting]
        for number, pin in enumerate(self._pins.values()):
            if workers and not fleet.holders(pin):
                self.router.warm(workers[number % len(workers)], pin)

    async def find(self, name: str, *, afresh: bool = False) -> AdapterRef | None:
        """The adapter of that name, or None; looked up in the store now if `afresh`.

        Raises `StoreError`.
        """
        if self.catalog is None:
            return None
        stored = None if afresh else self.catalog.get(name)
        stored = stored or await self.catalog.find(name, afresh=afresh)
        return None if stored is None else AdapterRef(self.model_id, name, stored.version)

    @property
    def ready(self) -> bool:
        """Whether a worker accepts requests."""
        return any(worker.accepting for worker in self.router.fleet)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the workers, once nothing runs any more; at once if `hurry` is set."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        await self.router.aclose()
        await self.pool.stop(hurry)
