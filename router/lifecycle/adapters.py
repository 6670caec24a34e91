"""The adapters of one base model: which there are, and which version a request gets.

What a name means is in names.py, how a new version follows an old one in following.py, what stays where
it is in presence.py. Here requests come in, from the front end, and the store's listing, and what other
router processes have decided.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Final

import msgspec

from router.adapters.cache import VERSION, AdapterCache
from router.adapters.catalog import AdapterCatalog
from router.adapters.store import StoredAdapter, StoreError
from router.config import LoraConfig
from router.core.job import AdapterRef, AdapterUse
from router.core.router import Router
from router.lifecycle.alias import Alias, followed, rolled_back
from router.lifecycle.following import Following
from router.lifecycle.names import Names
from router.lifecycle.presence import Presence
from router.lifecycle.registry import News, RegistryError
from router.lifecycle.sources import Sources
from router.lifecycle.spread import Spread
from router.lifecycle.usage import Usages
from router.lifecycle.words import LifecycleError

log = logging.getLogger("lorayard.lifecycle")

SPLITTER: Final = "@"


class Adapters:
    """The adapters of one model. To be made inside a running loop."""

    def __init__(
        self,
        model_id: str,
        lora: LoraConfig,
        sources: Sources,
        cache: AdapterCache,
        spread: Spread,
        *,
        refresh_s: float,
    ) -> None:
        self.model_id = model_id
        self.cache = cache
        self.catalog = AdapterCatalog(sources, refresh_s=refresh_s)
        self.usages = Usages()
        self.names = Names(model_id, self.usages)
        self.following = Following(
            self.names, self.catalog, cache, spread, weight=lora.rollout_weight
        )
        self.presence = Presence(
            self.names, self.usages, self.catalog, cache, lora, spread, self.find
        )
        self._sources = sources
        self._spread = spread
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[object], None] = {}
        self._preloads = False
        self._missed: dict[str, None] = {}  # names that the last listing lacked
        self._compared = False  # what was decided before with what the store has now
        spread.listen(self._take_in)

    # From start to end.

    def start(self, router: Router) -> None:
        """Begin to serve through a router."""
        self.names.routed(router)
        self._spawn(self.presence.keep())

    def keep_fresh(self) -> None:
        """Read the listing from time to time, from now on."""
        self._spawn(self.catalog.keep_fresh(self._refreshed))

    def preload(self) -> None:
        """Load what is to be there before it is asked for, now and after each listing."""
        self._preloads = True
        self._spawn(self.presence.load())

    async def stop(self) -> None:
        """End what goes on."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(self.following.stop(), *tasks, return_exceptions=True)

    # Requests.

    async def find(self, name: str, user: str = "", *, afresh: bool = False) -> AdapterRef | None:
        """The adapter of a name, or of `name@version`; None where there is none. Raises `StoreError`.

        `afresh` looks into the store even for what is known: it was found to have changed there.
        """
        if SPLITTER in name:
            return await self._find_version(name, afresh=afresh)
        if not afresh and (known := self.names.named(name, user)) is not None:
            return known
        stored = await self.catalog.find(name, afresh=afresh)
        if stored is None:
            if afresh:
                self._gone(name)
            return None
        version = self._first_version(stored, afresh=afresh)
        self.names.serve(name, version)
        if version != stored.version:
            self.following.begin(name)
        return self.names.named(name, user)

    def _first_version(self, stored: StoredAdapter, *, afresh: bool) -> str:
        """Which version serves, of an adapter that this process has not served yet, or has lost."""
        name = stored.name
        decided = self.names.alias(name).serving
        if not decided:
            # One that is held is another process's, which will have it followed, or of one that ended.
            return (not afresh and self._held_version(name)) or stored.version
        if decided == stored.version or self.cache.find(name, decided) is not None:
            return decided
        message = f"{decided} was lost: the store has {stored.version} by now"
        log.warning("%s: %s", self.names.id(name), message)

        def step(alias: Alias) -> Alias:
            if alias.serving != decided:
                return alias
            return msgspec.structs.replace(
                alias, serving=stored.version, revision=stored.revision, message=message
            )

        self._spawn(self._spread.change(name, step))
        return stored.version

    def _held_version(self, name: str) -> str:
        """A version that a worker has, and that is on this disk, so that it can go on serving."""
        for worker in self.names.router.fleet:
            for slot in worker.slots:
                if slot.adapter.name == name and self.cache.find(name, slot.adapter.version):
                    return slot.adapter.version
        return ""

    async def _find_version(self, name_at_version: str, *, afresh: bool) -> AdapterRef | None:
        name, _, version = name_at_version.partition(SPLITTER)
        if not VERSION.fullmatch(version):
            return None
        if afresh:
            await self.catalog.find(name, afresh=True)
        elif await self.find(name) is None:
            return None
        adapter = self.names.ref(name, version)
        if self.names.serving(name) == adapter and not afresh:
            return adapter
        return adapter if self.stored(adapter) is not None else None

    def stored(self, adapter: AdapterRef) -> StoredAdapter | None:
        """The files of a version, in the store or on this disk."""
        listed = self.catalog.get(adapter.name)
        if listed is not None and listed.version == adapter.version:
            return listed
        return self.cache.find(adapter.name, adapter.version)

    async def instead_of(self, adapter: AdapterRef, why: str) -> AdapterRef | None:
        """What serves in place of a version that no worker can load, if another one does."""
        alias = self.names.alias(adapter.name)
        if adapter.version == alias.candidate or (
            adapter.version == alias.serving and alias.previous
        ):
            await self._roll_back(adapter.name, adapter.version, why)
        serving = self.names.serving(adapter.name)
        return None if serving is None or serving == adapter else serving

    def ended(self, adapter: AdapterRef | None, use: AdapterUse | None, *, failed: bool) -> None:
        """A request for an adapter, or for the base model alone, has ended."""
        if adapter is not None and adapter.name not in self.names:
            adapter = None  # it is gone since, and so is what was known of it
        lost = self.usages.ended(adapter, use, failed=failed, now=self._loop.time())
        if lost is not None:
            assert adapter is not None
            why = f"{lost.new.failures} of {lost.new.requests} requests failed"
            self._spawn(self._roll_back(adapter.name, lost.version, why))

    async def _roll_back(self, name: str, version: str, why: str) -> None:
        """Go back from a version, if it is still what is served or tried out."""
        now = time.time()

        def step(alias: Alias) -> Alias:
            back_from = alias.candidate or alias.serving
            return rolled_back(alias, why, now) if back_from == version else alias

        try:
            alias = await self._spread.change(name, step)
        except (LifecycleError, RegistryError) as error:
            log.warning("%s: %s fails, and stays: %s", self.names.id(name), version, error)
        else:
            log.warning("%s: %s", self.names.id(name), alias.message)

    # The store.

    @property
    def store_url(self) -> str:
        """Where the store is."""
        return self._sources.url

    async def refresh(self) -> int:
        """Read the listing now, and follow it; how many adapters there are. Raises `StoreError`."""
        self._refreshed(await self.catalog.refresh())
        await self.following.settled()
        return len(self.catalog.names)

    async def refresh_one(self, name: str) -> StoredAdapter | None:
        """Look for one adapter in the store, and follow what is found. Raises `StoreError`."""
        stored = await self.catalog.find(name, afresh=True)
        if stored is None:
            self._gone(name)
        elif name in self.names:
            await asyncio.wait((self.following.begin(name),))
        return stored

    def _refreshed(self, changed: Iterable[str]) -> None:
        """The listing was read; these names' files are others now, or gone."""
        missing = [
            name for name in (*changed, *self.names, *self._missed) if name not in self.catalog
        ]
        for name in missing:
            if name in self._missed:
                self._gone(name)
            else:  # it may be about to come again: what was decided of it is kept for one listing
                self.names.unserve(name)
        self._missed = dict.fromkeys(missing)
        for name in changed:
            if name in self.names:
                self.following.begin(name)
        if not self._compared:
            self._compared = True
            for name in self.names:
                listed, alias = self.catalog.get(name), self.names.alias(name)
                if listed is not None and alias.serving and listed.revision != alias.revision:
                    self.following.begin(name)
        self.following.again()
        if self._preloads:
            self._spawn(self.presence.load())

    def _gone(self, name: str) -> None:
        """There is no such adapter any more."""
        self.names.unserve(name)
        if not self.names.alias(name).says_nothing:
            self._spawn(self._spread.change(name, lambda _: Alias()))

    async def register(self, name: str, source: str) -> StoredAdapter:
        """Serve a name from a place of its own.

        Raises `StoreError`, `LoadError`, `RegistryError` and `LifecycleError`, and then it is served as
        before.
        """
        before = self.names.alias(name).source
        self._sources.register({name: source})
        try:
            stored = await self.catalog.find(name, afresh=True)
            if stored is None:
                message = f"{source} holds no adapter; name a folder with an adapter_config.json"
                raise LifecycleError("invalid", message)
            await self.cache.folder_of(stored)
            serving = self.names.serving(name)
            if serving is not None:
                await self.following.load_beside(serving, stored.version, 1.0)
        except BaseException:
            self._sources.register({name: before})
            self._spawn(self.catalog.find(name, afresh=True))
            raise
        was, now = serving.version if serving is not None else "", time.time()

        def step(alias: Alias) -> Alias:
            alias = msgspec.structs.replace(
                alias,
                serving=alias.serving or was,
                source=source,
                revision=stored.revision,
                refused="",
                message=f"served from {source}",
                changed_at=now,
            )
            return followed(alias, stored.version, 1.0, now) if alias.serving else alias

        await self._spread.change(name, step)
        return stored

    # Other processes, and this one.

    def _take_in(self, news: News) -> None:
        """Apply what was decided, here or in another process."""
        moved = {
            name: alias.source
            for name, alias in news.aliases.items()
            if alias.source != self.names.alias(name).source
        }
        try:
            self._sources.register(moved)
        except StoreError as error:
            log.warning("%s: %s", self.model_id, error)
        self.names.take_in(news.aliases)
        for name, source in moved.items():
            if not source:  # from now on it means what the store says, which is not known yet
                self.catalog.forget(name)
                self.names.unserve(name)
        self.presence.pin()
        for name in moved:
            self._spawn(self._look_at(name))

    async def _look_at(self, name: str) -> None:
        """Know an adapter that is in another place now."""
        if await self.catalog.find(name, afresh=True) is None:
            self._gone(name)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Do it beside what goes on; what goes wrong is logged."""
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[object]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: something was not done", self.model_id, exc_info=error)
