"""The store and, beside it, adapters that have each a place of their own: one store to whoever reads.

An operator registers such an adapter under a name; its place is a folder or an address as a store's
would be, its last part the adapter's. It goes before one of the same name in the store. Of a place that
cannot be read the adapter stays listed as it was: one place's failure is not the store's.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec

from router.adapters.address import problem_with
from router.adapters.checksum import Checksum
from router.adapters.store import (
    AdapterStore,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
)

log = logging.getLogger("lorayard.lifecycle")
HUB: Final = "hf://"
REPOSITORY_SLASHES: Final = 3  # of hf://ORG/REPO


class Sources:
    """A store with further adapters. Blocking, as every store is; for any thread.

    `opened` opens a store by its address, when it is first read.
    """

    def __init__(self, store: AdapterStore, opened: Callable[[str], AdapterStore]) -> None:
        self.url = store.url
        self._store = store
        self._opened = opened
        self._places: dict[str, _Place] = {}

    def register(self, places: Mapping[str, str]) -> None:
        """Take in where adapters are; an empty place is none. Raises `StoreError` before it does."""
        found = {name: _place(place) if place else None for name, place in places.items()}
        for name, place in found.items():
            if place is None:
                self._places.pop(name, None)
            else:
                self._places[name] = place

    def list(self) -> dict[str, StoredAdapter]:
        """All of them."""
        listed = self._store.list()
        for name, place in tuple(self._places.items()):
            try:
                adapter = self._look(name, place)
            except StoreError as error:
                log.warning("%s is listed as it was: %s", name, error)
                # Nothing known of it yet: there, and to be looked up by whoever asks for it.
                adapter = place.found or StoredAdapter(name, "", "", ())
            if adapter is None:
                listed.pop(name, None)
            else:
                listed[name] = adapter
        return listed

    def find(self, name: str) -> StoredAdapter | None:
        """One of them, looked up now."""
        place = self._places.get(name)
        if place is None:
            return self._store.find(name)
        return self._look(name, place)

    def _look(self, name: str, place: "_Place") -> StoredAdapter | None:
        adapter = self._at(place).find(place.name)
        place.found = None if adapter is None else msgspec.structs.replace(adapter, name=name)
        return place.found

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Some bytes of a file."""
        store, adapter = self._of(adapter)
        return store.read(adapter, file, start, stop)

    def checksum(self, adapter: StoredAdapter, file: StoredFile) -> Checksum | None:
        """What its place knows of a file's content."""
        store, adapter = self._of(adapter)
        return store.checksum(adapter, file)

    def _of(self, adapter: StoredAdapter) -> tuple[AdapterStore, StoredAdapter]:
        place = self._places.get(adapter.name)
        if place is None:
            return self._store, adapter
        return self._at(place), msgspec.structs.replace(adapter, name=place.name)

    def _at(self, place: "_Place") -> AdapterStore:
        if place.store is None:
            place.store = self._opened(place.above)
        return place.store


class _Place:
    """Where one adapter is: its name in the store one step above, and how it was found there."""

    __slots__ = ("above", "found", "name", "store")

    def __init__(self, above: str, name: str) -> None:
        self.above = above
        self.name = name
        self.found: StoredAdapter | None = None
        self.store: AdapterStore | None = None


def _place(address: str) -> _Place:
    on_hub = address.startswith(HUB)
    # What is said of the whole store stands behind the adapter.
    path, mark, rest = (
        address.partition("@" if on_hub else "?") if "://" in address else (address, "", "")
    )
    path = path.rstrip("/")
    above, _, name = path.rpartition("/")
    if not above or above.endswith(":/") or not is_name(name):
        raise StoreError(
            f"`{address}` is no adapter's place; write /FOLDER/ADAPTER, s3://BUCKET/ADAPTER or "
            "hf://ORG/REPO",
            passing=False,
        )
    if on_hub and path.count("/") == REPOSITORY_SLASHES:
        above = path  # a repository that is one adapter is a store of one
    if problem := problem_with(f"{above}{mark}{rest}"):
        raise StoreError(problem, passing=False)
    return _Place(f"{above}{mark}{rest}", name)
