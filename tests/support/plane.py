"""The data plane in one process, between raw sockets: a test writes what clients and workers send.

The front end, the router, its fleet and the upstream pools are the real ones; only the model's store
and the workers' management are made up. After a test all must have been given back: see `settled`.
"""

import asyncio
import functools
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, ParamSpec, cast

import h11
import uvloop

from router.adapters.store import is_name
from router.config import RouterConfig
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, AdapterUse, LoadError, Outcome
from router.core.policies import POLICIES
from router.core.quotas import Quotas
from router.core.router import Router
from router.frontend.admin_key import AdminKey
from router.frontend.auth import Keys
from router.frontend.connection import ClientConnection
from router.frontend.models import Models
from router.frontend.service import Frontend
from router.lifecycle.words import Lifecycle
from router.model import ModelService
from router.part import bound
from router.telemetry.metrics import Metrics
from router.workers.client import WorkerClient
from router.workers.upstream import Upstream, UpstreamPool

P = ParamSpec("P")
Test = Callable[P, Coroutine[Any, Any, None]]
LIMIT_S = 15.0  # of a test
PATIENCE_S = 10.0  # for what is to come at once
MODEL = "base"
ADMIN_KEY = "operators-only"
BODY = b'{"model": "base"}'


def post(body: bytes = BODY, *lines: bytes, path: bytes = b"/v1/completions") -> bytes:
    """A plain request, whole."""
    head = [b"POST %b HTTP/1.1" % path, b"host: router", b"content-length: %d" % len(body), *lines]
    return b"\r\n".join((*head, b"", body))


def answer(body: bytes = b"{}", *lines: bytes, status: bytes = b"200 OK") -> bytes:
    """A plain answer, whole."""
    head = [b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *lines]
    return b"\r\n".join((*head, b"", body))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop run until it holds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_S
    turns = 0
    while not condition():
        assert loop.time() < end, f"it never came to this: {what or condition}"
        turns += 1
        await asyncio.sleep(0 if turns < 100 else 0.001)


class Peer:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readexactly(size)

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(mark)

    async def rest(self) -> bytes:
        """All that comes until the end of the connection; a reset is an end too."""
        got = b""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while data := await self.reader.read(1 << 16):
                    got += data
            except ConnectionError:
                pass
        return got

    async def gone(self) -> None:
        """Return when the other side is gone, however long that takes."""
        while await self.reader.read(1 << 16):
            pass

    async def was_reset(self) -> bool:
        """Whether the connection ends with a reset, whatever comes before."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while await self.reader.read(1 << 16):
                    pass
            except ConnectionResetError:
                return True
        return False

    async def closed(self) -> None:
        """Return when the other side has closed the connection, and sent nothing before."""
        assert await self.rest() == b""

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


class Client(Peer):
    """A client; reads answers as h11 does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self._rest = b""

    def stop_reading(self) -> None:
        cast("asyncio.Transport", self.writer.transport).pause_reading()

    def read_on(self) -> None:
        cast("asyncio.Transport", self.writer.transport).resume_reading()

    async def reply(self, method: str = "POST") -> "Reply":
        """The next answer, which must be there to its end."""
        h11_client = h11.Connection(h11.CLIENT)
        h11_client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        h11_client.send(h11.EndOfMessage())
        raw = b""
        body = b""
        head: h11.Response | None = None
        if self._rest:
            raw = self._rest
            h11_client.receive_data(self._rest)
            self._rest = b""
        while True:
            event = h11_client.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(PATIENCE_S):
                    data = await self.reader.read(1 << 16)
                raw += data
                h11_client.receive_data(data)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
        trailing, _ = h11_client.trailing_data
        self._rest = bytes(trailing)
        assert head is not None
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return Reply(head.status_code, headers, body, raw[: len(raw) - len(trailing)])


class Reply:
    """An answer as a client reads it. `raw` is what came."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, raw: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.raw = raw


class Asked:
    """A request as it reached a worker, read by h11: exactly one."""

    def __init__(self, head: h11.Request, body: bytes) -> None:
        self.method = head.method.decode()
        self.target = head.target.decode()
        self.headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        self.body = body

    def values(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given == name]


class WorkerSide(Peer):
    """A worker's end of one connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        super().__init__(reader, writer)
        self.number = number

    async def asked(self) -> Asked:
        """The next request. Raises `EOFError` where there is none."""
        server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = server.next_event()
            if event is h11.NEED_DATA:
                data = await self.reader.read(1 << 16)
                if not data:
                    raise EOFError
                server.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
        trailing, _ = server.trailing_data
        assert trailing == b"", f"a worker was sent more than one request: {trailing[:200]!r}"
        assert head is not None
        return Asked(head, bytes(body))


Script = Callable[[WorkerSide], Awaitable[None]]


def always(*pieces: bytes, close: bool = False) -> Script:
    """Answer each request so; then close the connection, if asked to."""

    async def script(side: WorkerSide) -> None:
        while True:
            await side.asked()
            for piece in pieces:
                side.send(piece)
                await side.writer.drain()
            if close:
                return

    return script


class ScriptedWorker:
    """A server that does on each connection what its script says, and closes it at the end of that."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.sides: list[WorkerSide] = []
        self.faults: list[BaseException] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, unix: Path | None = None) -> None:
        if unix is not None:
            self._server = await asyncio.start_unix_server(self._connected, unix)
            self.address = f"unix:{unix}"
            return
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = WorkerSide(reader, writer, len(self.sides))
        self.sides.append(side)
        self._tasks.append(asyncio.get_running_loop().create_task(self._play(side)))

    async def _play(self, side: WorkerSide) -> None:
        try:
            await self.script(side)
        except (EOFError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001  (told at the end of the test)
            self.faults.append(error)
        finally:
            side.writer.close()

    async def side(self, number: int = 0) -> WorkerSide:
        """The connection of that number, once it is there."""
        await until(lambda: len(self.sides) > number, f"worker's connection {number}")
        return self.sides[number]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert not self.faults, self.faults


class Link:
    """What the router has of a worker: `WorkerClient`."""

    def __init__(self, address: str) -> None:
        self.upstreams = UpstreamPool(address, "secret", "r0")
        self.names = ""  # what this worker calls an adapter's version, as a format

    def model_for(self, adapter: AdapterRef) -> str:
        return self.names.format(adapter.model_id, adapter.version)


class MadeUpPool:
    """Loads nothing, at once; or when it is told to."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self.gate: asyncio.Event | None = None
        self.loads: list[tuple[str, str]] = []
        self.fails: LoadError | None = None

    def client(self, worker_id: str) -> WorkerClient | None:
        return cast("WorkerClient | None", self.links.get(worker_id))

    def staged(self, adapter: AdapterRef) -> bool:
        return True

    async def fetch(self, adapter: AdapterRef) -> None:
        pass

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        self.loads.append((worker.id, adapter.name))
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return len(self.loads)

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        raise AssertionError


class MadeUpModel:
    """`ModelService` without a store: every name that may be an adapter's is one, but those `absent`.

    `lookups` are the names that were asked for.
    """

    def __init__(self, pool: MadeUpPool, router: Router) -> None:
        self.model_id = MODEL
        self.pool = pool
        self.router = router
        self.catalog = None
        self.endings: list[tuple[AdapterRef | None, AdapterUse | None, bool]] = []
        self.ready = True
        self.lifecycle: Lifecycle | None = None
        self.llm = SimpleNamespace(model_loading_config=SimpleNamespace(source="made-up"))
        self.absent: set[str] = set()
        self.lookups: list[str] = []
        self.instead: AdapterRef | None = None  # of a version that cannot be loaded

    async def find(self, name: str, user: str = "", *, afresh: bool = False) -> AdapterRef | None:
        self.lookups.append(name)
        name, _, version = name.partition("@")
        if name in self.absent or not is_name(name) or (version and afresh):
            return None
        return AdapterRef(MODEL, name, version or "sha256:1")

    async def instead_of(self, adapter: AdapterRef, why: str) -> AdapterRef | None:
        return self.instead

    def ended(self, adapter: AdapterRef | None, use: AdapterUse | None, *, failed: bool) -> None:
        self.endings.append((adapter, use, failed))


class Plane:
    """One front end, and its workers."""

    def __init__(
        self,
        config: RouterConfig,
        max_ongoing: int,
        keys: list[str],
        lifecycle: Lifecycle | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.pool = MadeUpPool()
        self.quotas = Quotas(config.quotas, asyncio.get_running_loop().time())
        self.router = Router(
            Fleet(MODEL),
            POLICIES["affinity"](Random(0)),
            self.pool,
            max_queued=config.max_queued_requests,
            quotas=self.quotas,
        )
        self.router.set_observer(self.metrics.watch(MODEL, self.router))
        self.model = MadeUpModel(self.pool, self.router)
        self.model.lifecycle = lifecycle
        model = cast("ModelService", self.model)
        self.keys = Keys(keys, anyone=not keys)
        admin_key = AdminKey([ADMIN_KEY]) if lifecycle is not None else None
        self.frontend = Frontend(Models([model]), config, self.metrics, self.keys, None, admin_key)
        self.workers: list[ScriptedWorker] = []
        self.clients: list[Client] = []
        self.port = 0
        self._max_ongoing = max_ongoing
        self._before = asyncio.all_tasks()
        self._listener: socket.socket | None = None

    async def start(self, scripts: tuple[Script, ...], unix: Path | None) -> None:
        for script in scripts:
            worker = ScriptedWorker(script)
            name = f"w{len(self.workers)}"
            await worker.start(None if unix is None else unix / name)
            self.workers.append(worker)
            self.pool.links[name] = Link(worker.address)
            self.router.add_worker(Worker(name, max_ongoing=self._max_ongoing, slots=2))
        self._listener = bound("127.0.0.1", 0, shared=False)
        self.port = self._listener.getsockname()[1]
        await self.frontend.start(self._listener)

    async def client(self, receive_buffer: int | None = None) -> Client:
        """A connection to the front end; about `receive_buffer` bytes of it are the kernel's."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            assert self._listener is not None
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, receive_buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        limit = 1 << 16 if receive_buffer is None else receive_buffer
        client = Client(*await asyncio.open_connection(sock=sock, limit=limit))
        self.clients.append(client)
        return client

    async def ask(self, request: bytes = b"") -> Reply:
        """What one request is answered, on a connection of its own."""
        client = await self.client()
        client.send(request or post())
        reply = await client.reply()
        client.close()
        return reply

    def connection(self) -> ClientConnection:
        """The one connection of a client there is, from the router's side."""
        (connection,) = self.frontend.connections
        return connection

    def upstreams(self) -> list[Upstream]:
        """The router's connections to workers that are open."""
        return [
            upstream
            for link in self.pool.links.values()
            for upstream in link.upstreams._connections
        ]

    def upstream(self) -> Upstream:
        """The only one."""
        (upstream,) = self.upstreams()
        return upstream

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.router.fleet)

    def outcomes(self) -> dict[str, int]:
        """How the requests ended that named the model."""
        found = {}
        for outcome in Outcome:
            labels = {"model": MODEL, "outcome": outcome.value}
            count = self.metrics.registry.get_sample_value("lorayard_requests_total", labels)
            if count:
                found[outcome.value] = int(count)
        return found

    def retries(self) -> int:
        value = self.metrics.registry.get_sample_value("lorayard_retries_total", {"model": MODEL})
        return int(value or 0)

    async def settled(self, outcomes: dict[str, int] | None = None) -> None:
        """All requests are over and counted, and nothing is held for them any more."""
        await until(lambda: self.in_flight == 0 and self.router.queued == 0, "leases released")
        await until(lambda: self.frontend.in_flight == 0, "requests over")
        for link in self.pool.links.values():
            pool = link.upstreams
            await until(
                lambda pool=pool: pool._connections.keys() == pool._idle.keys(),  # type: ignore[misc]
                "no worker's connection in use",
            )
        if outcomes is not None:
            assert self.outcomes() == outcomes

    async def stop(self) -> None:
        for client in self.clients:
            client.close()
        await until(lambda: not self.frontend.connections, "no client's connection left")
        await self.settled()
        for link in self.pool.links.values():
            link.upstreams.close()
        await self.frontend.aclose()
        await self.router.aclose()
        for worker in self.workers:
            await worker.stop()
        if self._listener is not None:
            self._listener.close()
        await until(lambda: not self.upstreams(), "no worker's connection left")
        await until(lambda: asyncio.all_tasks() == self._before, "no task left")


@asynccontextmanager
async def plane(
    *scripts: Script,
    max_ongoing: int = 64,
    unix: Path | None = None,
    keys: list[str] | None = None,
    lifecycle: Lifecycle | None = None,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[Plane]:
    """A data plane before a worker for each script; `settings` are of `RouterConfig`.

    With a `lifecycle` it is administered, with `ADMIN_KEY`.
    """
    made = Plane(RouterConfig(**settings), max_ongoing, keys or [], lifecycle)
    await made.start(scripts, unix)
    try:
        yield made
    finally:
        await made.stop()


class ShiftedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock a test may put forward."""

    shift_s = 0.0

    def time(self) -> float:
        return super().time() + self.shift_s

    def forward(self, seconds: float) -> None:
        self.shift_s += seconds


def forward(seconds: float) -> None:
    """Put the clock of a test `on_a_clock_that_jumps` forward."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ShiftedLoop)
    loop.forward(seconds)


def on_uvloop(test: Test[P]) -> Callable[P, None]:
    """Run a test as production runs."""
    return _on(uvloop.new_event_loop, test)


def on_asyncio(test: Test[P]) -> Callable[P, None]:
    """Run a test on asyncio's own loop."""
    return _on(asyncio.SelectorEventLoop, test)


def on_a_clock_that_jumps(test: Test[P]) -> Callable[P, None]:
    """Run a test on asyncio's loop, with `forward`."""
    return _on(ShiftedLoop, test)


def _on(new_loop: Callable[[], asyncio.AbstractEventLoop], test: Test[P]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        # Not by asyncio.run, nor as the thread's loop: see apart.py.
        loop = new_loop()
        task = loop.create_task(test(*args, **kwargs))
        # By another clock than the loop's, which may jump.
        limit = threading.Timer(LIMIT_S, loop.call_soon_threadsafe, (task.cancel,))
        limit.start()
        try:
            loop.run_until_complete(task)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            limit.cancel()
            loop.close()

    return run
