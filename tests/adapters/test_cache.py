"""The copy on disk: fetched once, whole, checked, bounded in time, tries and size."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_files import write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.adapters.cache import AdapterCache
from router.adapters.local import LocalStore
from router.adapters.space import GIB, Space
from router.adapters.store import AdapterGoneError, StoredAdapter, StoredFile, StoreError
from router.adapters.transfer import Downloads
from router.adapters.validate import AdapterRules
from router.core.job import LoadError, LoadFault

RULES = AdapterRules(("tiny",), rank_max=16)
PART = 16 * 1024
WEIGHTS = "adapter_model.safetensors"
SIZE = 67_920  # of an adapter made here, both files


class Store(LocalStore):
    """A local store whose reads can be made to fail or hang."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.failures: list[Exception] = []
        self.hang: threading.Event | None = None
        self.reads = 0  # of weights, from their beginning

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        if file.name == WEIGHTS and not start:
            self.reads += 1
            if self.hang is not None:
                self.hang.wait(30)
            if self.failures:
                raise self.failures.pop(0)
        yield from super().read(adapter, file, start, stop)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    write_adapter(tmp_path / "store" / "a")
    store = Store(tmp_path / "store")
    yield store
    if store.hang is not None:
        store.hang.set()


def cache_of(
    store: LocalStore,
    tmp_path: Path,
    *,
    timeout_s: float = 20,
    tries: int = 3,
    rules: AdapterRules = RULES,
    max_bytes: int | None = None,
    model: str = "base",
) -> AdapterCache:
    cache = AdapterCache(
        store,
        tmp_path / "cache" / model,
        rules,
        timeout_s=timeout_s,
        max_tries=tries,
        downloads=Downloads(4, part_bytes=PART),
        space=Space(tmp_path / "cache", max_bytes),
    )
    cache.prepare()
    return cache


def found(store: LocalStore, name: str = "a") -> StoredAdapter:
    adapter = store.find(name)
    assert adapter is not None
    return adapter


def in_place(tmp_path: Path, model: str = "base") -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / model).iterdir())


async def until_read(store: Store, times: int = 1) -> None:
    while store.reads < times:
        await asyncio.sleep(0.001)


async def test_many_who_want_one_adapter_fetch_it_once(store: Store, tmp_path: Path) -> None:
    cache = cache_of(store, tmp_path)
    adapter = found(store)
    assert not cache.has(adapter)
    assert cache.facts(adapter) is None
    folders = await asyncio.gather(*(cache.folder_of(adapter) for _ in range(32)))
    assert store.reads == 1
    assert set(folders) == {tmp_path / "cache" / "base" / f"a@{adapter.version}"}
    await cache.folder_of(adapter)
    await cache_of(store, tmp_path).folder_of(adapter)
    assert store.reads == 1, "kept, by a later process too"
    assert in_place(tmp_path) == [f"a@{adapter.version}"]
    facts = cache.facts(adapter)
    assert cache.has(adapter)
    assert facts is not None
    assert (facts.rank, facts.bytes) == (8, 67_736)
    assert cache.bytes == SIZE


async def test_each_version_has_a_folder_of_its_own(store: Store, tmp_path: Path) -> None:
    cache = cache_of(store, tmp_path)
    old = found(store)
    first = await cache.folder_of(old)
    os.utime(tmp_path / "store" / "a" / WEIGHTS, ns=(1, 1))
    assert await cache.folder_of(found(store)) == first, "touched, and not changed"
    assert store.reads == 1
    write_adapter(tmp_path / "store" / "a", 7)
    second = await cache.folder_of(found(store))
    assert first != second
    assert first.is_dir()
    assert cache.find("a", old.version) is not None, "though the store has another by now"
    assert await cache.folder_of(old) == first


async def test_a_version_on_this_disk_is_found_without_the_store(
    store: Store, tmp_path: Path
) -> None:
    adapter = found(store)
    assert cache_of(store, tmp_path).find("a", adapter.version) is None
    place = await cache_of(store, tmp_path).folder_of(adapter)
    later = cache_of(store, tmp_path)
    on_disk = later.find("a", adapter.version)
    assert on_disk is not None
    assert await later.folder_of(on_disk) == place
    assert store.reads == 1
    for name, version in [("a", "0" * 16), ("a", "../.."), ("..", adapter.version), ("a", "")]:
        assert later.find(name, version) is None
    (place / WEIGHTS).unlink()
    assert later.find("a", adapter.version) is None
    with pytest.raises(LoadError, match="is no longer on this disk") as error:
        await cache_of(store, tmp_path).folder_of(on_disk)
    assert error.value.fault is LoadFault.ADAPTER_CHANGED


async def test_a_passing_failure_is_tried_again(store: Store, tmp_path: Path) -> None:
    store.failures = [StoreError("SlowDown"), StoreError("reset by peer")]
    await cache_of(store, tmp_path).folder_of(found(store))
    assert store.reads == 3


FINAL: list[tuple[list[Exception], LoadFault, str, int]] = [
    ([StoreError("down")] * 3, LoadFault.STORE_UNAVAILABLE, "adapter a: down, after 3 tries", 3),
    ([StoreError("no", passing=False)], LoadFault.STORE_UNAVAILABLE, "adapter a: no", 1),
    ([AdapterGoneError("a is gone")], LoadFault.ADAPTER_CHANGED, "a is gone", 1),
]


@pytest.mark.parametrize(("failures", "fault", "message", "tries"), FINAL)
async def test_a_failure_is_told_and_nothing_is_in_place(
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
    assert store.reads == tries
    assert not [name for name in in_place(tmp_path) if not name.startswith(".partial-")]


async def test_an_unsound_adapter_is_refused_at_once(store: Store, tmp_path: Path) -> None:
    write_adapter(tmp_path / "store" / "a", r=99)
    with pytest.raises(LoadError, match="its rank is 99") as error:
        await cache_of(store, tmp_path).folder_of(found(store))
    assert error.value.fault is LoadFault.ADAPTER_INVALID
    assert store.reads == 1
    assert in_place(tmp_path) == []


async def test_what_is_on_disk_is_checked_by_the_rules_that_hold_now(
    store: Store, tmp_path: Path
) -> None:
    await cache_of(store, tmp_path).folder_of(found(store))
    stricter = AdapterRules(("tiny",), rank_max=4)
    with pytest.raises(LoadError, match="its rank is 8, but max_lora_rank is 4"):
        await cache_of(store, tmp_path, rules=stricter).folder_of(found(store))
    assert in_place(tmp_path) == [f"a@{found(store).version}"], "another router may use it"


@pytest.mark.parametrize("damage", ["gone", "cut"])
async def test_a_copy_that_went_bad_is_fetched_again(
    store: Store, tmp_path: Path, damage: str
) -> None:
    cache = cache_of(store, tmp_path)
    folder = await cache.folder_of(found(store))
    weights = folder / WEIGHTS
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-5])
        cache = cache_of(store, tmp_path)
    assert await cache.folder_of(found(store)) == folder
    original = tmp_path / "store" / "a" / weights.name
    assert weights.read_bytes() == original.read_bytes()
    assert store.reads == 2


async def test_a_transfer_that_hangs_is_given_up(store: Store, tmp_path: Path) -> None:
    store.hang = threading.Event()
    with pytest.raises(LoadError, match=r"adapter a: not here after 0\.2 s \(download_timeout_s\)"):
        await cache_of(store, tmp_path, timeout_s=0.2).folder_of(found(store))
    store.hang.set()
    store.hang = None
    await cache_of(store, tmp_path).folder_of(found(store))


async def test_who_leaves_does_not_end_what_others_wait_for(store: Store, tmp_path: Path) -> None:
    store.hang = threading.Event()
    cache = cache_of(store, tmp_path)
    adapter = found(store)
    leaver = asyncio.create_task(cache.folder_of(adapter))
    stayer = asyncio.create_task(cache.folder_of(adapter))
    await until_read(store)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    store.hang.set()
    assert (await stayer).is_dir()
    assert store.reads == 1


async def test_what_killed_processes_left_is_no_adapter_and_is_removed(
    store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "base"
    for name, age_s in [("dead", 1e9), ("young", 0)]:
        left = folder / f".partial-{name}@{'0' * 16}"
        left.mkdir(parents=True)
        (left / "adapter_config.json").write_text("{}")
        if age_s:
            os.utime(left, (1, 1))
    (folder / ".gone-0123").mkdir()
    (folder / ".fetch-x@0").touch()
    (folder / ".hold-x@0").touch()
    cache_of(store, tmp_path)
    assert in_place(tmp_path) == [f".partial-young@{'0' * 16}"]


async def test_caches_that_share_the_folder_fetch_once(store: Store, tmp_path: Path) -> None:
    """A cache each, as processes have; the lock is of an open file, so it is theirs alike."""
    store.hang = threading.Event()
    caches = [cache_of(store, tmp_path) for _ in range(4)]
    adapter = found(store)
    fetching = asyncio.gather(*(cache.folder_of(adapter) for cache in caches))
    await until_read(store)
    store.hang.set()
    await fetching
    assert store.reads == 1
    assert in_place(tmp_path) == [f"a@{adapter.version}"]


async def test_a_fetch_that_another_process_does_not_end_is_waited_for_in_vain(
    store: Store, tmp_path: Path
) -> None:
    store.hang = threading.Event()
    adapter = found(store)
    one = asyncio.create_task(cache_of(store, tmp_path).folder_of(adapter))
    await until_read(store)
    with pytest.raises(LoadError, match="not here after"):
        await cache_of(store, tmp_path, timeout_s=0.1).folder_of(adapter)
    store.hang.set()
    await one


async def test_what_was_refused_is_not_fetched_for_each_who_asks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(store, tmp_path, rules=AdapterRules(("tiny",), rank_max=4))
    for _ in range(3):
        with pytest.raises(LoadError, match="its rank is 8, but max_lora_rank is 4") as error:
            await cache.folder_of(found(store))
        assert error.value.fault is LoadFault.ADAPTER_INVALID
    assert store.reads == 1
    write_adapter(tmp_path / "store" / "a", 1)
    monkeypatch.setattr("router.adapters.cache.REFUSED_S", 0.0)
    for _ in range(2):
        with pytest.raises(LoadError, match="its rank is 8"):
            await cache.folder_of(found(store))
    assert store.reads == 3, "another version is looked at, and after a while each is"


# The bound on what they take.


def write_many(tmp_path: Path, names: str) -> LocalStore:
    for number, name in enumerate(names):
        write_adapter(tmp_path / "store" / name, number)
    return LocalStore(str(tmp_path / "store"))


def names_in(tmp_path: Path, model: str = "base") -> str:
    return "".join(name[0] for name in in_place(tmp_path, model) if not name.startswith("."))


def was_used(cache: AdapterCache, place: Path, seconds: int) -> None:
    """Say when a version was used last, for who has no time to wait between uses."""
    os.utime(place, (seconds, seconds))


async def test_the_least_recently_used_leave(tmp_path: Path) -> None:
    store = write_many(tmp_path, "abcd")
    cache = cache_of(store, tmp_path, max_bytes=3 * SIZE + 100)
    for second, name in enumerate("abc"):
        was_used(cache, await cache.folder_of(found(store, name)), second)
    await cache.folder_of(found(store, "a"))
    await cache.folder_of(found(store, "d"))
    assert names_in(tmp_path) == "acd"
    assert cache.bytes == 3 * SIZE
    await cache.folder_of(found(store, "b"))
    assert names_in(tmp_path) == "abd"


async def test_what_any_process_holds_stays(tmp_path: Path) -> None:
    store = write_many(tmp_path, "abc")
    cache = cache_of(store, tmp_path, max_bytes=2 * SIZE + 100)
    other = cache_of(store, tmp_path, max_bytes=2 * SIZE + 100)
    for second, name in enumerate("ab"):
        was_used(cache, await cache.folder_of(found(store, name)), second)
    a = found(store, "a")
    other.hold("a", a.version)
    other.hold("a", a.version)
    await cache.folder_of(found(store, "c"))
    assert names_in(tmp_path) == "ac"
    cache.hold("c", found(store, "c").version)
    with pytest.raises(LoadError, match=r"no room on disk: .* router\.cache_max_gib") as error:
        await cache.folder_of(found(store, "b"))
    assert error.value.fault is LoadFault.STORE_UNAVAILABLE
    other.let_go("a", a.version)
    with pytest.raises(LoadError, match="no room on disk"):
        await cache.folder_of(found(store, "b"))
    other.let_go("a", a.version)
    await cache.folder_of(found(store, "b"))
    assert names_in(tmp_path) == "bc"


async def test_nothing_leaves_for_what_finds_no_room_all_the_same(tmp_path: Path) -> None:
    store = write_many(tmp_path, "abc")
    (tmp_path / "store" / "c" / "SHA256SUMS").write_text("\n" * SIZE)
    cache = cache_of(store, tmp_path, max_bytes=2 * SIZE + 100)
    for name in "ab":
        await cache.folder_of(found(store, name))
    cache.hold("a", found(store, "a").version)
    with pytest.raises(LoadError, match="no room on disk"):
        await cache.folder_of(found(store, "c"))
    assert names_in(tmp_path) == "ab"
    assert in_place(tmp_path)[0].startswith(".hold-a@")


async def test_a_version_is_held_where_no_lock_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_many(tmp_path, "abc")
    cache = cache_of(store, tmp_path, max_bytes=2 * SIZE + 100)
    for second, name in enumerate("ab"):
        was_used(cache, await cache.folder_of(found(store, name)), second)

    def full(path: Path, *, shared: bool = False) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("router.adapters.space.try_lock", full)
        cache.hold("a", found(store, "a").version)
    await cache.folder_of(found(store, "c"))
    assert names_in(tmp_path) == "ac"
    cache.let_go("a", found(store, "a").version)


async def test_what_is_being_fetched_stays_and_counts(store: Store, tmp_path: Path) -> None:
    write_many(tmp_path, "abc")
    cache = cache_of(store, tmp_path, max_bytes=2 * SIZE + 100)
    store.hang = threading.Event()
    fetching = asyncio.create_task(cache.folder_of(found(store, "a")))
    await until_read(store)
    store.hang.set()
    for name in "bc":
        await cache_of(store, tmp_path, max_bytes=2 * SIZE + 100).folder_of(found(store, name))
    await fetching
    assert len(names_in(tmp_path)) == 2


async def test_the_bound_is_for_all_base_models_together(tmp_path: Path) -> None:
    store = write_many(tmp_path, "ab")
    first = cache_of(store, tmp_path, max_bytes=SIZE + 100, model="first")
    second = cache_of(store, tmp_path, max_bytes=SIZE + 100, model="second")
    await first.folder_of(found(store, "a"))
    await second.folder_of(found(store, "b"))
    assert (names_in(tmp_path, "first"), names_in(tmp_path, "second")) == ("", "b")


async def test_an_adapter_larger_than_the_bound_is_told(store: Store, tmp_path: Path) -> None:
    message = f"it has {SIZE / GIB:.3g} GiB, and router.cache_max_gib is"
    with pytest.raises(LoadError, match=message):
        await cache_of(store, tmp_path, max_bytes=1000).folder_of(found(store))
    assert in_place(tmp_path) == []


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["fetch", "hold", "let go"]), st.sampled_from("abcde")),
        max_size=25,
    )
)
async def test_the_bound_holds_at_every_step(
    steps: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("steps")
    store = write_many(tmp_path, "abcde")
    bound = 3 * SIZE + 100
    cache = cache_of(store, tmp_path, max_bytes=bound)
    held: list[str] = []
    here: set[str] = set()
    for what, name in steps:
        adapter = found(store, name)
        if what == "hold":
            cache.hold(name, adapter.version)
            held.append(name)
        elif what == "let go" and name in held:
            cache.let_go(name, adapter.version)
            held.remove(name)
        elif what == "fetch":
            if len(here & set(held)) == 3 and name not in here:
                with pytest.raises(LoadError, match="no room on disk"):
                    await cache.folder_of(adapter)
            else:
                assert (await cache.folder_of(adapter)).is_dir()
        before, here = here, set(names_in(tmp_path))
        assert before & set(held) <= here, "what is held stays"
        assert len(here) * SIZE <= bound
