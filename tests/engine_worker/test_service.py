"""The worker's routes, less HTTP, over an engine that remembers what it was asked."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adapter_files import write_adapter
from apart import run_apart

from engine_worker.protocol import (
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    State,
    UnloadRequest,
    WireError,
)
from engine_worker.service import StateFeed, Tiers, WorkerError, WorkerService


class Engine:
    def __init__(self) -> None:
        self.held: dict[AdapterId, str] = {}
        self.adding = 0
        self.adding_peak = 0
        self.calls = 0
        self.fail = False
        self.removing = 0
        self.may_remove: asyncio.Event | None = None
        self.telling = 0  # of a removal alone
        self.may_tell: asyncio.Event | None = None

    async def add(self, adapter: AdapterId, path: str, evict: Sequence[AdapterId]) -> Tiers | None:
        self.calls += 1
        self.adding += 1
        self.adding_peak = max(self.adding_peak, self.adding)
        await asyncio.sleep(0)
        self.adding -= 1
        if self.fail:
            raise WorkerError(400, "bad weights")
        self.held[adapter] = path
        for victim in evict:
            self.held.pop(victim, None)
        may_tell, self.may_tell = self.may_tell, None
        try:
            return await self.residency()
        except RuntimeError:
            return None
        finally:
            self.may_tell = may_tell

    async def remove(self, adapter: AdapterId) -> None:
        self.removing += 1
        if self.may_remove is not None:
            await self.may_remove.wait()
        self.removing -= 1
        if self.fail:
            raise WorkerError(500, "the engine is dead")
        self.held.pop(adapter, None)

    async def residency(self) -> Tiers:
        held = tuple(self.held)
        if self.may_tell is not None:
            self.telling += 1
            await self.may_tell.wait()
        return held, ()


class Bench:
    def __init__(self, *, token: str | None = None, max_loras: int = 4) -> None:
        self.engine = Engine()
        self.feed = StateFeed()
        info = Info("test", "1", "base", max_loras, 16, 1)
        self.service = WorkerService(self.engine, info, self.feed, token=token)

    async def load(self, name: str, path: Path, version: str = "1", *evict: AdapterId) -> LoadReply:
        request = LoadRequest(AdapterId(name, version), str(path), evict)
        body = await self.service.load(msgspec.json.encode(request))
        return msgspec.json.decode(body, type=LoadReply)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a")


async def test_a_load_is_idempotent_and_its_number_is_in_the_state(adapter: Path) -> None:
    bench = Bench()
    first = await bench.load("base:a", adapter)
    again = await bench.load("base:a", adapter)
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]
    assert again.seq >= first.seq
    assert bench.feed.state.seq == again.seq
    assert bench.feed.state.gpu == (AdapterId("base:a", "1"),)


async def test_several_load_at_once_but_one_name_once(adapter: Path) -> None:
    bench = Bench()
    await asyncio.gather(
        *(bench.load(f"base:{name}", adapter) for name in "abc"),
        *(bench.load("base:a", adapter) for _ in range(5)),
    )
    assert len(bench.engine.held) == 3
    assert bench.engine.adding_peak == 3, "one at a time a name, names at once"
    assert bench.service._locks == {}


async def test_a_failed_load_drops_nothing(adapter: Path) -> None:
    bench = Bench()
    await bench.load("base:a", adapter)
    bench.engine.fail = True
    with pytest.raises(WorkerError, match="bad weights"):
        await bench.load("base:b", adapter, "1", AdapterId("base:a", "1"))
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]
    with pytest.raises(WorkerError, match=r"no adapter_config\.json"):
        await bench.load("base:b", adapter.parent)


async def test_an_engine_that_does_not_say_what_it_holds_undoes_no_load(adapter: Path) -> None:
    bench = Bench()

    async def silent() -> tuple[tuple[AdapterId, ...], tuple[AdapterId, ...]]:
        raise RuntimeError("no answer")

    bench.engine.residency = silent  # type: ignore[method-assign]
    reply = await bench.load("base:a", adapter)
    assert reply.seq == bench.feed.state.seq
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]


async def test_an_eviction_after_a_load_and_an_unload(adapter: Path) -> None:
    bench = Bench()
    await bench.load("base:a", adapter)
    await bench.load("base:b", adapter, "1", AdapterId("base:a", "1"))
    assert list(bench.engine.held) == [AdapterId("base:b", "1")]
    await bench.load("base:a", adapter)
    assert len(bench.engine.held) == 2, "what was evicted is loaded again"
    for _ in range(2):
        body = msgspec.json.encode(UnloadRequest(AdapterId("base:b", "1")))
        await bench.service.unload(body)
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]


BAD = [
    b"",
    b"{}",
    b'{"adapter": {"name": "x"}, "path": 3}',
    b'{"adapter": {"name": "x"}, "pth": ""}',
]


@pytest.mark.parametrize("body", BAD)
async def test_a_body_that_is_no_request_is_400(body: bytes) -> None:
    with pytest.raises(WorkerError, match="not a LoadRequest") as error:
        await Bench().service.load(body)
    assert error.value.status == 400
    assert msgspec.json.decode(error.value.body()).keys() == {"error"}, "a client may read it"


async def test_a_base_model_alone_loads_nothing(adapter: Path) -> None:
    with pytest.raises(WorkerError, match="without adapters"):
        await Bench(max_loras=0).load("base:a", adapter)


@pytest.mark.parametrize(
    ("token", "header", "accepted"),
    [
        (None, None, True),
        ("secret", "Bearer secret", True),
        ("secret", "Bearer wrong", False),
        ("secret", "secret", False),
        ("secret", None, False),
    ],
)
def test_the_token(token: str | None, header: str | None, accepted: bool) -> None:
    async def main() -> bool:
        return Bench(token=token).service.authorized(header)

    assert run_apart(main()) is accepted


async def test_the_state_is_pushed_at_every_change_and_while_busy() -> None:
    feed = StateFeed()
    lines = feed.lines()

    async def following() -> State:
        return msgspec.json.decode(await anext(lines), type=State)

    assert (await following()).running == 0
    feed.set_load(running=2, waiting=1, kv_usage=0.5)
    changed = await following()
    assert (changed.running, changed.waiting, changed.kv_usage) == (2, 1, 0.5)
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert await following() == changed, "a heartbeat"
    assert loop.time() - before < 1
    feed.set_adapters((AdapterId("base:a"),), ())
    assert (await following()).seq == 1
    feed.close()
    with pytest.raises(StopAsyncIteration):
        await anext(lines)


def headers(router: str, name: str) -> dict[str, str]:
    return {
        "x-lorayard-router": router,
        "x-lorayard-adapter": name,
        "x-lorayard-adapter-version": "1",
    }


async def load_for(bench: Bench, router: str, name: str, path: Path, **more: Any) -> LoadReply:  # noqa: ANN401
    request = LoadRequest(AdapterId(name, "1"), str(path), **more)
    body = await bench.service.load(msgspec.json.encode(request), router)
    return msgspec.json.decode(body, type=LoadReply)


async def test_two_routers_that_load_one_adapter_share_one_load(adapter: Path) -> None:
    bench = Bench()
    await asyncio.gather(*(load_for(bench, router, "base:a", adapter) for router in ("r0", "r1")))
    assert bench.engine.calls == 1


async def test_a_request_waits_for_the_load_that_another_router_began(adapter: Path) -> None:
    bench = Bench()
    loading = asyncio.create_task(load_for(bench, "r0", "base:a", adapter))
    while not bench.engine.adding:
        await asyncio.sleep(0)
    assert not bench.engine.held
    async with bench.service.admitted(headers("r1", "base:a")):
        assert list(bench.engine.held) == [AdapterId("base:a", "1")]
    await loading


async def test_a_refused_load_leaves_all_as_it_was_and_says_how_it_is(adapter: Path) -> None:
    bench = Bench(max_loras=1)
    await load_for(bench, "r0", "base:a", adapter)
    held = AdapterId("base:a", "1")
    async with bench.service.admitted(headers("r0", "base:a")):
        with pytest.raises(WorkerError) as error:
            await load_for(bench, "r1", "base:b", adapter, evict=(held,))
        assert error.value.status == 409
        answer = msgspec.json.decode(error.value.body(), type=WireError)
        assert answer.error.code == "no_slot"
        assert answer.state is not None
        assert (answer.state.gpu, answer.state.used, answer.state.others) == ((held,), (held,), 1)
        with pytest.raises(WorkerError):
            await load_for(bench, "r1", "base:b", adapter, evict=(held,), drain_s=0.01)
        assert list(bench.engine.held) == [held]
    await load_for(bench, "r1", "base:b", adapter, evict=(held,))
    assert list(bench.engine.held) == [AdapterId("base:b", "1")]


async def test_who_waited_too_long_evicts_when_the_requests_that_run_are_over(
    adapter: Path,
) -> None:
    bench = Bench(max_loras=1)
    await load_for(bench, "r0", "base:a", adapter)
    async with bench.service.admitted(headers("r0", "base:a")):
        patient = asyncio.create_task(
            load_for(bench, "r1", "base:b", adapter, evict=(AdapterId("base:a", "1"),), drain_s=60)
        )
        while not bench.service._arbiter.leaving:
            await asyncio.sleep(0)
        with pytest.raises(WorkerError) as error:
            async with bench.service.admitted(headers("r2", "base:a")):
                pass
        assert error.value.headers() == {"X-Lorayard-Refused": "adapter_gone"}
    await patient
    assert list(bench.engine.held) == [AdapterId("base:b", "1")]


async def unload_for(bench: Bench, router: str, name: str) -> LoadReply:
    body = await bench.service.unload(
        msgspec.json.encode(UnloadRequest(AdapterId(name, "1"))), router
    )
    return msgspec.json.decode(body, type=LoadReply)


async def test_what_another_router_uses_is_not_unloaded(adapter: Path) -> None:
    bench = Bench()
    held = AdapterId("base:a", "1")
    await load_for(bench, "r0", "base:a", adapter)
    with pytest.raises(WorkerError) as error:  # its request is on the way
        await unload_for(bench, "r1", "base:a")
    assert error.value.status == 409
    async with bench.service.admitted(headers("r0", "base:a")):
        with pytest.raises(WorkerError) as error:
            await unload_for(bench, "r1", "base:a")
        answer = msgspec.json.decode(error.value.body(), type=WireError)
        assert answer.error.code == "in_use"
        assert answer.state is not None
        assert (answer.state.gpu, answer.state.used) == ((held,), (held,))
        with pytest.raises(WorkerError):  # nor by hand
            await unload_for(bench, "", "base:a")
        assert list(bench.engine.held) == [held]
    reply = await unload_for(bench, "r1", "base:a")
    assert bench.engine.held == {}
    assert (bench.feed.state.gpu, bench.feed.state.seq) == ((), reply.seq)


async def test_what_is_being_unloaded_takes_no_request_and_its_slot_is_not_free(
    adapter: Path,
) -> None:
    bench = Bench(max_loras=1)
    bench.engine.may_remove = asyncio.Event()
    await load_for(bench, "r0", "base:a", adapter)
    unloading = asyncio.create_task(unload_for(bench, "r0", "base:a"))
    while not bench.engine.removing:
        await asyncio.sleep(0)
    told = msgspec.json.decode(bench.service.state("r1"), type=State)
    assert told.gpu == ()
    with pytest.raises(WorkerError) as error:
        async with bench.service.admitted(headers("r1", "base:a")):
            pass
    assert error.value.headers() == {"X-Lorayard-Refused": "adapter_gone"}
    with pytest.raises(WorkerError) as error:
        await load_for(bench, "r1", "base:b", adapter)
    assert error.value.status == 409
    again = asyncio.create_task(load_for(bench, "r1", "base:a", adapter))
    bench.engine.may_remove.set()
    await unloading
    await again
    assert bench.engine.calls == 2, "loaded again, once it had left"
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]


async def test_a_load_that_ends_while_an_unload_asks_what_is_held_is_not_lost(
    adapter: Path,
) -> None:
    bench = Bench()
    await load_for(bench, "r0", "base:a", adapter)
    bench.engine.may_tell = asyncio.Event()
    unloading = asyncio.create_task(unload_for(bench, "r0", "base:a"))
    while not bench.engine.telling:
        await asyncio.sleep(0)
    await load_for(bench, "r0", "base:b", adapter)
    bench.engine.may_tell.set()
    await unloading
    assert bench.feed.state.gpu == (AdapterId("base:b", "1"),)


async def test_an_unload_that_fails_leaves_it_held_and_in_use(adapter: Path) -> None:
    bench = Bench()
    await load_for(bench, "r0", "base:a", adapter)
    bench.engine.fail = True
    with pytest.raises(WorkerError, match="dead"):
        await unload_for(bench, "r0", "base:a")
    assert bench.feed.state.gpu == (AdapterId("base:a", "1"),)
    async with bench.service.admitted(headers("r1", "base:a")):
        pass
    bench.engine.fail = False
    for _ in range(2):  # idempotent
        await unload_for(bench, "r0", "base:a")
    assert not bench.engine.held
    assert not msgspec.json.decode(bench.service.state(), type=State).gpu


async def test_an_unload_waits_for_the_load_that_evicts_the_same(adapter: Path) -> None:
    bench = Bench(max_loras=1)
    await load_for(bench, "r0", "base:a", adapter)
    async with bench.service.admitted(headers("r0", "base:a")):
        loading = asyncio.create_task(
            load_for(bench, "r0", "base:b", adapter, evict=(AdapterId("base:a", "1"),), drain_s=60)
        )
        while not bench.service._arbiter.leaving:
            await asyncio.sleep(0)
        unloading = asyncio.create_task(unload_for(bench, "r0", "base:a"))
        await asyncio.sleep(0)
        assert not unloading.done()
    await loading
    await unloading
    assert list(bench.engine.held) == [AdapterId("base:b", "1")]


async def test_an_unload_waits_for_what_its_router_has_given_up_and_not_for_ever(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    await load_for(bench, "r0", "base:a", adapter)
    async with bench.service.admitted(headers("r0", "base:a")):
        unloading = asyncio.create_task(unload_for(bench, "r0", "base:a"))
        while not bench.service._arbiter.leaving:
            await asyncio.sleep(0)
        assert not bench.engine.removing
    await unloading
    assert not bench.engine.held
    await load_for(bench, "r0", "base:a", adapter)
    monkeypatch.setattr("engine_worker.service.LEFTOVER_S", 0.01)
    async with bench.service.admitted(headers("r0", "base:a")):
        with pytest.raises(WorkerError, match="still in use") as error:
            await unload_for(bench, "r0", "base:a")
        assert error.value.status == 409
        async with bench.service.admitted(headers("r1", "base:a")):
            pass  # it takes requests again
    assert list(bench.engine.held) == [AdapterId("base:a", "1")]
