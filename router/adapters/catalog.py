"""Which adapters there are: a listing kept fresh, and a bounded memory of names that are not.

Finding an adapter that is listed costs a look into a dict. A name that is not listed is looked up in
the store, once at a time and not again for some seconds, and only so many of them a second: beyond
that the listing is the answer. So asking for made-up names neither reaches a worker nor loads the
store, and nothing that a client asks for makes anything here grow.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from anyio import CapacityLimiter, to_thread

from router.adapters.store import AdapterStore, StoredAdapter, StoreError, is_name

log = logging.getLogger("lorayard.adapters")

ABSENT_MAX: Final = 4096
ABSENT_S: Final = 5.0
LOOKUPS_MAX: Final = 16
LOOKUPS_PER_S: Final = 50.0  # of names that are not listed
LOOKUPS_BURST: Final = 200.0
LOOKUP_TIMEOUT_S: Final = 10.0
LOST_AT_ONCE: Final = 1  # more that are gone at once, and all there were, are not believed
LIST_TIMEOUT_S: Final = 60.0


class AdapterCatalog:
    """The adapters of one store. `refresh_s` is how often the whole listing is read again.

    `changes` rises whenever `names` may have changed.
    """

    def __init__(self, store: AdapterStore, *, refresh_s: float) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._listed: dict[str, StoredAdapter] = {}
        self._names: list[str] | None = None
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[StoredAdapter | None]] = {}
        # What lookups find while a listing is read; bounded by their rate.
        self._found_meanwhile: dict[str, StoredAdapter | None] | None = None
        # One at a time: a listing that was begun first must not come last.
        self._refreshing = asyncio.Lock()
        self._threads = CapacityLimiter(LOOKUPS_MAX)
        self._allowance = LOOKUPS_BURST
        self._allowed_at = 0.0
        self.changes = 0

    @property
    def names(self) -> list[str]:
        """All that is listed, in order; the list is the catalog's own."""
        if self._names is None:
            self._names = sorted(self._listed)
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self._listed

    def get(self, name: str) -> StoredAdapter | None:
        """The adapter as listed, without looking; its version may not be known yet."""
        return self._listed.get(name)

    def forget(self, name: str) -> None:
        """What is listed of a name is not so any more; who asks for it has it looked up."""
        if self._listed.pop(name, None) is not None:
            self._renamed()

    async def refresh(self) -> tuple[str, ...]:
        """Read the whole listing; the names whose files are others now, those that are gone among them.

        Raises `StoreError`, and then keeps the listing that it has.
        """
        async with self._refreshing:
            return await self._refresh()

    async def _refresh(self) -> tuple[str, ...]:
        found_meanwhile = self._found_meanwhile = {}
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                listed = await to_thread.run_sync(
                    self._store.list, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            raise StoreError(f"{self._store.url}: no listing after {LIST_TIMEOUT_S:g} s") from None
        finally:
            self._found_meanwhile = None
        if not listed and len(self._listed) > LOST_AT_ONCE:
            # A folder whose disk is not mounted, a bucket that was put in the place of another.
            raise StoreError(
                f"{self._store.url} lists nothing, where there were {len(self._listed)} adapters; if "
                "they were removed, start the router again"
            )
        for name, found in found_meanwhile.items():  # which is newer
            if found is None:
                listed.pop(name, None)
            else:
                listed[name] = found
        before = self._listed
        changed = [name for name in before if name not in listed]
        changes = len(listed) != len(before) or bool(changed)
        for name, adapter in listed.items():
            known = before.get(name)
            if known is None:
                changes = True
            elif known.revision != adapter.revision:
                changed.append(name)
            else:  # with the version, which a listing may not know
                listed[name] = known
        self._listed = listed
        if changes:
            self._renamed()
        return tuple(changed)

    def _renamed(self) -> None:
        self._names = None
        self.changes += 1

    async def keep_fresh(self, refreshed: Callable[[Iterable[str]], None]) -> None:
        """Refresh for ever, and tell what changed; a store that cannot be read is asked again."""
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                refreshed(await self.refresh())
            except StoreError as error:
                log.warning("the listing is kept as it was: %s", error)
            except Exception:  # this must not end while the router runs
                log.exception("the listing is kept as it was")

    async def find(self, name: str, *, afresh: bool = False) -> StoredAdapter | None:
        """The adapter with its version, or None where there is none of that name. Raises `StoreError`.

        `afresh` looks even for what is listed: it was found to have changed.
        """
        adapter = self._listed.get(name)
        if adapter is not None and adapter.version and not afresh:
            return adapter
        if not is_name(name):
            return None
        lookup = self._lookups.get(name)
        if lookup is None:
            if adapter is None and not afresh and not self._may_look_up(name):
                return None
            lookup = self._lookups[name] = asyncio.create_task(self._look_up(name))
            lookup.add_done_callback(lambda _: self._lookups.pop(name, None))
        return await asyncio.shield(lookup)

    def _may_look_up(self, name: str) -> bool:
        """Whether the store is asked for a name that is not listed."""
        now = asyncio.get_running_loop().time()
        absent_since = self._absent.get(name)
        if absent_since is not None and now - absent_since < ABSENT_S:
            return False
        gained = (now - self._allowed_at) * LOOKUPS_PER_S
        self._allowance = min(LOOKUPS_BURST, self._allowance + gained)
        self._allowed_at = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    async def _look_up(self, name: str) -> StoredAdapter | None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                adapter = await to_thread.run_sync(
                    self._store.find, name, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            raise StoreError(f"{self._store.url}: no answer after {LOOKUP_TIMEOUT_S:g} s") from None
        if self._found_meanwhile is not None:
            self._found_meanwhile[name] = adapter
        if adapter is not None:
            if name not in self._listed:
                self._renamed()
            self._listed[name] = adapter
            self._absent.pop(name, None)
            return adapter
        if self._listed.pop(name, None) is not None:
            self._renamed()
        self._absent[name] = asyncio.get_running_loop().time()
        self._absent.move_to_end(name)
        if len(self._absent) > ABSENT_MAX:
            self._absent.popitem(last=False)
        return None
