"""A model of one router process, in this process, attached to workers that a test serves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from router.adapters.transfer import Downloads
from router.config import parse
from router.core.job import AdapterRef, Job
from router.core.quotas import Quotas
from router.model import ModelService
from router.telemetry.metrics import Metrics

MODEL = "base"


def config_text(folder: Path, store: Path, urls: list[str], slots: int) -> str:
    llm: dict[str, Any] = {
        "model_loading_config": {"model_id": MODEL, "model_source": MODEL},
        "lora_config": {
            "dynamic_lora_loading_path": str(store),
            "max_num_adapters_per_replica": slots,
            "accepted_base_models": ["tiny"],
        },
        "engine": "attached",
        "attach": urls,
    }
    return yaml.safe_dump(
        {"llm_configs": [llm], "router": {"cache_dir": str(folder), "policy": "affinity"}}
    )


@asynccontextmanager
async def attached(
    folder: Path, store: Path, urls: list[str], *, slots: int = 2
) -> AsyncIterator[ModelService]:
    """The model's service, its workers attached."""
    config = parse(config_text(folder, store, urls, slots), name="test.yaml", folder=folder)
    settings = config.router
    quotas = Quotas(settings.quotas, asyncio.get_running_loop().time())
    downloads = Downloads(settings.download_connections)
    service = ModelService(config.llm_configs[0], settings, Metrics(), downloads, quotas)
    await service.start()
    try:
        async with asyncio.timeout(20):
            await service.started()
        yield service
    finally:
        await service.stop(asyncio.Event())


async def adapter_of(service: ModelService, name: str) -> AdapterRef:
    """The version that is listed now."""
    found = await service.find(name)
    assert found is not None
    return found


async def use(service: ModelService, adapter: AdapterRef) -> str:
    """Lease a place for a job and leave it at once; the worker."""
    async with service.router.lease(Job("1", adapter)) as lease:
        return lease.worker.id
