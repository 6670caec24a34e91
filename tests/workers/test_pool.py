"""The pool over engine workers, here and over real HTTP: what is unloaded, by whom, and drains."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from adapter_files import write_adapter
from attached import MODEL, adapter_of, attached, use
from plane import until
from stock_server import served

from engine_worker.emulated_engine import EmulatedWorker
from engine_worker.options import WorkerOptions
from router.core.fleet import Hold, Worker
from router.core.job import AdapterRef, Job
from router.model import ModelService

WORKER = f"{MODEL}-0"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write_adapter(tmp_path / "store" / name, seed=number)
    return tmp_path / "store"


class Bench:
    """An emulated engine worker, and the routers that are attached to it."""

    def __init__(self, url: str, routers: list[ModelService]) -> None:
        self.url = url
        self.routers = routers

    async def ask(self, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        """As an operator does by hand."""
        method = "GET" if body is None else "POST"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{self.url}/worker/v1/{path}", json=body) as answer,
        ):
            return answer.status, await answer.json()

    async def held(self) -> list[str]:
        _, state = await self.ask("adapters")
        gpu = state["gpu"]
        assert isinstance(gpu, list)
        return [adapter["name"] for adapter in gpu]

    def worker(self, router: int = 0) -> Worker:
        found = self.routers[router].router.fleet.get(WORKER)
        assert found is not None
        return found


@asynccontextmanager
async def bench(tmp_path: Path, store: Path, *, routers: int = 1) -> AsyncIterator[Bench]:
    options = WorkerOptions(
        engine="emulated",
        model=MODEL,
        model_id=MODEL,
        engine_kwargs={"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
        calibration=None,
        token=None,
        drain_timeout_s=1.0,
    )
    engine = EmulatedWorker(options)
    async with served(engine.application()) as url, AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(attached(tmp_path / "cache", store, [url]))
            for _ in range(routers)
        ]
        try:
            yield Bench(url, services)
        finally:
            engine.close()


def holds(service: ModelService, adapter: AdapterRef) -> bool:
    return bool(service.router.fleet.resident(adapter))


async def test_a_retired_version_leaves_the_engine(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        [service] = made.routers
        a = await adapter_of(service, "a")
        async with service.router.lease(Job("1", a)):
            service.router.retire(a)
            assert await made.held() == [a.model_id]
        await until(lambda: not service.router.fleet.retired, "it has left")
        assert await made.held() == []
        await use(service, a)
        assert await made.held() == [a.model_id], "who asks for it by its digest has it"


async def test_what_another_router_uses_stays_until_it_does_no_more(
    tmp_path: Path, store: Path
) -> None:
    async with bench(tmp_path, store, routers=2) as made, aiohttp.ClientSession() as client:
        one, other = made.routers
        a = await adapter_of(one, "a")
        await use(one, a)
        await until(lambda: holds(other, a), "the other knows")
        link = other.pool.client(WORKER)
        assert link is not None
        headers = {"X-Lorayard-Router": "r1", "X-Lorayard-Adapter": a.model_id}
        body = {"model": a.model_id, "prompt": "Hi", "max_tokens": 4000, "stream": True}
        headers["X-Lorayard-Adapter-Version"] = a.version
        asked = await client.post(f"{made.url}/v1/completions", json=body, headers=headers)
        await asked.content.readany()
        [done] = (await one.router.unload(a)).values()
        assert done.result.value == "in_use"
        one.router.retire(a)
        assert await made.held() == [a.model_id]
        asked.close()
        await until(lambda: not holds(one, a) and not holds(other, a), "it has left for both")
        assert await made.held() == []


async def test_an_unload_is_told_by_each_worker(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        [service] = made.routers
        a = await adapter_of(service, "a")
        await use(service, a)
        done = await service.router.unload(a)
        assert {worker: one.result.value for worker, one in done.items()} == {WORKER: "unloaded"}
        assert await made.held() == []
        await use(service, a)
        assert await made.held() == [a.model_id]


async def test_what_is_changed_by_hand_shows_in_the_ledger(tmp_path: Path, store: Path) -> None:
    async with bench(tmp_path, store) as made:
        [service] = made.routers
        a, b = [await adapter_of(service, name) for name in "ab"]
        await use(service, a)
        named = {"name": a.model_id, "version": a.version}
        # What this router has loaded is kept for its request for a second.
        async with asyncio.timeout(10):
            while (await made.ask("unload", {"adapter": named}))[0] == 409:
                await asyncio.sleep(0.05)
        await until(lambda: not holds(service, a), "unloaded by hand")
        named = {"name": b.model_id, "version": b.version}
        status, _ = await made.ask("load", {"adapter": named, "path": str(store / "b")})
        assert status == 200
        await until(lambda: holds(service, b), "loaded by hand")
        await use(service, b)


async def test_an_operators_drain_outlives_a_worker_that_speaks_again(
    tmp_path: Path, store: Path
) -> None:
    async with bench(tmp_path, store) as made:
        [service] = made.routers
        router, worker = service.router, made.worker()
        service.pool.drain(WORKER, draining=True)
        router.hold(worker, Hold.SILENT, held=True)
        router.hold(worker, Hold.SILENT, held=False)  # as the pool does
        assert not service.ready
        assert not router.warm(worker, await adapter_of(service, "a"))
        service.pool.drain(WORKER, draining=False)
        assert service.ready
