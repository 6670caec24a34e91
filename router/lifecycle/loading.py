"""Loading an adapter ahead of its requests, on workers that were chosen, until it is there."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Final

from router.core.fleet import Worker
from router.core.job import AdapterRef, LoadError, LoadFault
from router.core.router import Router

LOAD_S: Final = 120.0
RESIDENT: Final = "resident"


async def loaded_on(
    router: Router, workers: Iterable[Worker], adapter: AdapterRef
) -> dict[str, str]:
    """Load it there; what became of each, by the worker's id: `resident`, or why not.

    Raises `LoadError` if the adapter itself is at fault.
    """
    said: dict[str, str] = {}

    async def loaded(worker: Worker, load: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(LOAD_S):
                await load
            said[worker.id] = RESIDENT
        except TimeoutError:
            said[worker.id] = f"not loaded after {LOAD_S:g} s"
        except LoadError as error:
            if error.fault is LoadFault.ADAPTER_INVALID:
                raise
            said[worker.id] = str(error)

    loads = []
    for worker in workers:
        router.warm(worker, adapter)
        if (load := router.loaded(worker, adapter)) is None:
            said[worker.id] = "no slot for it now"
        else:
            loads.append(loaded(worker, load))
    for result in await asyncio.gather(*loads, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
    return said
