"""What is to be there before it is asked for, and what is to stay: preloaded, pinned, kept on disk.

Once a second this looks at what is held, and tells the other router processes what was used.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from router.adapters.cache import VERSION, AdapterCache
from router.adapters.catalog import AdapterCatalog
from router.adapters.store import StoreError, is_name
from router.config import LoraConfig
from router.core.job import AdapterRef
from router.lifecycle.names import Names
from router.lifecycle.registry import RegistryError
from router.lifecycle.spread import Spread
from router.lifecycle.usage import Usages

log = logging.getLogger("lorayard.lifecycle")

PERIOD_S: Final = 1.0


class Presence:
    """Of one model's adapters. `find` looks an adapter up by its name."""

    def __init__(
        self,
        names: Names,
        usages: Usages,
        catalog: AdapterCatalog,
        cache: AdapterCache,
        lora: LoraConfig,
        spread: Spread,
        find: Callable[[str], Awaitable[AdapterRef | None]],
    ) -> None:
        self._names = names
        self._usages = usages
        self._catalog = catalog
        self._cache = cache
        self._lora = lora
        self._spread = spread
        self._find = find
        self._pinned: dict[str, AdapterRef] = {}
        self._held: dict[tuple[str, str], None] = {}
        self._missing: tuple[str, ...] = ()

    def is_pinned(self, name: str) -> bool:
        """Whether the configuration or an operator has pinned it."""
        return self._names.alias(name).pinned or self.is_pinned_always(name)

    def is_pinned_always(self, name: str) -> bool:
        """Whether the configuration has."""
        return name in self._lora.pinned_adapters

    def pin(self) -> None:
        """Pin what is to be pinned, at the version that serves."""
        names, router = self._to_pin(), self._names.router
        for name, adapter in tuple(self._pinned.items()):
            if name not in names or self._names.serving(name) != adapter:
                router.pin(adapter, pinned=False)
                del self._pinned[name]
        for name in names:
            serving = self._names.serving(name)
            if serving is not None and name not in self._pinned:
                self._pinned[name] = serving
                router.pin(serving, pinned=True)

    def has_room_to_pin(self, name: str) -> bool:
        """Whether, with it pinned too, a slot is left on each worker for all that are not."""
        return len(self._to_pin() | {name: None}) < self.slots

    @property
    def slots(self) -> int:
        """How many adapters each worker holds."""
        return self._lora.max_num_adapters_per_replica

    def _to_pin(self) -> dict[str, None]:
        return dict.fromkeys(self._lora.pinned_adapters) | self._names.pinned()

    async def load(self) -> None:
        """Load what nobody holds of what is to be there, on one worker after another; and pin it."""
        missing = []
        router = self._names.router
        wanted = dict.fromkeys((*self._to_pin(), *self._lora.preload_adapters))
        for number, name in enumerate(wanted):
            try:
                adapter = await self._find(name)
            except StoreError as error:
                log.warning("%s: not loaded yet: %s", self._names.id(name), error)
                continue
            workers = [worker for worker in router.fleet if worker.accepting]
            if adapter is None:
                missing.append(name)
            elif workers and not router.fleet.holder_count(adapter):
                router.warm(workers[number % len(workers)], adapter)
        self.pin()
        if missing and tuple(missing) != self._missing:
            log.warning(
                "%s: to be loaded or pinned, but not in the store: %s; put them there, or correct the "
                "names",
                self._names.model_id,
                ", ".join(missing),
            )
        self._missing = tuple(missing)

    async def keep(self) -> None:
        """Hold on this disk whatever may be loaded again, for ever."""
        try:
            while True:
                self.look()
                await self._tell_usage()
                await asyncio.sleep(PERIOD_S)
        finally:
            self._hold({})

    def look(self) -> None:
        """Hold what is to be held now, and no more."""
        self._hold(self._wanted())
        self._end_trials()

    async def _tell_usage(self) -> None:
        usages = self._usages
        if self._spread.alone or not usages.changed:
            return
        ago = time.time() - asyncio.get_running_loop().time()
        used = {name: usages.by_name.get(name) for name in usages.changed}
        usages.changed.clear()
        try:
            await self._spread.tell_usage(
                {name: usage.record(ago) for name, usage in used.items() if usage is not None}
            )
        except RegistryError as error:
            log.warning("%s: what was used is not told: %s", self._names.model_id, error)

    def _hold(self, wanted: dict[tuple[str, str], None]) -> None:
        for key in [key for key in self._held if key not in wanted]:
            del self._held[key]
            self._cache.let_go(*key)
        for key in wanted:
            if key not in self._held:
                self._held[key] = None
                self._cache.hold(*key)

    def _wanted(self) -> dict[tuple[str, str], None]:
        """What is in slots, what a version on trial may be replaced by, what the store has no more.

        A worker tells whatever somebody has loaded there: what no store can name is not here.
        """
        wanted = {
            (slot.adapter.name, slot.adapter.version): None
            for worker in self._names.router.fleet
            for slot in worker.slots
            if is_name(slot.adapter.name) and VERSION.fullmatch(slot.adapter.version)
        }
        for name in self._usages.trials:
            alias = self._names.alias(name)
            for version in (*alias.versions, alias.previous):
                if version:
                    wanted[name, version] = None
        for name, alias in self._names.aliases.items():
            listed = self._catalog.get(name)
            stored = "" if listed is None else listed.version
            # Without a version in the listing, where it is another one is known by what was decided.
            if stored or alias.refused or alias.candidate:
                wanted |= {(name, one): None for one in alias.versions if one != stored}
        return wanted

    def _end_trials(self) -> None:
        """A version that has served all for long enough is no longer on trial."""
        latest = asyncio.get_running_loop().time() - self._lora.rollback_window_s
        for name, trial in tuple(self._usages.trials.items()):
            if trial.began < latest and self._names.alias(name).candidate != trial.version:
                self._usages.settle(name)
