"""Names are looked up once, absent ones are remembered for a while, and nothing grows."""

import asyncio
from pathlib import Path

import pytest
from adapter_files import write_adapter

from router.adapters import catalog as module
from router.adapters.catalog import AdapterCatalog
from router.adapters.local import LocalStore
from router.adapters.store import StoredAdapter, StoreError


class Store(LocalStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.lookups: list[str] = []
        self.down = False

    def find(self, name: str) -> StoredAdapter | None:
        self.lookups.append(name)
        if self.down:
            raise StoreError("down")
        return super().find(name)

    def list(self) -> dict[str, StoredAdapter]:
        if self.down:
            raise StoreError("down")
        return super().list()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write_adapter(tmp_path / "a")
    return Store(tmp_path)


async def test_what_is_listed_is_found_without_looking(store: Store) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    assert catalog.names == ["a"]
    await catalog.find("a")
    assert store.lookups == ["a"], "its version is not known of a listing of a folder"
    assert await catalog.find("a") is catalog.get("a")
    await catalog.refresh()
    assert await catalog.find("a") is catalog.get("a")
    assert store.lookups == ["a"], "and was remembered"


async def test_an_absent_name_is_looked_up_once(store: Store) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    results = await asyncio.gather(*(catalog.find("ghost") for _ in range(50)))
    assert results == [None] * 50
    assert await catalog.find("ghost") is None
    assert store.lookups == ["ghost"]
    for name in ("..", "a/b", "", "-x"):
        assert await catalog.find(name) is None
    assert store.lookups == ["ghost"], "what can be no name is not looked up"


async def test_a_new_adapter_is_found_before_the_next_listing(store: Store, tmp_path: Path) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    write_adapter(tmp_path / "new")
    assert await catalog.find("new") is not None
    assert catalog.names == ["a", "new"]


async def test_the_memory_of_absent_names_is_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABSENT_MAX", 10)
    catalog = AdapterCatalog(store, refresh_s=100)
    for number in range(40):
        await catalog.find(f"ghost-{number}")
    assert len(catalog._absent) == 10
    assert catalog._lookups == {}
    assert catalog.names == []


async def test_a_store_that_is_down_is_an_error_and_not_an_absence(store: Store) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    store.down = True
    with pytest.raises(StoreError):
        await catalog.find("b")
    with pytest.raises(StoreError):
        await catalog.refresh()
    assert catalog.names == ["a"], "the listing is kept"
    store.down = False
    assert await catalog.find("b") is None
