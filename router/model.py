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
from router.adapters.space import GIB, Space
from router.adapters.store import StoreError
from router.adapters.transfer import Downloads
from router.adapters.validate import adapter_rules
from router.config import ConfigError, LLMConfig, LoraConfig, RouterConfig
from router.core.fleet import Fleet
from router.core.job import AdapterRef, AdapterUse
from router.core.policies import POLICIES
from router.core.quotas import Quotas
from router.core.router import Router
from router.core.timing import EngineTimes
from router.lifecycle.adapters import Adapters
from router.lifecycle.operations import Operations
from router.lifecycle.registry import News
from router.lifecycle.sources import Sources
from router.lifecycle.spread import Spread
from router.telemetry.metrics import Metrics
from router.workers.devices import NOTHING, Machine
from router.workers.pool import WorkerPool
from sim.latency import DEFAULT, CalibrationError, LatencyModel, engine_times, read_calibration

log = logging.getLogger("lorayard")
RANK_DEFAULT: Final = 16  # vLLM's
LISTING_GRACE_S: Final = 2.0


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

    `quotas` are those of the whole process: a limit is one over all models. `alone` says that no other
    router process has the same models.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: RouterConfig,
        metrics: Metrics,
        downloads: Downloads,
        quotas: Quotas,
        machine: Machine = NOTHING,
        first_place: int = 0,
        *,
        alone: bool = True,
    ) -> None:
        self.llm = llm
        self.model_id = llm.model_id
        cache_dir = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
        folder = _folder_of(cache_dir, llm.model_id)
        self._spread = Spread(llm.model_id, folder, alone=alone)
        self.adapters: Adapters | None = None
        if llm.lora_config is not None:
            self.adapters = _adapters(
                llm, llm.lora_config, config, cache_dir, downloads, self._spread
            )
        self.pool = WorkerPool(
            llm,
            config,
            log_dir=Path(config.log_dir) if config.log_dir else cache_dir / "logs",
            adapters=self.adapters,
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
        self.lifecycle = Operations(
            llm.model_id, self.adapters, self.router, self.pool, self._spread
        )
        self._spread.listen(self._drain)
        self._listing: asyncio.Task[None] | None = None
        self._has_started = False  # nobody waits for the listing any more

    @property
    def catalog(self) -> AdapterCatalog | None:
        """Which adapters there are; None where there can be none."""
        return None if self.adapters is None else self.adapters.catalog

    async def start(self) -> None:
        """Begin to start the workers, and to read the listing. Raises `RegistryError`, `OSError`."""
        if self.adapters is not None:
            await asyncio.to_thread(self.adapters.cache.prepare)
            self.adapters.start(self.router)
        self._spread.start()
        if self.adapters is not None:
            self._listing = asyncio.create_task(self._list(self.adapters))
        self.pool.start(self.router)

    def _drain(self, news: News) -> None:
        """Apply what operators have said of workers."""
        for worker_id, draining in news.draining.items():
            if draining:
                log.warning("%s is drained by an operator: it gets nothing new", worker_id)
            self.pool.drain(worker_id, draining=draining)

    async def _list(self, adapters: Adapters) -> None:
        try:
            count = await adapters.refresh()
        except StoreError as error:
            if not self._has_started:
                raise
            log.warning("%s: no listing yet, it is tried again: %s", self.model_id, error)
        else:
            log.info("%s: %d adapters in the store", self.model_id, count)
        adapters.keep_fresh()

    async def started(self) -> None:
        """Return when every worker can serve. Raises `WorkerStartError`, and `StoreError`.

        A store that cannot be read is told at once; a listing that takes long is not waited for.
        """
        workers = asyncio.ensure_future(self.pool.started())
        try:
            if self._listing is not None:
                await asyncio.wait({workers, self._listing}, return_when=asyncio.FIRST_COMPLETED)
                if not self._listing.done():
                    await asyncio.wait({self._listing}, timeout=LISTING_GRACE_S)
                if self._listing.done():
                    self._listing.result()
            self._has_started = True
            await workers
        finally:
            workers.cancel()
        if self.adapters is not None:
            self.adapters.preload()

    async def find(self, name: str, user: str = "", *, afresh: bool = False) -> AdapterRef | None:
        """The adapter of that name for a user, or None; looked up in the store now if `afresh`.

        Raises `StoreError`.
        """
        adapters = self.adapters
        if adapters is None:
            return None
        if not afresh and (known := adapters.names.named(name, user)) is not None:
            return known
        return await adapters.find(name, user, afresh=afresh)

    async def instead_of(self, adapter: AdapterRef, why: str) -> AdapterRef | None:
        """What serves in place of a version that no worker can load; None where nothing does."""
        return None if self.adapters is None else await self.adapters.instead_of(adapter, why)

    def ended(self, adapter: AdapterRef | None, use: AdapterUse | None, *, failed: bool) -> None:
        """A request has ended, for an adapter or for the base model alone."""
        if self.adapters is not None:
            self.adapters.ended(adapter, use, failed=failed)

    @property
    def ready(self) -> bool:
        """Whether a worker accepts requests."""
        return any(worker.accepting for worker in self.router.fleet)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the workers, once nothing runs any more; at once if `hurry` is set."""
        if self._listing is not None:
            self._listing.cancel()
        if self.adapters is not None:
            await self.adapters.stop()
        await self._spread.stop()
        await self.router.aclose()
        await self.pool.stop(hurry)


def _folder_of(cache_dir: Path, model_id: str) -> Path:
    """Where the adapters of one model are kept."""
    return cache_dir / "adapters" / quote(model_id, safe="")


def _adapters(
    llm: LLMConfig,
    lora: LoraConfig,
    config: RouterConfig,
    cache_dir: Path,
    downloads: Downloads,
    spread: Spread,
) -> Adapters:
    """The adapters of a model that has some."""
    sources = Sources(open_store(lora.dynamic_lora_loading_path), open_store)
    max_gib = config.cache_max_gib
    cache = AdapterCache(
        sources,
        _folder_of(cache_dir, llm.model_id),
        adapter_rules(llm),
        timeout_s=lora.download_timeout_s,
        max_tries=lora.max_download_tries,
        downloads=downloads,
        space=Space(cache_dir / "adapters", None if max_gib is None else int(max_gib * GIB)),
    )
    return Adapters(llm.model_id, lora, sources, cache, spread, refresh_s=config.store_refresh_s)
