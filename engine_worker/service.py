"""What every engine worker does alike, whatever its engine: loads one at a time a name, and state.

The engine proper is an `Engine`; the two web servers (vLLM's own application, and the emulated
engine's) only carry bytes to and from here.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import msgspec

from engine_worker.protocol import (
    BUSY_PERIOD_S,
    IDLE_PERIOD_S,
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    State,
    UnloadRequest,
    WireError,
    WireErrorBody,
)

RequestT = TypeVar("RequestT")
log = logging.getLogger("lorayard.worker")


class WorkerError(Exception):
    """An answer that is not 200. `status` as in protocol.py."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(WireError(WireErrorBody(str(self))))


# The adapters in slots, and those in host memory alone.
Tiers: TypeAlias = tuple[tuple[AdapterId, ...], tuple[AdapterId, ...]]


class Engine(Protocol):
    """An engine that holds adapters."""

    async def add(self, adapter: AdapterId, path: str, evict: Sequence[AdapterId]) -> Tiers | None:
        """Load an adapter, unless it is held, then drop `evict`.

        Returns where the adapters are after it, or None where the engine does not say. Raises
        `WorkerError`, having dropped nothing.
        """

    async def remove(self, adapter: AdapterId) -> None:
        """Drop an adapter; harmless where it is not held."""

    async def residency(self) -> Tiers:
        """Where the adapters are."""


class StateFeed:
    """The worker's state, and everybody who follows it. Changes are seen in the same loop step."""

    def __init__(self) -> None:
        self.state = State()
        self._changed = asyncio.Event()
        self._closed = False

    def set_load(self, *, running: int, waiting: int, kv_usage: float) -> None:
        """Take in the scheduler's counts."""
        state = self.state
        if (running, waiting, kv_usage) != (state.running, state.waiting, state.kv_usage):
            self.state = msgspec.structs.replace(
                state, running=running, waiting=waiting, kv_usage=kv_usage
            )
            self._tell()

    def set_adapters(self, gpu: tuple[AdapterId, ...], host: tuple[AdapterId, ...]) -> None:
        """Take in where the adapters are; `seq` rises even where nothing moved."""
        state = self.state
        self.state = msgspec.structs.replace(state, seq=state.seq + 1, gpu=gpu, host=host)
        self._tell()

    def close(self) -> None:
        """End every stream: the worker is about to stop."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def lines(self) -> AsyncIterator[bytes]:
        """The state now, at every change, and from time to time, as JSON lines."""
        encode = msgspec.json.Encoder().encode
        while not self._closed:
            changed = self._changed
            state = self.state
            yield encode(state) + b"\n"
            busy = state.running or state.waiting
            try:
                async with asyncio.timeout(BUSY_PERIOD_S if busy else IDLE_PERIOD_S):
                    await changed.wait()
            except TimeoutError:
                pass


class WorkerService:
    """The routes of protocol.py, less HTTP."""

    def __init__(self, engine: Engine, info: Info, feed: StateFeed, *, token: str | None) -> None:
        self._engine = engine
        self._info = info
        self._feed = feed
        self._token = token
        self._locks: dict[str, asyncio.Lock] = {}

    def authorized(self, header: str | None) -> bool:
        """Whether an `Authorization` header carries the token, where there is one."""
        if self._token is None:
            return True
        return hmac.compare_digest((header or "").encode(), f"Bearer {self._token}".encode())

    def info(self) -> bytes:
        """The body of `GET /worker/v1/info`."""
        return msgspec.json.encode(self._info)

    def state(self) -> bytes:
        """The body of `GET /worker/v1/adapters`."""
        return msgspec.json.encode(self._feed.state)

    async def load(self, body: bytes) -> bytes:
        """Load an adapter; one at a time a name, others at once. Raises `WorkerError`."""
        request = _decode(body, LoadRequest)
        if not self._info.max_loras:
            raise WorkerError(400, f"{self._info.model_id} is served without adapters")
        adapter = request.adapter
        lock = self._locks.setdefault(adapter.name, asyncio.Lock())
        try:
            async with lock:
                started = time.monotonic()
                if not (Path(request.path) / "adapter_config.json").is_file():
                    raise WorkerError(400, f"no adapter_config.json in {request.path}")
                tiers = await self._engine.add(adapter, request.path, request.evict)
                state = self._feed.state
                self._feed.set_adapters(*(tiers or (state.gpu, state.host)))
                return msgspec.json.encode(
                    LoadReply(self._feed.state.seq, time.monotonic() - started)
                )
        finally:
            self._forget_lock(adapter.name, lock)

    async def unload(self, body: bytes) -> bytes:
        """Drop an adapter. Raises `WorkerError`."""
        adapter = _decode(body, UnloadRequest).adapter
        lock = self._locks.setdefault(adapter.name, asyncio.Lock())
        try:
            async with lock:
                await self._engine.remove(adapter)
                await self.refresh()
                return msgspec.json.encode(LoadReply(self._feed.state.seq))
        finally:
            self._forget_lock(adapter.name, lock)

    async def refresh(self) -> None:
        """Ask the engine where its adapters are, and tell whoever follows.

        An engine that does not answer leaves the state as it was: what was loaded is loaded.
        """
        try:
            gpu, host = await self._engine.residency()
        except Exception:
            log.exception("the engine does not say which adapters it holds")
            gpu, host = self._feed.state.gpu, self._feed.state.host
        self._feed.set_adapters(gpu, host)

    def lines(self) -> AsyncIterator[bytes]:
        """The body of `GET /worker/v1/state`."""
        return self._feed.lines()

    def _forget_lock(self, name: str, lock: asyncio.Lock) -> None:
        if not lock.locked() and self._locks.get(name) is lock:
            del self._locks[name]


def _decode(body: bytes, kind: type[RequestT]) -> RequestT:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise WorkerError(400, f"not a {kind.__name__}: {error}") from None
