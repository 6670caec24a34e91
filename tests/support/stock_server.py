"""A server that manages adapters as stock vLLM does (0.32: `OpenAIServingModels`), over real HTTP.

It stands where a test needs a moment that a real one does not hold still for: a listing that overlaps a
load, a restart within one poll, a hand that changes it. What it computes is of no interest here: an
answer says by which name and from which folder it would have been.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class StockServer:
    """One of them, that serves `model`; `adapters` are its registry: folders by name."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.url = ""
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.listings = 0
        self.started = 1000.0
        self.updating = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
        self.refuses_unloads = False
        # Closed, they hold up a load before it has an effect, and a listing after it was made.
        self.may_load = asyncio.Event()
        self.may_tell = asyncio.Event()
        self.may_load.set()
        self.may_tell.set()

    def restart(self) -> None:
        """Lose all that was loaded at run time, within a moment."""
        self.adapters.clear()
        self.started += 1.0

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
                web.post("/v1/completions", self._complete),
            ]
        )
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=f"process_start_time_seconds {self.started}\nvllm:num_requests_running 0.0\n"
        )

    async def _models(self, _: web.Request) -> web.Response:
        cards = [{"id": self.model, "object": "model", "root": "/model", "parent": None}]
        cards += [
            {"id": name, "object": "model", "root": path, "parent": self.model}
            for name, path in self.adapters.items()
        ]
        self.listings += 1
        await self.may_tell.wait()
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        if not self.updating:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        self.calls.append(("load", name))
        await self.may_load.wait()
        if name in self.adapters:
            return _error(
                400, f"The lora adapter '{name}' has already been loaded. If you want ..."
            )
        self.adapters[name] = path
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(("unload", name))
        if self.refuses_unloads:
            return _error(500, "the engine is busy")
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _complete(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        name = body["model"]
        if name != self.model and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        text = self.adapters.get(name, "/model")
        return web.json_response({"model": name, "choices": [{"index": 0, "text": text}]})


def _error(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "error", "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a port that the system chooses; its URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def stock_server(model: str) -> AsyncIterator[StockServer]:
    """A server that runs until the end of the block."""
    server = StockServer(model)
    async with served(server.application()) as url:
        server.url = url
        yield server
