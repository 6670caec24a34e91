"""A new version follows the old one: noticed, fetched, loaded beside it, and only then served.

Whoever comes after that gets the new version, who is on the way ends on the old one. A version that
cannot be served is refused, and the old one stays. What nobody uses, on no worker and not on this disk,
is not fetched either: it simply is what the store has by now. Of several router processes one at a time
sees to each name, so that the others find it done; what could not be seen to is tried again with the
next listing.
"""

import asyncio
import logging
import time
from typing import Final

import msgspec

from router.adapters.cache import AdapterCache
from router.adapters.catalog import AdapterCatalog
from router.adapters.store import StoredAdapter, StoreError
from router.core.job import AdapterRef, LoadError, LoadFault
from router.lifecycle.alias import Alias, followed, refused
from router.lifecycle.loading import loaded_on
from router.lifecycle.names import Names
from router.lifecycle.registry import RegistryError
from router.lifecycle.spread import Spread

log = logging.getLogger("lorayard.lifecycle")

AT_ONCE: Final = 4
CLAIM_POLL_S: Final = 0.2


class Following:
    """Follows the store for one model. `weight` is the share that a new version gets at first."""

    def __init__(
        self,
        names: Names,
        catalog: AdapterCatalog,
        cache: AdapterCache,
        spread: Spread,
        weight: float,
    ) -> None:
        self._names = names
        self._catalog = catalog
        self._cache = cache
        self._spread = spread
        self._weight = weight
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._behind: dict[str, None] = {}  # names, bounded by those that serve
        self._turns = asyncio.Semaphore(AT_ONCE)

    def begin(self, name: str) -> "asyncio.Task[None]":
        """See to it that what the store has by now is served, if it can be."""
        self._behind[name] = None
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = asyncio.get_running_loop().create_task(self._follow(name))
            task.add_done_callback(lambda _: self._tasks.pop(name, None))
        return task

    def again(self) -> None:
        """Try what has not been seen to."""
        for name in tuple(self._behind):
            self.begin(name)

    async def settled(self) -> None:
        """Return when what is under way has ended."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks.values()))

    async def stop(self) -> None:
        """End it."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, name: str) -> None:
        try:
            async with self._turns:
                while not await self._spread.claim(name):  # another process sees to it
                    await asyncio.sleep(CLAIM_POLL_S)
                try:
                    while name in self._behind:
                        self._settle(name, await self._follow_alone(name))
                finally:
                    await self._spread.give_back(name)
        except (StoreError, RegistryError) as error:
            self._log(name, error)
        except LoadError as error:  # not the adapter's fault: it may go better the next time
            self._log(name, error)
        except Exception:
            log.exception("%s: what the store has is not served yet", self._names.id(name))

    def _log(self, name: str, error: Exception) -> None:
        log.warning("%s: what the store has is not served yet: %s", self._names.id(name), error)

    def _settle(self, name: str, stored: StoredAdapter | None) -> None:
        """What was in the store then is seen to; it may have another one by now."""
        listed = self._catalog.get(name)
        if listed is None or stored is None or listed.revision == stored.revision:
            self._behind.pop(name, None)

    async def _follow_alone(self, name: str) -> StoredAdapter | None:
        stored = await self._catalog.find(name)
        serving = self._names.serving(name)
        alias = self._names.alias(name)
        if stored is None or serving is None:
            return stored
        version, revision = stored.version, stored.revision
        if version in {serving.version, alias.candidate, alias.refused}:
            if alias.serving and alias.revision != revision:
                await self._spread.change(
                    name, lambda alias: msgspec.structs.replace(alias, revision=revision)
                )
            return stored
        weight = 1.0
        if self.is_in_use(serving):
            weight = self._weight
            log.info(
                "%s: %s is in the store, %s serves", self._names.id(name), version, serving.version
            )
            if not await self._is_ready(stored, serving, weight):
                return stored
        elif alias.says_nothing:
            self._names.serve(name, version)
            return stored
        was, now = serving.version, time.time()

        def step(alias: Alias) -> Alias:
            if not alias.serving:
                alias = msgspec.structs.replace(alias, serving=was)
            alias = msgspec.structs.replace(alias, revision=revision)
            return followed(alias, version, weight, now)

        alias = await self._spread.change(name, step)
        log.info("%s: %s", self._names.id(name), alias.message)
        return stored

    def is_in_use(self, adapter: AdapterRef) -> bool:
        """Whether a worker holds it, or this disk does."""
        held = self._names.router.fleet.holder_count(adapter)
        return bool(held) or self._cache.find(adapter.name, adapter.version) is not None

    async def _is_ready(self, stored: StoredAdapter, serving: AdapterRef, weight: float) -> bool:
        """Fetch and load a new version; False where it is refused. Raises `LoadError`."""
        name, version = stored.name, stored.version
        try:
            await self._cache.folder_of(stored)
            await self.load_beside(serving, version, weight)
        except LoadError as error:
            if error.fault is not LoadFault.ADAPTER_INVALID:
                raise
            why, now = str(error), time.time()
            log.warning("%s: %s is not served: %s", self._names.id(name), version, why)
            revision = stored.revision

            def step(alias: Alias) -> Alias:
                served = alias.serving or serving.version  # or who is new would take the bad one
                alias = msgspec.structs.replace(alias, serving=served, revision=revision)
                return refused(alias, version, why, now)

            await self._spread.change(name, step)
            return False
        return True

    async def load_beside(self, serving: AdapterRef, version: str, weight: float) -> None:
        """Load a version where another one is held, on a share of those workers.

        Raises `LoadError` if the version is at fault; a worker that has no slot for it now is let be.
        """
        router = self._names.router
        holders = [worker for worker in router.fleet.holders(serving) if worker.accepting]
        wanted = max(1, round(weight * len(holders))) if weight else 0
        await loaded_on(router, holders[:wanted], self._names.ref(serving.name, version))
