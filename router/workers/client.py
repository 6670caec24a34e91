"""Speaking to one worker: our own engine workers and stock vLLM servers, behind one interface.

What manages a worker goes over aiohttp, clients' requests over its `UpstreamPool`. What goes wrong on
the way is translated here, once, into the core's words.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Protocol

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from engine_worker.protocol import (
    HEALTH,
    INFO,
    LOAD,
    ROUTER_HEADER,
    STATE,
    TOKEN_ENV,
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    Refusal,
    State,
    WireError,
)
from router.core.job import AdapterRef, LoadError, LoadFault
from router.workers.upstream import CONNECT_TIMEOUT_S, UpstreamPool

CONTROL_TIMEOUT_S: Final = 10.0
LOAD_TIMEOUT_S: Final = 120.0
STATE_TIMEOUT_S: Final = 5.0
POLL_S: Final = 1.0
KEEPALIVE_S: Final = 600.0
LINE_MAX_BYTES: Final = 1 << 20
METRICS: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
OK: Final = 200
BAD_REQUEST: Final = 400
NOT_FOUND: Final = 404
CONFLICT: Final = 409


class WorkerUnreachableError(Exception):
    """The worker does not answer, or answers what no worker does."""


class LoadConflictError(Exception):
    """A worker refuses a load because of another router. `state` is how things are there."""

    def __init__(self, message: str, state: State | None) -> None:
        super().__init__(message)
        self.state = state


class WorkerClient(Protocol):
    """One worker, from the router's side."""

    upstreams: UpstreamPool

    async def load(
        self, adapter: AdapterId, path: Path, evict: AdapterId | None, drain_s: float = 0.0
    ) -> int:
        """Make an adapter resident, then drop `evict`; the state's number.

        With `drain_s` it waits for so long until no router uses `evict`. Raises `LoadError`, and
        `LoadConflictError` where another router is in the way.
        """

    async def activate(self, adapter: AdapterRef) -> None:
        """Make sure that a request now gets this version of its adapter. Raises `LoadError`."""

    def states(self) -> AsyncIterator[State]:
        """Follow the worker's state for as long as it lives. Raises `WorkerUnreachableError`."""

    async def info(self) -> Info | None:
        """What the worker is now, None where it does not say. Raises `WorkerUnreachableError`."""

    async def close(self) -> None:
        """Close its connections."""


def open_session(
    address: str, token: str | None, router_id: str = ""
) -> tuple[aiohttp.ClientSession, str]:
    """A pool of connections to `http://host:port` or `unix:/path`, and the base URL to use in it."""
    headers = {ROUTER_HEADER: router_id} if router_id else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connector: aiohttp.BaseConnector
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
        url = "http://worker"
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        url = address.rstrip("/")
    session = aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        headers=headers,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
    )
    return session, url


async def is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the worker says that it can serve."""
    try:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
        async with session.get(url + HEALTH, timeout=timeout) as answer:
            return answer.status == OK
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def read_info(session: aiohttp.ClientSession, url: str) -> Info | None:
    """What the worker is; None for a server that knows no such route, as stock vLLM does.

    Raises `WorkerUnreachableError`.
    """
    try:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
        async with session.get(url + INFO, timeout=timeout) as answer:
            body = await answer.read()
            if answer.status == NOT_FOUND:
                return None
            if answer.status != OK:
                raise WorkerUnreachableError(
                    f"{url} answers {answer.status}: {message_of(body)}"
                    + (f" (set {TOKEN_ENV})" if answer.status in {401, 403} else "")
                )
            return msgspec.json.decode(body, type=Info)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise WorkerUnreachableError(f"{url}: {describe(error)}") from None
    except msgspec.DecodeError:
        return None


async def served_models(session: aiohttp.ClientSession, url: str) -> list[str]:
    """The ids that an OpenAI-compatible server lists. Raises `WorkerUnreachableError`."""
    try:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
        async with session.get(f"{url}/v1/models", timeout=timeout) as answer:
            body = await answer.read()
            if answer.status != OK:
                raise WorkerUnreachableError(
                    f"{url}/v1/models answers {answer.status}: {message_of(body)}"
                )
            listed = msgspec.json.decode(body)
            return [str(entry["id"]) for entry in listed["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise WorkerUnreachableError(f"{url}: {describe(error)}") from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise WorkerUnreachableError(f"{url}/v1/models does not answer as vLLM does") from None


class EngineWorkerClient:
    """One of our engine workers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        worker_id: str,
        upstreams: UpstreamPool,
    ) -> None:
        self.session = session
        self.url = url
        self.upstreams = upstreams
        self._worker_id = worker_id

    async def load(
        self, adapter: AdapterId, path: Path, evict: AdapterId | None, drain_s: float = 0.0
    ) -> int:
        """One call does both: the worker drops only when it has loaded."""
        request = LoadRequest(adapter, str(path), (evict,) if evict else (), drain_s)
        status, body = await post(
            self.session, self.url + LOAD, msgspec.json.encode(request), self._worker_id
        )
        if status == OK:
            return msgspec.json.decode(body, type=LoadReply).seq
        if status == CONFLICT:
            raise _conflict(body, self._worker_id)
        raise refusal(status, body, self._worker_id)

    async def activate(self, adapter: AdapterRef) -> None:
        """Nothing to do: each request names its version."""

    async def states(self) -> AsyncIterator[State]:
        """Read the pushed stream; silence for `STATE_TIMEOUT_S` is an end of it."""
        decode = msgspec.json.Decoder(State).decode
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STATE_TIMEOUT_S
        )
        try:
            async with self.session.get(
                self.url + STATE, timeout=timeout, read_bufsize=LINE_MAX_BYTES
            ) as answer:
                if answer.status != OK:
                    body = await answer.read()
                    raise WorkerUnreachableError(
                        f"{self._worker_id} answers {answer.status}: {message_of(body)}"
                    )
                async for line in answer.content:
                    yield decode(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise WorkerUnreachableError(f"{self._worker_id}: {describe(error)}") from None
        raise WorkerUnreachableError(f"{self._worker_id} has ended its state stream")

    async def info(self) -> Info | None:
        """Ask it."""
        return await read_info(self.session, self.url)

    async def close(self) -> None:
        """Close its connections."""
        self.upstreams.close()
        await self.session.close()


class StockVllmClient:
    """A stock vLLM server, its adapters managed over vLLM's own routes.

    It says nothing of what is resident, so the router's own ledger is all there is; and it reads the
    adapter's folder itself, so the router's cache must be on a file system that both see. It knows an
    adapter by its name alone: of two versions it serves the one that was loaded last, and a request
    for the other one loads that again first.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        worker_id: str,
        upstreams: UpstreamPool,
    ) -> None:
        self.session = session
        self.url = url
        self.upstreams = upstreams
        self._worker_id = worker_id
        self._loads = 0
        self._paths: dict[AdapterId, Path] = {}
        self._served: dict[str, AdapterId] = {}
        self._changing = asyncio.Lock()

    async def load(
        self,
        adapter: AdapterId,
        path: Path,
        evict: AdapterId | None,
        drain_s: float = 0.0,  # noqa: ARG002  (it knows of no other routers)
    ) -> int:
        """Load, instead of what may be there under that name, then unload the evicted."""
        async with self._changing:
            await self._serve(adapter, path)
            self._loads += 1
            if evict is not None:
                self._paths.pop(evict, None)
                if self._served.get(evict.name) == evict:
                    del self._served[evict.name]
                    await self._unload(evict.name)
            return self._loads

    async def activate(self, adapter: AdapterRef) -> None:
        """Load the version again if another one has taken its name since."""
        wanted = AdapterId(adapter.model_id, adapter.version)
        if self._served.get(wanted.name) == wanted or wanted not in self._paths:
            return
        async with self._changing:
            if self._served.get(wanted.name) != wanted:
                await self._serve(wanted, self._paths[wanted])

    async def _serve(self, adapter: AdapterId, path: Path) -> None:
        # Never in place: vLLM then reads the weights again at every step (0.32).
        status, answer = await self._post_load(adapter, path)
        if status == BAD_REQUEST and b"already been loaded" in answer:
            await self._unload(adapter.name)
            status, answer = await self._post_load(adapter, path)
        if status == NOT_FOUND and b"Not Found" in answer:
            raise LoadError(
                LoadFault.WORKER,
                f"worker {self._worker_id} cannot load adapters; start its vLLM with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
            )
        if status != OK:
            raise refusal(status, answer, self._worker_id)
        self._paths[adapter] = path
        self._served[adapter.name] = adapter

    async def _post_load(self, adapter: AdapterId, path: Path) -> tuple[int, bytes]:
        body = {"lora_name": adapter.name, "lora_path": str(path)}
        url = f"{self.url}/v1/load_lora_adapter"
        return await post(self.session, url, msgspec.json.encode(body), self._worker_id)

    async def _unload(self, name: str) -> None:
        # A 404 is as good: it is not there.
        url = f"{self.url}/v1/unload_lora_adapter"
        body = msgspec.json.encode({"lora_name": name})
        await post(self.session, url, body, self._worker_id)

    async def states(self) -> AsyncIterator[State]:
        """Nothing is pushed: read its metrics from time to time.

        They do not say what is resident; a number older than any load's tells the core so.
        """
        while True:
            if not await is_healthy(self.session, self.url):
                raise WorkerUnreachableError(f"{self._worker_id} is not healthy")
            yield await self._read_metrics()
            await asyncio.sleep(POLL_S)

    async def _read_metrics(self) -> State:
        values = dict.fromkeys(METRICS, 0.0)
        try:
            timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
            async with self.session.get(f"{self.url}/metrics", timeout=timeout) as answer:
                text = (await answer.read()).decode() if answer.status == OK else ""
            for family in text_string_to_metric_families(text):
                if family.name in values:
                    values[family.name] = sum(sample.value for sample in family.samples)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise WorkerUnreachableError(f"{self._worker_id}: {describe(error)}") from None
        running, waiting, kv_usage = values.values()
        return State(seq=-1, running=int(running), waiting=int(waiting), kv_usage=kv_usage)

    async def info(self) -> Info | None:
        """It has no such route."""
        return None

    async def close(self) -> None:
        """Close its connections."""
        self.upstreams.close()
        await self.session.close()


async def post(
    session: aiohttp.ClientSession, url: str, body: bytes, worker_id: str
) -> tuple[int, bytes]:
    """POST JSON; return status and body. Raises `LoadError` where the worker does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=LOAD_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers, timeout=timeout) as answer:
            return answer.status, await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise LoadError(LoadFault.WORKER, f"worker {worker_id}: {describe(error)}") from None


def refusal(status: int, body: bytes, worker_id: str) -> LoadError:
    """A worker's refusal to load: the adapter's fault if it says 400, else its own."""
    fault = LoadFault.ADAPTER_INVALID if status == BAD_REQUEST else LoadFault.WORKER
    return LoadError(fault, f"worker {worker_id}: {message_of(body)}")


def _conflict(body: bytes, worker_id: str) -> Exception:
    """A refusal that is nobody's fault, if it is one."""
    try:
        answer = msgspec.json.decode(body, type=WireError)
    except msgspec.DecodeError:
        answer = None
    if answer is None or answer.error.code != Refusal.NO_SLOT:
        return refusal(CONFLICT, body, worker_id)
    return LoadConflictError(f"worker {worker_id}: {answer.error.message}", answer.state)


def message_of(body: bytes) -> str:
    """The message of an error answer, ours or OpenAI's, or its first characters."""
    try:
        return msgspec.json.decode(body, type=WireError).error.message
    except msgspec.DecodeError:
        return body[:200].decode("utf-8", errors="replace") or "no body"


def describe(error: BaseException) -> str:
    """A foreign exception in a few words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
