"""The lifecycle of one model's adapters, whole: a store, a cache, a registry, and a real router.

Only its workers are made up (`FakeLoader`), and the clients: a test asks for names itself.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

from adapter_files import write_adapter
from harness import FakeLoader

from router.adapters.cache import AdapterCache
from router.adapters.open import open_store
from router.adapters.space import Space
from router.adapters.transfer import Downloads
from router.adapters.validate import AdapterRules
from router.config import LoraConfig
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef
from router.core.policies import POLICIES
from router.core.router import Router
from router.lifecycle.adapters import Adapters
from router.lifecycle.operations import Operations
from router.lifecycle.sources import Sources
from router.lifecycle.spread import Spread
from router.workers.pool import WorkerPool

MODEL = "tiny"


def put(folder: Path, name: str, seed: int, **changes: Any) -> None:  # noqa: ANN401
    """Put an adapter into the store, or another version of it, in one step a file."""
    beside = folder.parent / f"incoming-{name}-{seed}"
    write_adapter(beside, seed=seed, **changes)
    (folder / "store" / name).mkdir(parents=True, exist_ok=True)
    for file in beside.iterdir():
        file.replace(folder / "store" / name / file.name)


class Lived:
    """One router process's."""

    def __init__(self, folder: Path, slots: int, max_bytes: int | None, **lora: Any) -> None:  # noqa: ANN401
        cache = folder / "cache"
        config = LoraConfig(str(folder / "store"), max_num_adapters_per_replica=slots, **lora)
        self.sources = Sources(open_store(config.dynamic_lora_loading_path), open_store)
        self.spread = Spread(MODEL, cache / MODEL, alone=False)
        self.cache = AdapterCache(
            self.sources,
            cache / MODEL,
            AdapterRules((MODEL,), rank_max=16),
            timeout_s=20,
            max_tries=1,
            downloads=Downloads(2),
            space=Space(cache, max_bytes),
        )
        self.adapters = Adapters(
            MODEL, config, self.sources, self.cache, self.spread, refresh_s=3600
        )
        self.loader = FakeLoader(load_s=0)
        self.loader.unload_s = 0
        self.router = Router(Fleet(MODEL), POLICIES["affinity"](Random(0)), self.loader)
        self.operations = Operations(
            MODEL, self.adapters, self.router, cast("WorkerPool", None), self.spread
        )
        self.worker = Worker("w0", max_ongoing=8, slots=slots)

    async def start(self) -> None:
        self.cache.prepare()
        self.adapters.start(self.router)
        self.spread.start()
        self.router.add_worker(self.worker)

    async def asked(self, name: str) -> AdapterRef:
        """Ask for an adapter as a request does, with its files fetched and its weights loaded."""
        adapter = await self.adapters.find(name)
        assert adapter is not None
        stored = self.adapters.stored(adapter)
        assert stored is not None
        await self.cache.folder_of(stored)
        self.router.warm(self.worker, adapter)
        loaded = self.router.loaded(self.worker, adapter)
        assert loaded is not None
        await loaded
        return adapter

    def serving(self, name: str) -> str:
        adapter = self.adapters.names.serving(name)
        return "" if adapter is None else adapter.version

    async def stop(self) -> None:
        await self.adapters.stop()
        await self.spread.stop()
        await self.router.aclose()


@asynccontextmanager
async def lived(
    folder: Path,
    *,
    slots: int = 4,
    max_bytes: int | None = None,
    **lora: Any,  # noqa: ANN401
) -> AsyncIterator[Lived]:
    """One, from its start to its end; its listing is read when the test does so."""
    made = Lived(folder, slots, max_bytes, **lora)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
