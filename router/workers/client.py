"""Speaking to one worker: one interface, here over our own engine workers (stock.py: over stock vLLM).

What manages a worker goes over aiohttp, clients' requests over its `UpstreamPool`. What goes wrong on
the way is translated here, once, into the core's words.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Protocol

import aiohttp
import msgspec

from engine_worker.protocol import (
    HEALTH,
    INFO,
    LOAD,
    ROUTER_HEADER,
    STATE,
    TOKEN_ENV,
    UNLOAD,
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    Refusal,
    State,
    UnloadRequest,
    WireError,
)
from router.core.job import AdapterRef, LoadError, LoadFault
from router.workers.upstream import CONNECT_TIMEOUT_S, UpstreamPool

CONTROL_TIMEOUT_S: Final = 10.0
LOAD_TIMEOUT_S: Final = 120.0
UNLOAD_TIMEOUT_S: Final = 30.0
STATE_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 600.0
LINE_MAX_BYTES: Final = 1 << 20
OK: Final = 200
BAD_REQUEST: Final = 400
NOT_FOUND: Final = 404
CONFLICT: Final = 409


class WorkerUnreachableError(Exception):
    """The worker does not answer, or answers what no worker does."""


class LoadConflictError(Exception):
    """A worker refuses a load, or an unload, because of another router. `state` is how things are."""

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

    async def unload(self, adapter: AdapterId) -> int:
        """Drop an adapter; the state's number. That it is not there is as good.

        Raises `LoadError`, and `LoadConflictError` where another router uses it.
        """

    def model_for(self, adapter: AdapterRef) -> str:
        """What a request for the adapter must call its model; empty where it goes on as it came."""

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

    async def unload(self, adapter: AdapterId) -> int:
        """Ask it to."""
        status, body = await post(
            self.session,
            self.url + UNLOAD,
            msgspec.json.encode(UnloadRequest(adapter)),
            self._worker_id,
            timeout_s=UNLOAD_TIMEOUT_S,
        )
        if status == OK:
            return msgspec.json.decode(body, type=LoadReply).seq
        if status == CONFLICT:
            raise _conflict(body, self._worker_id)
        raise refusal(status, body, self._worker_id)

    def model_for(self, adapter: AdapterRef) -> str:  # noqa: ARG002
        """As it came: a header names the version."""
        return ""

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


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    worker_id: str,
    *,
    timeout_s: float = LOAD_TIMEOUT_S,
) -> tuple[int, bytes]:
    """POST JSON; return status and body. Raises `LoadError` where the worker does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers, timeout=timeout) as answer:
            return answer.status, await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise LoadError(LoadFault.WORKER, f"worker {worker_id}: {describe(error)}") from None


def refusal(status: int, body: bytes, worker_id: str) -> LoadError:
    """A worker's refusal to load or unload: the adapter's fault if it says 400, else its own."""
    fault = LoadFault.ADAPTER_INVALID if status == BAD_REQUEST else LoadFault.WORKER
    return LoadError(fault, f"worker {worker_id}: {message_of(body)}")


def _conflict(body: bytes, worker_id: str) -> Exception:
    """A refusal that is nobody's fault, if it is one."""
    try:
        answer = msgspec.json.decode(body, type=WireError)
    except msgspec.DecodeError:
        answer = None
    if answer is None or answer.error.code not in {Refusal.NO_SLOT, Refusal.IN_USE}:
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
