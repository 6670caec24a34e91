"""The copy on disk: fetched once, whole, checked, bounded in time and tries."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_files import write_adapter

from router.adapters.cache import AdapterCache
from router.adapters.local import LocalStore
from router.adapters.store import AdapterGoneError, StoredAdapter, StoreError
from router.adapters.validate import AdapterRules
from router.core.job import LoadError, LoadFault

RULES = AdapterRules(("tiny",), rank_max=16)


class Store(LocalStore):
    """A local store whose fetches can be made to fail or hang."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.failures: list[Exception] = []
        self.hang: threading.Event | None = None
        self.fetched = 0

    def fetch(self, adapter: StoredAdapter, into: Path, should_stop: Callable[[], bool]) -> None:
        self.fetched += 1
        while self.hang is not None and not self.hang.wait(0.01):
            if should_stop():
                raise StoreError("stopped")
        if self.failures:
            raise self.failures.pop(0)
        super().fetch(adapter, into, should_stop)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write_adapter(tmp_path / "store" / "a")
    return Store(tmp_path / "store")


def cache_of(store: Store, tmp_path: Path, *, timeout_s: float = 5, tries: int = 3) -> AdapterCache:
    cache = AdapterCache(store, tmp_path / "cache", RULES, timeout_s=timeout_s, max_tries=tries)
    cache.prepare()
    return cache


def found(store: Store, name: str = "a") -> StoredAdapter:
    adapter = store.find(name)
    assert adapter is not None
    return adapter


def in_place(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


async def test_many_who_want_one_adapter_fetch_it_once(store: Store, tmp_path: Path) -> None:
    cache = cache_of(store, tmp_path)
    adapter = found(store)
    folders = await asyncio.gather(*(cache.folder_of(adapter) for _ in range(32)))
    assert store.fetched == 1
    assert set(folders) == {tmp_path / "cache" / f"a@{adapter.version}"}
    await cache.folder_of(adapter)
    await cache_of(store, tmp_path).folder_of(adapter)
    assert store.fetched == 1, "kept, by a later process too"
    assert in_place(tmp_path) == [f"a@{adapter.version}"]


async def test_each_version_has_a_folder_of_its_own(store: Store, tmp_path: Path) -> None:
    cache = cache_of(store, tmp_path)
    first = await cache.folder_of(found(store))
    os.utime(tmp_path / "store" / "a" / "adapter_model.safetensors", ns=(1, 1))
    second = await cache.folder_of(found(store))
    assert first != second
    assert first.is_dir()


async def test_a_passing_failure_is_tried_again(store: Store, tmp_path: Path) -> None:
    store.failures = [StoreError("SlowDown"), OSError(5, "Input/output error")]
    await cache_of(store, tmp_path).folder_of(found(store))
    assert store.fetched == 3


FINAL: list[tuple[list[Exception], LoadFault, str, int]] = [
    ([StoreError("down")] * 3, LoadFault.STORE_UNAVAILABLE, "adapter a: down, after 3 tries", 3),
    ([AdapterGoneError("a is gone")], LoadFault.ADAPTER_CHANGED, "a is gone", 1),
]


@pytest.mark.parametrize(("failures", "fault", "message", "tries"), FINAL)
async def test_a_failure_is_told_and_leaves_nothing(
    store: Store,
    tmp_path: Path,
    failures: list[Exception],
    fault: LoadFault,
    message: str,
    tries: int,
) -> None:
    store.failures = list(failures)
    with pytest.raises(LoadError) as error:
        await cache_of(store, tmp_path).folder_of(found(store))
    assert (error.value.fault, str(error.value)) == (fault, message)
    assert store.fetched == tries
    assert in_place(tmp_path) == []


async def test_an_unsound_adapter_is_refused_at_once(store: Store, tmp_path: Path) -> None:
    write_adapter(tmp_path / "store" / "a", r=99)
    with pytest.raises(LoadError, match="its rank is 99") as error:
        await cache_of(store, tmp_path).folder_of(found(store))
    assert error.value.fault is LoadFault.ADAPTER_INVALID
    assert store.fetched == 1
    assert in_place(tmp_path) == []


async def test_what_is_on_disk_is_checked_by_the_rules_that_hold_now(
    store: Store, tmp_path: Path
) -> None:
    await cache_of(store, tmp_path).folder_of(found(store))
    stricter = AdapterRules(("tiny",), rank_max=4)
    later = AdapterCache(store, tmp_path / "cache", stricter, timeout_s=5, max_tries=1)
    with pytest.raises(LoadError, match="its rank is 8, but max_lora_rank is 4"):
        await later.folder_of(found(store))
    assert in_place(tmp_path) == [f"a@{found(store).version}"], "another router may use it"


@pytest.mark.parametrize("damage", ["gone", "cut"])
async def test_a_copy_that_went_bad_is_fetched_again(
    store: Store, tmp_path: Path, damage: str
) -> None:
    cache = cache_of(store, tmp_path)
    folder = await cache.folder_of(found(store))
    weights = folder / "adapter_model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-5])
        cache = cache_of(store, tmp_path)
    assert await cache.folder_of(found(store)) == folder
    original = tmp_path / "store" / "a" / weights.name
    assert weights.read_bytes() == original.read_bytes()
    assert store.fetched == 2


async def test_a_transfer_that_hangs_is_given_up(store: Store, tmp_path: Path) -> None:
    store.hang = threading.Event()
    with pytest.raises(LoadError, match=r"not here after 0\.05 s \(download_timeout_s\), after 2"):
        await cache_of(store, tmp_path, timeout_s=0.05, tries=2).folder_of(found(store))
    store.hang = None
    await cache_of(store, tmp_path).folder_of(found(store))


async def test_who_leaves_does_not_end_what_others_wait_for(store: Store, tmp_path: Path) -> None:
    store.hang = threading.Event()
    cache = cache_of(store, tmp_path)
    adapter = found(store)
    leaver = asyncio.create_task(cache.folder_of(adapter))
    stayer = asyncio.create_task(cache.folder_of(adapter))
    while not store.fetched:
        await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    store.hang.set()
    assert (await stayer).is_dir()
    assert store.fetched == 1


async def test_what_a_killed_process_left_is_no_adapter_and_is_removed(
    store: Store, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / ".partial-dead"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{}")
    os.utime(left, (1, 1))
    fresh = tmp_path / "cache" / ".partial-alive"
    fresh.mkdir()
    cache_of(store, tmp_path)
    assert in_place(tmp_path) == [".partial-alive"]


async def test_processes_that_share_the_folder_fetch_once(store: Store, tmp_path: Path) -> None:
    """A cache each, as processes have; the lock is of an open file, so it is theirs alike."""
    store.hang = threading.Event()
    caches = [cache_of(store, tmp_path) for _ in range(4)]
    adapter = found(store)
    fetching = asyncio.gather(*(cache.folder_of(adapter) for cache in caches))
    while not store.fetched:
        await asyncio.sleep(0.001)
    store.hang.set()
    await fetching
    assert store.fetched == 1
    assert in_place(tmp_path) == [f"a@{adapter.version}"]


async def test_a_fetch_that_another_process_does_not_end_is_waited_for_in_vain(
    store: Store, tmp_path: Path
) -> None:
    store.hang = threading.Event()
    adapter = found(store)
    one = asyncio.create_task(cache_of(store, tmp_path, timeout_s=5).folder_of(adapter))
    while not store.fetched:
        await asyncio.sleep(0.001)
    with pytest.raises(LoadError, match="not here after"):
        await cache_of(store, tmp_path, timeout_s=0.1, tries=1).folder_of(adapter)
    store.hang.set()
    await one
