"""Stock vLLM servers: what the router loads and unloads there, and what it notices of others' hands."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from adapter_files import write_adapter
from attached import MODEL, adapter_of, attached, use
from plane import until
from stock_server import StockServer, stock_server

from router.adapters.local import LocalStore
from router.adapters.store import StoredAdapter, StoreError
from router.core.job import AdapterRef, LoadError
from router.model import ModelService


class Bench:
    def __init__(self, server: StockServer, service: ModelService) -> None:
        self.server = server
        self.service = service
        self.router = service.router

    async def ref(self, name: str) -> AdapterRef:
        return await adapter_of(self.service, name)

    def holds(self, adapter: AdapterRef) -> bool:
        return bool(self.router.fleet.resident(adapter))

    async def polls(self, count: int = 2) -> None:
        """Until so many listings were begun from now on: the one before them was taken in."""
        wanted = self.server.listings + count
        await until(lambda: self.server.listings >= wanted, "it is asked what it holds")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write_adapter(tmp_path / "store" / name, seed=number)
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """As quick as a test should be."""
    monkeypatch.setattr("router.workers.stock.POLL_S", 0.02)


@asynccontextmanager
async def bench(tmp_path: Path, store: Path, *, slots: int = 2) -> AsyncIterator[Bench]:
    async with (
        stock_server(MODEL) as server,
        attached(tmp_path / "cache", store, [server.url], slots=slots) as service,
    ):
        yield Bench(server, service)


async def test_a_listing_that_fails_after_the_start_is_read_again(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, fails = threading.Event(), [True]
    listed = LocalStore.list

    def list_(self: LocalStore) -> dict[str, StoredAdapter]:
        if fails:
            failing.wait(20)
            fails.clear()
            raise StoreError("no answer")
        return listed(self)

    monkeypatch.setattr(LocalStore, "list", list_)
    monkeypatch.setattr("router.model.LISTING_GRACE_S", 0.01)
    async with bench(tmp_path, store) as made:
        catalog = made.service.catalog
        assert catalog is not None
        assert not catalog.names
        catalog._refresh_s = 0.01
        failing.set()
        await until(lambda: catalog.names == ["a", "b", "c"], "the listing is read")


def name_of(adapter: AdapterRef) -> str:
    return f"{adapter.model_id}@{adapter.version}"


async def test_each_version_is_loaded_under_its_own_name_from_its_own_folder(
    tmp_path: Path, store: Path
) -> None:
    async with bench(tmp_path, store) as made:
        old = await made.ref("a")
        await use(made.service, old)
        (old_folder,) = made.server.adapters.values()
        write_adapter(store / "a", seed=9)
        await made.service.lifecycle.refresh("a")
        new = await made.ref("a")
        assert new != old
        await use(made.service, new)
        await until(lambda: list(made.server.adapters) == [name_of(new)], "the old one has left")
        assert made.server.calls == [
            ("load", name_of(old)),
            ("load", name_of(new)),
            ("unload", name_of(old)),
        ], "the new one beside the old one, which leaves when it is idle"
        assert made.server.adapters[name_of(new)] != old_folder
        await made.polls()
        assert not made.holds(old)
        assert made.holds(new)


async def test_an_eviction_and_an_unload_drop_the_name(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store, slots=1) as made:
        a, b = [await made.ref(name) for name in "ab"]
        await use(made.service, a)
        await use(made.service, b)
        assert list(made.server.adapters) == [name_of(b)]
        assert {
            worker: done.result.value for worker, done in (await made.router.unload(b)).items()
        } == {f"{MODEL}-0": "unloaded"}
        assert made.server.adapters == {}
        await use(made.service, b)
        made.server.adapters.clear()  # somebody was quicker
        assert len(await made.router.unload(b)) == 1
        assert made.server.calls[-1] == ("unload", name_of(b))
        assert not made.holds(b)


async def test_an_unload_that_is_refused_leaves_it_held(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        a = await made.ref("a")
        await use(made.service, a)
        made.server.refuses_unloads = True
        done = (await made.router.unload(a))[f"{MODEL}-0"]
        assert (done.result.value, "the engine is busy" in done.message) == ("failed", True)
        assert made.holds(a)


async def test_what_somebody_changes_by_hand_is_noticed(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        a, b = [await made.ref(name) for name in "ab"]
        await use(made.service, a)
        del made.server.adapters[name_of(a)]
        await until(lambda: not made.holds(a), "unloaded by hand")
        made.server.adapters[name_of(b)] = "/somewhere"
        await until(lambda: made.holds(b), "loaded by hand, under its version's name")
        await use(made.service, b)
        assert made.server.calls == [("load", name_of(a))]


async def test_names_of_another_form_are_somebody_elses(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        others = ("tuned", "base:a", "other:a@1", "base:a/b@1", "base:@1")
        made.server.adapters.update(dict.fromkeys(others, "/theirs"))
        await made.polls()
        assert not list(made.router.fleet.get(f"{MODEL}-0").slots)  # type: ignore[union-attr]
        a, b = [await made.ref(name) for name in "ab"]
        for adapter in (a, b):
            await use(made.service, adapter)
        await made.polls()
        assert made.holds(a)
        assert made.holds(b)
        assert set(others) < set(made.server.adapters)


async def test_a_name_that_leads_to_another_folder_is_not_what_it_says(
    tmp_path: Path, store: Path
) -> None:
    async with bench(tmp_path, store) as made:
        a = await made.ref("a")
        await use(made.service, a)
        folder = made.server.adapters[name_of(a)]
        made.server.adapters[name_of(a)] = "/elsewhere"
        await until(lambda: not made.holds(a), "not held")
        await use(made.service, a)
        assert made.server.adapters[name_of(a)] == folder
        assert [what for what, _ in made.server.calls] == ["load", "load", "unload", "load"]


async def test_what_another_router_has_loaded_from_the_same_folder_is_loaded(
    tmp_path: Path, store: Path
) -> None:
    async with (
        stock_server(MODEL) as server,
        attached(tmp_path / "cache", store, [server.url]) as one,
        attached(tmp_path / "cache", store, [server.url]) as other,
    ):
        a = await adapter_of(one, "a")
        assert await adapter_of(other, "a") == a
        server.may_load.clear()
        both = asyncio.gather(*(use(service, a) for service in (one, other)))
        await until(lambda: len(server.calls) == 2, "both load it")
        server.may_load.set()
        await both
        assert [what for what, _ in server.calls] == ["load", "load"]


WHEN = [
    pytest.param(
        lambda made: made.server.may_tell, id="a listing of before the load comes after it"
    ),
    pytest.param(lambda made: made.server.may_load, id="a listing within the load"),
]


@pytest.mark.parametrize("held_up", WHEN)
async def test_a_listing_that_overlaps_a_load_loses_no_load(
    tmp_path: Path, store: Path, held_up: Callable[[Bench], asyncio.Event]
) -> None:
    async with bench(tmp_path, store) as made:
        a = await made.ref("a")
        gate = held_up(made)
        gate.clear()
        before = made.server.listings
        loading = asyncio.ensure_future(use(made.service, a))
        if gate is made.server.may_tell:
            await until(lambda: made.server.listings > before, "a listing is on its way")
            await loading
        else:
            await until(lambda: made.server.calls, "the load is on its way")
            await made.polls()
        gate.set()
        await loading
        await made.polls()
        assert made.holds(a)
        assert [what for what, _ in made.server.calls] == ["load"]


async def test_a_restart_within_one_poll_is_noticed_and_all_is_forgotten(
    tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path, store) as made:
        a = await made.ref("a")
        await use(made.service, a)
        before = made.router.fleet.get(f"{MODEL}-0")
        made.server.restart()
        await until(lambda: made.router.fleet.get(f"{MODEL}-0") is not before, "it is anew")
        await until(lambda: made.router.fleet.get(f"{MODEL}-0"), "attached again")
        assert "was started again" in caplog.text
        await use(made.service, a)
        assert [what for what, _ in made.server.calls] == ["load", "load"]


async def test_a_server_that_cannot_load_says_what_to_start_it_with(
    tmp_path: Path, store: Path
) -> None:
    async with bench(tmp_path, store) as made:
        made.server.updating = False
        with pytest.raises(LoadError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            await use(made.service, await made.ref("a"))


async def test_a_drain_outlives_a_restart(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        pool, worker_id = made.service.pool, f"{MODEL}-0"
        pool.drain(worker_id, draining=True)
        assert pool.draining == (worker_id,)
        before = made.router.fleet.get(worker_id)
        assert before is not None
        assert not before.accepting
        await made.polls()
        made.server.restart()
        await until(lambda: made.router.fleet.get(worker_id) not in {before, None}, "it is anew")
        assert made.router.fleet.ready == []
        assert pool.draining == (worker_id,)
        pool.drain(worker_id, draining=False)
        assert made.service.ready
        await use(made.service, await made.ref("a"))
