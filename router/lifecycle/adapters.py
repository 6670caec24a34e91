"""The adapters of one base model: which version a request gets, and how one version follows another.

A name means what its alias says, and without one what the store's listing says. A new version is
noticed in the listing, fetched and checked, loaded where the old one is held, and only then it serves:
whoever comes after that gets it, who is on the way ends on the old one, which leaves when it is idle.
What was never asked for is not fetched either: it simply is what the store has by then.

Several processes of one host decide alike: one of them sees to a change, and all apply it (spread.py).
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import msgspec

from router.adapters.cache import AdapterCache
from router.adapters.catalog import AdapterCatalog
from router.adapters.store import StoredAdapter, StoreError
from router.config import LoraConfig
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, AdapterUse, LoadError, LoadFault
from router.core.router import Router
from router.lifecycle.alias import (
    Alias,
    followed,
    refused,
    rolled_back,
)
from router.lifecycle.registry import News, RegistryError
from router.lifecycle.share import Share
from router.lifecycle.sources import Sources
from router.lifecycle.spread import Spread
from router.lifecycle.usage import Usages
from router.lifecycle.words import Change, LifecycleError

log = logging.getLogger("lorayard.lifecycle")

VERSION: Final = re.compile(r"[0-9a-f]{16}")
WARM_S: Final = 120.0
FOLLOWING_MAX: Final = 4
HOLD_PERIOD_S: Final = 1.0
SPLITTER: Final = "@"
NO_ALIAS: Final = Alias()


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
        self.catalog = AdapterCatalog(sources, refresh_s=refresh_s)
        self.cache = cache
        self.usages = Usages()
        self._lora = lora
        self._sources = sources
        self._loop = asyncio.get_running_loop()
        self._spread = spread
        spread.listen(self.take_in)
        self._router: Router | None = None
        self._aliases: dict[str, Alias] = {}
        self._serving: dict[str, AdapterRef] = {}
        self._shares: dict[str, Share] = {}
        self._pinned: dict[str, AdapterRef] = {}
        self._held: dict[tuple[str, str], None] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(FOLLOWING_MAX)
        self._tasks: list[asyncio.Task[None]] = []
        self._missing: tuple[str, ...] = ()
        self._preloading = False

    # From start to end.

    def start(self, router: Router) -> None:
        """Know who loads them."""
        self._router = router
        self._tasks.append(self._loop.create_task(self._keep_held()))

    def preload(self) -> None:
        """Load what is to be there before it is asked for, from now on."""
        self._preloading = True
        self._spawn(self._preload())

    async def _preload(self) -> None:
        """Load what nobody holds of it, on one worker after another; and pin what is to be pinned."""
        missing = []
        wanted = dict.fromkeys((*self._pinned_names(), *self._lora.preload_adapters))
        for number, name in enumerate(wanted):
            try:
                adapter = await self.find(name)
            except StoreError as error:
                log.warning("%s: not loaded yet: %s", self._id(name), error)
                continue
            workers = [worker for worker in self._fleet if worker.accepting]
            if adapter is None:
                missing.append(name)
            elif workers and not self._fleet.holder_count(adapter):
                self._routing.warm(workers[number % len(workers)], adapter)
        self.pin_all()
        if missing and tuple(missing) != self._missing:
            log.warning(
                "%s: to be loaded or pinned, but not in the store: %s; put them there, or correct the "
                "names",
                self.model_id,
                ", ".join(missing),
            )
        self._missing = tuple(missing)

    def keep_fresh(self) -> None:
        """Read the listing from time to time, from now on."""
        self._tasks.append(self._loop.create_task(self.catalog.keep_fresh(self.refreshed)))

    async def stop(self) -> None:
        """End what goes on."""
        tasks = [*self._tasks, *self._following.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name, version in self._held:
            self.cache.let_go(name, version)
        self._held.clear()

    # Which version a request gets.

    def named(self, name: str, user: str) -> AdapterRef | None:
        """What a name means to a user, if that is known without looking."""
        if self._shares and (share := self._shares.get(name)) is not None and share.takes(user):
            return share.candidate
        return self._serving.get(name)

    async def find(self, name: str, user: str = "", *, afresh: bool = False) -> AdapterRef | None:
        """The adapter of a name, or of `name@version`; None where there is none. Raises `StoreError`.

        `afresh` looks into the store even for what is known: it was found to have changed there.
        """
        if SPLITTER in name:
            return await self._find_version(name)
        if not afresh and (known := self.named(name, user)) is not None:
            return known
        stored = await self.catalog.find(name, afresh=afresh)
        if stored is None:
            if afresh:
                self._gone(name)
            return None
        version = self._serving_version(stored, afresh=afresh)
        if version != stored.version:
            self._begin_to_follow(name)
        self._serve(name, version)
        return self.named(name, user)

    def _serving_version(self, stored: StoredAdapter, *, afresh: bool) -> str:
        """Which version serves, of an adapter that this process has not served yet, or has lost."""
        name = stored.name
        alias = self.alias(name)
        if alias.serving:
            if alias.serving == stored.version or self.cache.find(name, alias.serving) is not None:
                return alias.serving
            # Neither the store has it any more nor this disk.
            log.warning("%s: %s is lost, the store's serves", self._id(name), alias.serving)
            message = f"{alias.serving} was lost: the store has another by now"
            lost = alias.serving
            self._change_later(
                name,
                lambda was: (
                    msgspec.structs.replace(was, serving=stored.version, message=message)
                    if was.serving == lost
                    else was
                ),
            )
            return stored.version
        if not afresh and (held := self._held_version(name)):
            return held  # of another process, which will have it followed, or of one that has ended
        return stored.version

    def _held_version(self, name: str) -> str:
        """A version that a worker has, and that is on this disk, so that it can go on serving."""
        for worker in self._fleet:
            for slot in worker.slots:
                if slot.adapter.name == name and self.cache.find(name, slot.adapter.version):
                    return slot.adapter.version
        return ""

    async def _find_version(self, name_at_version: str) -> AdapterRef | None:
        name, _, version = name_at_version.partition(SPLITTER)
        if not VERSION.fullmatch(version):
            return None
        serving = await self.find(name)
        if serving is None or serving.version == version:
            return serving
        adapter = AdapterRef(self.model_id, name, version)
        return adapter if self.stored(adapter) is not None else None

    def stored(self, adapter: AdapterRef) -> StoredAdapter | None:
        """The files of a version, in the store or on this disk."""
        listed = self.catalog.get(adapter.name)
        if listed is not None and listed.version == adapter.version:
            return listed
        return self.cache.find(adapter.name, adapter.version)

    async def instead_of(self, adapter: AdapterRef, why: str) -> AdapterRef | None:
        """What serves in place of a version that no worker can load, if there is another to go back to."""
        alias = self.alias(adapter.name)
        if adapter.version not in alias.versions:
            return None
        if adapter.version == alias.serving and not alias.previous:
            return None
        await self._roll_back_version(adapter.name, adapter.version, why)
        now = self._serving.get(adapter.name)
        return None if now is None or now == adapter else now

    def ended(self, adapter: AdapterRef | None, use: AdapterUse | None, *, failed: bool) -> None:
        """A request for an adapter, or for the base model alone, has ended."""
        lost = self.usages.ended(adapter, use, failed=failed, now=self._loop.time())
        if lost is not None:
            assert adapter is not None
            why = f"{lost.new.failures} of {lost.new.requests} requests failed"
            self._spawn(self._roll_back_version(adapter.name, lost.version, why))

    # What the store has.

    def refreshed(self, changed: Iterable[str]) -> None:
        """The listing was read; these names' files are others now, or gone."""
        for name in changed:
            if name not in self.catalog:
                self._gone(name)
            elif name in self._serving:
                self._begin_to_follow(name)
        for name in [name for name in self._serving if name not in self.catalog]:
            self._gone(name)
        if self._preloading:
            self._spawn(self._preload())

    def _gone(self, name: str) -> None:
        """There is no such adapter any more."""
        alias = self._aliases.get(name)
        if name not in self._serving and alias is None:
            return
        self._unserve(name)
        self.usages.forget(name)
        if alias is not None and not alias.says_nothing:
            self._change_later(name, lambda _: Alias())

    def _begin_to_follow(self, name: str) -> None:
        """See to it that what the store has by now is served, if it can be."""
        if name not in self._following:
            task = self._loop.create_task(self._follow(name))
            self._following[name] = task
            task.add_done_callback(lambda _: self._following.pop(name, None))

    async def _follow(self, name: str) -> None:
        try:
            async with self._turns:
                if not await self._spread.claim(name):
                    return  # another process sees to it
                try:
                    await self._follow_alone(name)
                finally:
                    await self._spread.give_back(name)
        except (StoreError, RegistryError) as error:
            log.warning("%s: what the store has is not served yet: %s", self._id(name), error)
        except Exception:
            log.exception("%s: what the store has is not served yet", self._id(name))

    async def _follow_alone(self, name: str) -> None:
        stored = await self.catalog.find(name)
        serving = self._serving.get(name)
        if stored is None or serving is None:
            return
        alias = self.alias(name)
        if stored.version in {serving.version, alias.candidate, alias.refused}:
            return
        adapter = AdapterRef(self.model_id, name, stored.version)
        weight = self._lora.rollout_weight
        if self._in_use(serving):
            log.info(
                "%s: %s is in the store, %s serves", self._id(name), stored.version, serving.version
            )
            try:
                await self.cache.folder_of(stored)
                await self._load_beside(serving, adapter, weight)
            except LoadError as error:
                await self._not_followed(adapter, error)
                return
        elif alias.says_nothing:
            self._serve(name, stored.version)
            return
        else:
            weight = 1.0  # nobody has the old one any more
        was = serving.version
        now = time.time()

        def step(alias: Alias) -> Alias:
            if not alias.serving:
                alias = msgspec.structs.replace(alias, serving=was)
            return followed(alias, stored.version, weight, now)

        alias = await self.change(name, step)
        log.info("%s: %s", self._id(name), alias.message)

    def _in_use(self, adapter: AdapterRef) -> bool:
        """Whether a worker holds it, or this disk does."""
        return bool(self._fleet.holder_count(adapter)) or (
            self.cache.find(adapter.name, adapter.version) is not None
        )

    async def _not_followed(self, adapter: AdapterRef, error: LoadError) -> None:
        """A new version cannot be served: not ever, or not now."""
        log.warning("%s: %s is not served: %s", self._id(adapter.name), adapter.version, error)
        if error.fault is LoadFault.ADAPTER_INVALID:
            now = time.time()
            await self.change(
                adapter.name, lambda alias: refused(alias, adapter.version, str(error), now)
            )

    async def _load_beside(self, old: AdapterRef, new: AdapterRef, weight: float) -> None:
        """Load the new version where the old one is held. Raises `LoadError` where it cannot be."""
        holders = [worker for worker in self._fleet.holders(old) if worker.accepting]
        wanted = max(1, round(weight * len(holders))) if weight else 0
        await self.loaded_on(holders[:wanted], new)

    async def loaded_on(self, workers: Iterable[Worker], adapter: AdapterRef) -> dict[str, str]:
        """Load it on these workers; what became of each. Raises `LoadError` if the adapter is at fault."""
        router = self._routing
        said: dict[str, str] = {}

        async def loaded(worker: Worker, load: Awaitable[None]) -> None:
            try:
                async with asyncio.timeout(WARM_S):
                    await load
                said[worker.id] = "resident"
            except TimeoutError:
                said[worker.id] = f"not loaded after {WARM_S:g} s"
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
        results = await asyncio.gather(*loads, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return said

    # For operators.

    @property
    def store_url(self) -> str:
        """Where the store is."""
        return self._sources.url

    def alias(self, name: str) -> Alias:
        """What the name means, beyond what the listing says."""
        return self._aliases.get(name, NO_ALIAS)

    def serving(self, name: str) -> AdapterRef | None:
        """The version that serves, if it was asked for."""
        return self._serving.get(name)

    def is_pinned(self, name: str) -> bool:
        """Whether the configuration or an operator has pinned it."""
        return self.alias(name).pinned or self.is_pinned_by_configuration(name)

    def is_pinned_by_configuration(self, name: str) -> bool:
        """Whether the configuration has."""
        return name in self._lora.pinned_adapters

    async def refresh(self) -> int:
        """Read the listing now; how many adapters there are. Raises `StoreError`."""
        self.refreshed(await self.catalog.refresh())
        following = tuple(self._following.values())
        if following:
            await asyncio.wait(following)
        return len(self.catalog.names)

    async def refresh_one(self, name: str) -> StoredAdapter | None:
        """Look for one adapter in the store, and follow what is found. Raises `StoreError`."""
        stored = await self.catalog.find(name, afresh=True)
        if stored is None:
            self._gone(name)
        elif name in self._serving:
            self._begin_to_follow(name)
            await asyncio.wait((self._following[name],))
        return stored

    async def register(self, name: str, source: str) -> StoredAdapter:
        """Serve a name from a place of its own.

        Raises `StoreError`, `LoadError` and `LifecycleError`, and then serves it as before.
        """
        before = self.alias(name).source
        self._sources.register({name: source})
        try:
            stored = await self.catalog.find(name, afresh=True)
            if stored is None:
                raise LifecycleError(
                    "invalid",
                    f"{source} holds no adapter; name a folder with an adapter_config.json",
                )
            await self.cache.folder_of(stored)
            serving = self._serving.get(name)
            if serving is not None:
                adapter = AdapterRef(self.model_id, name, stored.version)
                await self._load_beside(serving, adapter, 1.0)
        except BaseException:
            self._sources.register({name: before})
            self._spawn(self.catalog.find(name, afresh=True))
            raise
        now = time.time()

        def step(alias: Alias) -> Alias:
            alias = msgspec.structs.replace(
                alias, source=source, message=f"served from {source}", changed_at=now
            )
            if serving is None and not alias.serving:
                return alias
            if serving is not None and not alias.serving:
                alias = msgspec.structs.replace(alias, serving=serving.version)
            return followed(msgspec.structs.replace(alias, refused=""), stored.version, 1.0, now)

        await self.change(name, step)
        return stored

    # What a name means changes.

    def take_in(self, news: News) -> None:
        """Apply what was decided, here or in another process."""
        self._take_sources(news.aliases)
        for name, alias in news.aliases.items():
            before = self.alias(name)
            if alias.source != before.source:
                self._spawn(self.catalog.find(name, afresh=True))
            if alias.says_nothing:
                self._aliases.pop(name, None)
            else:
                self._aliases[name] = alias
            self._changed(name, before, alias)
        self.pin_all()

    def _take_sources(self, news: Mapping[str, Alias]) -> None:
        places = {
            name: alias.source
            for name, alias in news.items()
            if alias.source != self.alias(name).source
        }
        try:
            self._sources.register(places)
        except StoreError as error:
            log.warning("%s: %s", self.model_id, error)

    def _changed(self, name: str, before: Alias, alias: Alias) -> None:
        """Serve by the alias from now on; what serves no more leaves when it is idle."""
        router = self._routing
        for version in alias.versions:
            router.restore(AdapterRef(self.model_id, name, version))
        if alias.serving:
            self._serve(name, alias.serving)
        if alias.candidate and alias.weight:
            candidate = AdapterRef(self.model_id, name, alias.candidate)
            self._shares[name] = Share(candidate, alias.weight)
        else:
            self._shares.pop(name, None)
        for version in before.versions:
            if version not in alias.versions:
                router.retire(AdapterRef(self.model_id, name, version))
        self._put_on_trial(name, before, alias)

    def _put_on_trial(self, name: str, before: Alias, alias: Alias) -> None:
        now = self._loop.time()
        if alias.candidate and alias.weight:
            self.usages.try_out(name, alias.candidate, now)
        elif alias.previous and alias.serving != before.serving and before.serving:
            self.usages.try_out(name, alias.serving, now)
        elif (trial := self.usages.trials.get(name)) and trial.version not in alias.versions:
            self.usages.settle(name)

    def _serve(self, name: str, version: str) -> None:
        before = self._serving.get(name)
        if before is None or before.version != version:
            now = self._serving[name] = AdapterRef(self.model_id, name, version)
            self._routing.restore(now)
            if before is not None:
                self._routing.retire(before)

    def _unserve(self, name: str) -> None:
        share = self._shares.pop(name, None)
        for adapter in (self._serving.pop(name, None), share.candidate if share else None):
            if adapter is not None:
                self._routing.retire(adapter)

    async def change(self, name: str, step: Callable[[Alias], Alias]) -> Alias:
        """Change what a name means, in all processes. Raises `RegistryError`, and what the step does."""
        return await self._spread.change(name, step)

    def _change_later(self, name: str, step: Callable[[Alias], Alias]) -> None:
        self._spawn(self.change(name, step))

    async def _roll_back_version(self, name: str, version: str, why: str) -> None:
        """Go back from a version, if it is still what is served or tried out."""
        now = time.time()

        def step(alias: Alias) -> Alias:
            back_from = alias.candidate or alias.serving
            return rolled_back(alias, why, now) if back_from == version else alias

        try:
            alias = await self.change(name, step)
        except LifecycleError as error:
            log.warning("%s: %s fails, and stays: %s", self._id(name), version, error)
        else:
            log.warning("%s: %s", self._id(name), alias.message)

    def _spawn(self, work: Awaitable[object]) -> None:
        """Do it beside what goes on; what goes wrong is logged."""

        async def done() -> None:
            try:
                await work
            except Exception:
                log.exception("%s: a change was not made", self.model_id)

        task = self._loop.create_task(done())
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    # What stays on disk, and in slots.

    async def _keep_held(self) -> None:
        """Hold on this disk whatever may be loaded again, for ever."""
        while True:
            wanted = self._wanted()
            for key in [key for key in self._held if key not in wanted]:
                del self._held[key]
                self.cache.let_go(*key)
            for key in wanted:
                if key not in self._held:
                    self._held[key] = None
                    self.cache.hold(*key)
            self._end_trials()
            await asyncio.sleep(HOLD_PERIOD_S)

    def _wanted(self) -> dict[tuple[str, str], None]:
        wanted = {
            (slot.adapter.name, slot.adapter.version): None
            for worker in self._fleet
            for slot in worker.slots
        }
        for name in self.usages.trials:
            alias = self.alias(name)
            for version in (*alias.versions, alias.previous):
                if version:
                    wanted[name, version] = None
        return wanted

    def _end_trials(self) -> None:
        """A version that has served all for long enough is no longer on trial."""
        latest = self._loop.time() - self._lora.rollback_window_s
        for name, trial in tuple(self.usages.trials.items()):
            if trial.began < latest and self.alias(name).candidate != trial.version:
                self.usages.settle(name)

    def pin_all(self) -> None:
        """Pin what the configuration and operators name, at the version that serves."""
        names = self._pinned_names()
        for name, adapter in tuple(self._pinned.items()):
            if name not in names or self._serving.get(name) != adapter:
                self._routing.pin(adapter, pinned=False)
                del self._pinned[name]
        for name in names:
            serving = self._serving.get(name)
            if serving is not None and name not in self._pinned:
                self._pinned[name] = serving
                self._routing.pin(serving, pinned=True)

    def _pinned_names(self) -> dict[str, None]:
        names = dict.fromkeys(self._lora.pinned_adapters)
        return names | {name: None for name, alias in self._aliases.items() if alias.pinned}

    @property
    def _routing(self) -> Router:
        assert self._router is not None, "not started"
        return self._router

    @property
    def _fleet(self) -> Fleet:
        return self._routing.fleet

    def _id(self, name: str) -> str:
        return f"{self.model_id}:{name}"
