"""Which adapters there are: a listing kept fresh, and a bounded memory of names that are not.

Finding an adapter that is listed costs a look into a dict. A name that is not listed is looked up in
the store, once at a time and not again for some seconds, so that asking for made-up names neither
reaches a worker nor loads the store. Nothing that a client asks for makes anything here grow.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from anyio import CapacityLimiter, to_thread

from router.adapters.store import AdapterStore, StoredAdapter, StoreError, is_name

log = logging.getLogger("lorayard.adapters")

ABSENT_MAX: Final = 4096
ABSENT_S: Final = 5.0
LOOKUPS_MAX: Final = 16
LOOKUP_TIMEOUT_S: Final = 10.0
LIST_TIMEOUT_S: Final = 60.0


class AdapterCatalog:
    """The adapters of one store. `refresh_s` is how often the whole listing is read again.

    `changes` is how often the names that are listed have changed.
    """

    def __init__(self, store: AdapterStore, *, refresh_s: float) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._listed: dict[str, StoredAdapter] = {}
        self.changes = 0
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[StoredAdapter | None]] = {}
        self._threads = CapacityLimiter(LOOKUPS_MAX)

    @property
    def names(self) -> list[str]:
        """All that is listed, in order."""
        return sorted(self._listed)

    def get(self, name: str) -> StoredAdapter | None:
        """The adapter as listed, without looking."""
        return self._listed.get(name)

    async def refresh(self) -> None:
        """Read the whole listing. Raises `StoreError`, and then keeps the listing that it has."""
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                listed = await to_thread.run_sync(
                    self._store.list, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            raise StoreError(f"{self._store.url}: no listing after {LIST_TIMEOUT_S:g} s") from None
        if listed.keys() != self._listed.keys():
            self.changes += 1
        self._listed = listed

    async def keep_fresh(self, refreshed: Callable[[], None]) -> None:
        """Refresh for ever, and say so; a store that cannot be read is logged and asked again."""
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await self.refresh()
                refreshed()
            except StoreError as error:
                log.warning("the listing is kept as it was: %s", error)
            except Exception:  # this must not end while the router runs
                log.exception("the listing is kept as it was")

    async def find(self, name: str, *, afresh: bool = False) -> StoredAdapter | None:
        """The adapter, or None where there is none of that name. Raises `StoreError`.

        `afresh` looks even for what is listed: it was found to have changed.
        """
        adapter = None if afresh else self._listed.get(name)
        if adapter is not None or not is_name(name):
            return adapter
        now = asyncio.get_running_loop().time()
        absent_since = self._absent.get(name)
        if absent_since is not None and now - absent_since < ABSENT_S:
            return None
        lookup = self._lookups.get(name)
        if lookup is None:
            lookup = self._lookups[name] = asyncio.create_task(self._look_up(name))
            lookup.add_done_callback(lambda _: self._lookups.pop(name, None))
        return await asyncio.shield(lookup)

    async def _look_up(self, name: str) -> StoredAdapter | None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                adapter = await to_thread.run_sync(
                    self._store.find, name, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            raise StoreError(f"{self._store.url}: no answer after {LOOKUP_TIMEOUT_S:g} s") from None
        if (adapter is not None) != (name in self._listed):
            self.changes += 1
        if adapter is not None:
            self._listed[name] = adapter
            self._absent.pop(name, None)
            return adapter
        self._listed.pop(name, None)
        self._absent[name] = asyncio.get_running_loop().time()
        self._absent.move_to_end(name)
        if len(self._absent) > ABSENT_MAX:
            self._absent.popitem(last=False)
        return None
