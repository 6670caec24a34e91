"""What operators do with the adapters of one model, each in one call that returns when it is done.

What cannot be done changes nothing and says what to do instead. What is done is true in every router
process of this host when the call returns.
"""

import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice, takewhile

import msgspec

from router.adapters.store import StoreError, is_name
from router.core.job import AdapterRef, LoadError, LoadFault
from router.core.router import Router
from router.lifecycle.adapters import SPLITTER, Adapters
from router.lifecycle.alias import Alias, promoted, rolled_back, split
from router.lifecycle.loading import RESIDENT, loaded_on
from router.lifecycle.registry import RegistryError
from router.lifecycle.spread import Spread
from router.lifecycle.status import adapter_status, places_of, worker_status
from router.lifecycle.usage import together
from router.lifecycle.words import AdapterStatus, Change, LifecycleError, Problem, WorkerStatus
from router.workers.pool import WorkerPool


class Operations:
    """The `Lifecycle` of one model; without `adapters` it serves the base model alone."""

    def __init__(
        self,
        model_id: str,
        adapters: Adapters | None,
        router: Router,
        pool: WorkerPool,
        spread: Spread,
    ) -> None:
        self.model_id = model_id
        self._spread = spread
        self._adapters_or_none = adapters
        self._router = router
        self._pool = pool

    # What there is.

    def list(
        self, prefix: str = "", *, after: str = "", limit: int | None = None
    ) -> Sequence[AdapterStatus]:
        """Those that are listed and begin so, by name: at most `limit`, those after `after`."""
        adapters = self._adapters_or_none
        if adapters is None:
            return []
        names = adapters.catalog.names
        first = max(bisect_left(names, prefix), bisect_right(names, after) if after else 0)
        begin_so = takewhile(lambda name: name.startswith(prefix), islice(names, first, None))
        return self._statuses(adapters, tuple(islice(begin_so, limit)))

    def show(self, name: str) -> AdapterStatus | None:
        """One of them."""
        adapters = self._adapters_or_none
        if adapters is None or name not in adapters.catalog:
            return None
        return self._statuses(adapters, (name,))[0]

    def _statuses(self, adapters: Adapters, names: Sequence[str]) -> Sequence[AdapterStatus]:
        places = places_of(self._router.fleet)
        now = time.time()
        ago = now - self._router.loop.time()
        elsewhere = self._spread.usage_elsewhere(names)
        found = []
        for name in names:
            here = adapters.usages.by_name.get(name)
            records = [*elsewhere.get(name, ()), *([here.record(ago)] if here else [])]
            found.append(adapter_status(adapters, name, places, together(records), now))
        return found

    def workers(self) -> Sequence[WorkerStatus]:
        """All of them."""
        return [
            worker_status(worker, draining=worker.id in self._pool.draining)
            for worker in self._router.fleet
        ]

    # Where it is.

    async def load(self, name: str, *, workers: int | None = None) -> Change:
        """Bring the adapter to this many workers, and return when it is there."""
        wanted = 1 if workers is None else workers
        if wanted < 1:
            raise LifecycleError("invalid", f"`workers` is {wanted}; give a number above 0")
        adapter = await self._known(name)
        await self._on_disk(adapter)
        fleet = self._router.fleet
        holders = [worker for worker in fleet.holders(adapter) if worker.accepting]
        others = [
            worker
            for worker in fleet
            if worker.accepting and worker not in holders and worker.can_serve(adapter)
        ]
        others.sort(key=lambda worker: (worker.slots.occupied, worker.ongoing))
        async with _translated():
            said = await loaded_on(self._router, (holders + others)[:wanted], adapter)
        there = sum(outcome == RESIDENT for outcome in said.values())
        if not there:
            reasons = "; ".join(f"{worker}: {what}" for worker, what in said.items())
            raise LifecycleError(
                "unavailable",
                reasons or "no worker has a slot for it now; unload another, or try again later",
            )
        message = f"{adapter.version} is on {there} of the {wanted} workers asked for"
        return Change(self._id(name), message, said)

    async def unload(self, name: str) -> Change:
        """Drop every version of it from every worker as soon as nobody uses it there."""
        await self._known(name)
        held: dict[AdapterRef, None] = {}
        for worker in self._router.fleet:
            held |= {slot.adapter: None for slot in worker.slots if slot.adapter.name == name}
        said: dict[str, str] = {}
        for adapter in held:
            for worker_id, came in (await self._router.unload(adapter)).items():
                said[worker_id] = came.message or came.result.value
        return Change(self._id(name), "leaves where it is idle" if said else "on no worker", said)

    async def warm(self, name: str) -> Change:
        """Bring it to this host's disk."""
        adapter = await self._known(name)
        await self._on_disk(adapter)
        return Change(self._id(name), f"{adapter.version} is on this host's disk")

    async def pin(self, name: str, *, pinned: bool) -> Change:
        """Never evict it from where it is or comes to be, or evict it again as any other."""
        await self._known(name)
        if not pinned and self._adapters.presence.is_pinned_always(name):
            raise LifecycleError(
                "conflict", "the configuration pins it (pinned_adapters); change it there"
            )
        presence = self._adapters.presence
        if pinned and not presence.has_room_to_pin(name):
            raise LifecycleError(
                "conflict",
                f"with it pinned none of a worker's {presence.slots} slots would be left for others; "
                "unpin another one, or raise max_num_adapters_per_replica",
            )
        await self._stepped(name, lambda alias: msgspec.structs.replace(alias, pinned=pinned))
        return Change(self._id(name), "pinned" if pinned else "not pinned")

    # Which version it is.

    async def refresh(self, name: str | None = None) -> Change:
        """Look into the store now, and follow what is new."""
        async with _translated():
            if name is None:
                number = await self._adapters.refresh()
                return Change(self.model_id, f"{number} adapters are in the store")
            stored = await self._adapters.refresh_one(name)
        if stored is None:
            raise self._unknown(name)
        serving = self._adapters.names.serving(name)
        alias = self._adapters.names.alias(name)
        message = f"{serving.version if serving else stored.version} serves"
        if alias.message:
            message += f"; {alias.message}"
        return Change(self._id(name), message)

    async def rollout(self, name: str, version: str, weight: float) -> Change:
        """Give another version a share of the requests."""
        serving = await self._ready(name, version)
        return await self._stepped(
            name, lambda alias: split(self._serves(alias, serving), version, weight, time.time())
        )

    async def promote(self, name: str, version: str | None = None) -> Change:
        """Have the candidate, or the version that is named, serve all."""
        chosen = version or self._adapters.names.alias(name).candidate
        serving = await self._ready(name, chosen)

        def step(alias: Alias) -> Alias:
            if not version and alias.candidate != chosen:
                raise _changed(alias)
            return promoted(self._serves(alias, serving), chosen, time.time())

        return await self._stepped(name, step)

    async def rollback(self, name: str) -> Change:
        """Drop the candidate; without one, go back to the previous version."""
        await self._known(name)
        asked = self._adapters.names.alias(name)
        if asked.previous and not asked.candidate:
            await self._on_disk(self._version(name, asked.previous))

        def step(alias: Alias) -> Alias:
            if alias.versions != asked.versions:
                raise _changed(alias)
            return rolled_back(alias, "an operator asked for it", time.time())

        return await self._stepped(name, step)

    async def _ready(self, name: str, version: str) -> AdapterRef:
        """Have a version on this disk, and where the serving one is held, which is returned."""
        serving = await self._known(name)
        if version and version != serving.version:
            adapter = self._version(name, version)
            await self._on_disk(adapter)
            holders = [one for one in self._router.fleet.holders(serving) if one.accepting]
            async with _translated():
                await loaded_on(self._router, holders, adapter)
        return serving

    # Where it comes from.

    async def register(self, name: str, source: str) -> Change:
        """Take in an adapter that is in a place of its own, not in the store."""
        adapters = self._adapters
        if not is_name(name):
            raise LifecycleError(
                "invalid", f"`{name}` can be no adapter's name; use letters, digits, and . _ -"
            )
        async with _translated():
            try:
                stored = await adapters.register(name, source)
            except StoreError as error:
                if error.passing:
                    raise
                raise LifecycleError("invalid", str(error)) from None
        return Change(self._id(name), f"{stored.version} is served from {source}")

    async def unregister(self, name: str) -> Change:
        """Forget that place."""
        source = self._adapters.names.alias(name).source
        if not source:
            raise LifecycleError("conflict", f"{self._id(name)} has no place of its own")
        await self._stepped(name, lambda _: Alias())
        return Change(self._id(name), f"no longer served from {source}")

    # Workers.

    async def drain(self, worker_id: str, *, draining: bool) -> Change:
        """Send a worker nothing new, or send it work again."""
        if worker_id not in self._pool.ids:
            raise LifecycleError(
                "unknown", f"no worker {worker_id}; there are {', '.join(self._pool.ids)}"
            )
        async with _translated():
            await self._spread.drain(worker_id, draining=draining)
        return Change(worker_id, "gets nothing new" if draining else "gets work again")

    # What they share.

    @property
    def _adapters(self) -> Adapters:
        if self._adapters_or_none is None:
            raise LifecycleError("unknown", f"{self.model_id} has no adapters (no lora_config)")
        return self._adapters_or_none

    async def _known(self, name: str) -> AdapterRef:
        """The version that serves. Raises `LifecycleError`."""
        async with _translated():
            adapter = None if SPLITTER in name else await self._adapters.find(name)
        if adapter is None:
            raise self._unknown(name)
        return self._adapters.names.serving(name) or adapter

    def _version(self, name: str, version: str) -> AdapterRef:
        return AdapterRef(self.model_id, name, version)

    async def _on_disk(self, adapter: AdapterRef) -> None:
        """Have a version on this host's disk. Raises `LifecycleError`."""
        stored = self._adapters.stored(adapter)
        if stored is None:
            raise LifecycleError(
                "conflict",
                f"{self._id(adapter.name)} has no version `{adapter.version}` in the store or on this "
                "disk; `show` lists those that there are",
            )
        async with _translated():
            await self._adapters.cache.folder_of(stored)

    def _serves(self, alias: Alias, serving: AdapterRef) -> Alias:
        """The alias, which says what serves, and since which of the store's revisions."""
        if alias.serving:
            return alias
        listed = self._adapters.catalog.get(serving.name)
        revision = listed.revision if listed is not None else ""
        return msgspec.structs.replace(alias, serving=serving.version, revision=revision)

    async def _stepped(self, name: str, step: Callable[[Alias], Alias]) -> Change:
        async with _translated():
            alias = await self._spread.change(name, step)
        return Change(self._id(name), alias.message)

    def _unknown(self, name: str) -> LifecycleError:
        return LifecycleError(
            "unknown", f"no adapter {self._id(name)}; `list` shows those that there are"
        )

    def _id(self, name: str) -> str:
        return f"{self.model_id}:{name}"


def _changed(alias: Alias) -> LifecycleError:
    """What was asked for was meant for another state of things."""
    return LifecycleError("conflict", f"it has changed meanwhile: {alias.message}; ask again")


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """Turn what can go wrong below into operators' words, once."""
    try:
        yield
    except LoadError as error:
        kind: Problem = "invalid" if error.fault is LoadFault.ADAPTER_INVALID else "unavailable"
        raise LifecycleError(kind, str(error)) from None
    except (StoreError, RegistryError) as error:
        raise LifecycleError("unavailable", str(error)) from None
