"""Names are looked up once, absent ones are remembered for a while, and nothing grows."""

import asyncio
import shutil
import threading
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

    def list(self) -> dict[str, StoredAdapter]:
        if self.down:
            raise StoreError("down")
        return super().list()

    def find(self, name: str) -> StoredAdapter | None:
        self.lookups.append(name)
        if self.down:
            raise StoreError("down")
        return super().find(name)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write_adapter(tmp_path / "a")
    return Store(tmp_path)


async def test_what_is_listed_is_found_without_looking(store: Store) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    assert catalog.names == ["a"]
    assert await catalog.find("a") is catalog.get("a")
    assert store.lookups == ["a"], "once, for its version: the listing reads no files"
    await catalog.refresh()
    assert await catalog.find("a") is catalog.get("a")
    assert store.lookups == ["a"], "and never again, unless it changes"


async def test_a_refresh_says_what_has_changed_and_gone(store: Store, tmp_path: Path) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    assert await catalog.refresh() == ()
    write_adapter(tmp_path / "b")
    changes = catalog.changes
    assert await catalog.refresh() == ()
    assert catalog.changes > changes, "there is a name more"
    changes = catalog.changes
    first = await catalog.find("a")
    write_adapter(tmp_path / "a", seed=1)
    assert await catalog.refresh() == ("a",)
    assert catalog.changes == changes, "the names are the same"
    second = await catalog.find("a")
    assert first is not None
    assert second is not None
    assert second.version != first.version
    shutil.rmtree(tmp_path / "b")
    assert await catalog.refresh() == ("b",)
    assert "b" not in catalog


async def test_a_listing_that_was_begun_first_does_not_come_last(
    store: Store, tmp_path: Path
) -> None:
    """As where an operator has the listing read while it is read anyway."""
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    old = await catalog.find("a")
    listed, begun, go_on = store.list, threading.Event(), threading.Event()

    def slow() -> dict[str, StoredAdapter]:
        found = listed()
        begun.set()
        go_on.wait(20)
        return found

    store.list = slow  # type: ignore[method-assign]
    first = asyncio.create_task(catalog.refresh())
    await asyncio.to_thread(begun.wait, 20)
    write_adapter(tmp_path / "a", seed=1)
    store.list = listed  # type: ignore[method-assign]
    second = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0.1)
    go_on.set()
    changed = await asyncio.gather(first, second)
    new = await catalog.find("a")
    assert tuple(changed) == ((), ("a",))
    assert old is not None
    assert new is not None
    assert new.version != old.version


async def test_a_store_that_is_suddenly_empty_is_not_believed(store: Store, tmp_path: Path) -> None:
    """As a folder is whose disk is not mounted: what was decided of them must not be forgotten."""
    write_adapter(tmp_path / "b")
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    with pytest.raises(StoreError, match="lists nothing, where there were 2 adapters"):
        await catalog.refresh()
    assert catalog.names == ["a", "b"]
    (tmp_path / ".a").rename(tmp_path / "a")
    assert await catalog.refresh() == ("b",), "one by one they may go"
    (tmp_path / "a").rename(tmp_path / ".a")
    assert await catalog.refresh() == ("a",)


async def test_made_up_names_are_looked_up_only_so_often(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKUPS_BURST", 20.0)
    monkeypatch.setattr(module, "LOOKUPS_PER_S", 0.0)
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    for number in range(100):
        assert await catalog.find(f"ghost-{number}") is None
    assert len(store.lookups) == 20
    assert await catalog.find("a") is not None, "what is listed is found all the same"


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


async def test_changes_of_the_names_are_counted(store: Store, tmp_path: Path) -> None:
    catalog = AdapterCatalog(store, refresh_s=100)
    await catalog.refresh()
    before = catalog.changes
    await catalog.refresh()
    await catalog.find("a")
    await catalog.find("ghost")
    assert catalog.changes == before
    write_adapter(tmp_path / "new")
    await catalog.find("new")
    assert catalog.changes > before
    before = catalog.changes
    write_adapter(tmp_path / "newer")
    await catalog.refresh()
    assert catalog.changes > before


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
