"""A server of the admin routes over lifecycles that are made up, in a thread of its own.

It stands in for the adapters and workers alone: the routes, the key, the middleware and HTTP are real.
"""

import asyncio
import http.client
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from router.frontend.admin import BODY_MAX_BYTES, Administration
from router.frontend.admin_key import AdminKey
from router.frontend.stamp import stamped
from router.lifecycle.words import (
    AdapterStatus,
    Change,
    LifecycleError,
    Problem,
    Residence,
    VersionState,
    VersionStatus,
    WorkerStatus,
)

KEY = "operators-only"
STORE = "s3://bucket/adapters"
SERVING, NEXT = "1111111111111111", "2222222222222222"


def adapter(model_id: str, name: str, **changes: Any) -> AdapterStatus:  # noqa: ANN401
    """What is told of an adapter that is in the store, and was never asked for."""
    plain = AdapterStatus(
        id=f"{model_id}:{name}",
        name=name,
        version=SERVING,
        tier="store",
        rank=None,
        bytes=8_400_000,
        source=STORE,
        pinned=False,
        hits=0,
        cold_loads=0,
        requests=0,
        last_used_s=None,
        versions=(),
    )
    return msgspec.structs.replace(plain, **changes)


class StandIn:
    """A `Lifecycle` that does as it says, at once, or when `gate` is set."""

    def __init__(self, model_id: str, names: Sequence[str] = ("sql", "tone")) -> None:
        self.model_id = model_id
        self.adapters = {name: adapter(model_id, name) for name in sorted(names)}
        self.draining: dict[str, bool] = {f"{model_id}-{number}": False for number in range(2)}
        self.gate: asyncio.Event | None = None
        self.waiting = threading.Event()
        self.fails: Exception | None = None
        self.log: list[tuple[Any, ...]] = []

    def list(
        self, prefix: str = "", *, after: str = "", limit: int | None = None
    ) -> Sequence[AdapterStatus]:
        names = list(self.adapters)
        found = [name for name in names[bisect_right(names, after) :] if name.startswith(prefix)]
        return [self.adapters[name] for name in found[:limit]]

    def show(self, name: str) -> AdapterStatus | None:
        return self.adapters.get(name)

    async def _begin(self, *what: Any) -> AdapterStatus:  # noqa: ANN401
        self.log.append(what)
        if self.gate is not None:
            self.waiting.set()
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        status = self.adapters.get(what[1])
        if status is None:
            raise LifecycleError(
                "unknown", f"no adapter {self.model_id}:{what[1]}; `list` shows them"
            )
        return status

    def _becomes(self, status: AdapterStatus, message: str, **changes: Any) -> Change:  # noqa: ANN401
        changed = msgspec.structs.replace(status, message=message, **changes)
        self.adapters = dict(sorted({**self.adapters, status.name: changed}.items()))
        return Change(status.id, message)

    async def load(self, name: str, *, workers: int | None = None) -> Change:
        status = await self._begin("load", name, workers)
        places = dict.fromkeys(list(self.draining)[: workers or 1], Residence.RESIDENT)
        version = VersionStatus(status.version, VersionState.SERVING, 1.0, True, 3, 0, places)
        self._becomes(status, "loaded", tier="gpu", rank=16, versions=(version,))
        return Change(status.id, f"{status.version} is there", dict.fromkeys(places, "resident"))

    async def unload(self, name: str) -> Change:
        status = await self._begin("unload", name)
        return self._becomes(status, "leaves where it is idle", tier="disk", versions=())

    async def warm(self, name: str) -> Change:
        status = await self._begin("warm", name)
        return self._becomes(status, "on this host's disk", tier="disk")

    async def pin(self, name: str, *, pinned: bool) -> Change:
        status = await self._begin("pin", name, pinned)
        return self._becomes(status, "pinned" if pinned else "not pinned", pinned=pinned)

    async def refresh(self, name: str | None = None) -> Change:
        if name is None:
            self.log.append(("refresh", None))
            if self.fails is not None:
                raise self.fails
            return Change(self.model_id, f"{len(self.adapters)} adapters are in the store")
        status = await self._begin("refresh", name)
        return Change(status.id, f"{status.version} serves")

    async def rollout(self, name: str, version: str, weight: float) -> Change:
        status = await self._begin("rollout", name, version, weight)
        if version != NEXT:
            raise LifecycleError("conflict", f"{status.id} has no version `{version}`")
        trial = (
            VersionStatus(status.version, VersionState.SERVING, 1.0 - weight, True, 9, 0, {}),
            VersionStatus(version, VersionState.CANDIDATE, weight, True, 1, 0, {}),
        )
        return self._becomes(status, f"{version} gets {weight:.0%}", versions=trial)

    async def promote(self, name: str, version: str | None = None) -> Change:
        status = await self._begin("promote", name, version)
        chosen = version or next(
            (one.version for one in status.versions if one.state is VersionState.CANDIDATE), None
        )
        if chosen is None:
            raise LifecycleError("conflict", f"{status.id} has no candidate")
        return self._becomes(status, f"{chosen} serves all", version=chosen, versions=())

    async def rollback(self, name: str) -> Change:
        status = await self._begin("rollback", name)
        return self._becomes(status, f"{SERVING} serves all", version=SERVING, versions=())

    async def register(self, name: str, source: str) -> Change:
        self.log.append(("register", name, source))
        if self.fails is not None:
            raise self.fails
        return self._becomes(adapter(self.model_id, name), "registered", source=source)

    async def unregister(self, name: str) -> Change:
        status = await self._begin("unregister", name)
        if status.source == STORE:
            raise LifecycleError("conflict", f"{status.id} has no place of its own")
        del self.adapters[name]
        return Change(status.id, "no longer served")

    def workers(self) -> Sequence[WorkerStatus]:
        ids = tuple(status.id for status in self.adapters.values() if status.tier == "gpu")
        return [
            WorkerStatus(worker, not draining, draining, 3, 64, 16, ids)
            for worker, draining in self.draining.items()
        ]

    async def drain(self, worker_id: str, *, draining: bool) -> Change:
        self.log.append(("drain", worker_id, draining))
        self.draining[worker_id] = draining
        return Change(worker_id, "gets nothing new" if draining else "gets work again")

    def fail(self, kind: Problem, message: str) -> None:
        self.fails = LifecycleError(kind, message)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


@dataclass
class Administered:
    """The server. `lifecycles` are what it administers."""

    lifecycles: list[StandIn]
    port: int = 0
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    administration: Administration | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,  # noqa: ANN401
        *,
        key: str | None = KEY,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """One request, whose body is JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"x-request-id": "r-1", **(headers or {})}
        if key is not None:
            given["authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, sent, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.ask("GET", f"/admin/v1{path}")

    def post(self, path: str, body: Any = None) -> Reply:  # noqa: ANN401
        return self.ask("POST", f"/admin/v1{path}", body)

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        administration = Administration(self.lifecycles, AdminKey([KEY]))
        self.administration = administration
        app = web.Application(
            middlewares=[stamped(administration.admit, BODY_MAX_BYTES)],
            client_max_size=2 * BODY_MAX_BYTES,
        )
        app.add_routes(administration.routes())
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, max_line_size=2 * BODY_MAX_BYTES
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        await administration.aclose()
        await runner.cleanup()


@contextmanager
def administered(*lifecycles: StandIn) -> Iterator[Administered]:
    """A server over these, or over one base model with two adapters."""
    server = Administered(list(lifecycles) or [StandIn("org/base")])
    ready, stop = threading.Event(), asyncio.Event()

    def run() -> None:
        try:
            server.loop.run_until_complete(server.serve(ready, stop))
            server.loop.run_until_complete(server.loop.shutdown_asyncgens())
        finally:
            server.loop.close()

    thread = threading.Thread(target=run, name="administered")
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        server.loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
