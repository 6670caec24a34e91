"""What every engine worker does alike, whatever its engine: loads one at a time a name, and state.

Several routers may use it: what each may do is the arbiter's to say (arbiter.py). The engine proper
is an `Engine`; the two web servers (vLLM's own application, and the emulated engine's) only carry
bytes to and from here.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec

from engine_worker.arbiter import Arbiter, RefusedError
from engine_worker.protocol import (
    ADAPTER_HEADER,
    BUSY_PERIOD_S,
    IDLE_PERIOD_S,
    REFUSED_HEADER,
    ROUTER_HEADER,
    VERSION_HEADER,
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
# What routers tell of each other's requests is gathered for so long.
GATHER_S: Final = 0.005
# A router that unloads has no request there any more; one that was given up may end a moment later.
LEFTOVER_S: Final = 5.0
REFRESH_TRIES: Final = 8
ROUTER: Final = ROUTER_HEADER.lower()
ADAPTER: Final = ADAPTER_HEADER.lower()
VERSION: Final = VERSION_HEADER.lower()


class WorkerError(Exception):
    """An answer that is not 200. `status`, `code` and `state` as in protocol.py."""

    def __init__(
        self, status: int, message: str, *, code: str = "", state: State | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self._code = code
        self._state = state

    def body(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(
            WireError(WireErrorBody(str(self), code=self._code), self._state)
        )

    def headers(self) -> dict[str, str]:
        """What the answer's head says of it."""
        return {REFUSED_HEADER: self._code} if self._code else {}


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
        """Drop an adapter, from host memory too; harmless where it is not held.

        Raises `WorkerError`, and then it is held still.
        """

    async def residency(self) -> Tiers:
        """Where the adapters are."""


class StateFeed:
    """The worker's state, and everybody who follows it. Changes are seen in the same loop step."""

    def __init__(self) -> None:
        self.state = State()
        self.followers = 0
        self._changed = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._closed = False

    def set_load(self, *, running: int, waiting: int, kv_usage: float) -> None:
        """Take in the scheduler's counts."""
        state = self.state
        if (running, waiting, kv_usage) != (state.running, state.waiting, state.kv_usage):
            self.state = msgspec.structs.replace(
                state, running=running, waiting=waiting, kv_usage=kv_usage
            )
            self.tell()

    def set_adapters(self, gpu: tuple[AdapterId, ...], host: tuple[AdapterId, ...]) -> None:
        """Take in where the adapters are; `seq` rises even where nothing moved."""
        state = self.state
        self.state = msgspec.structs.replace(state, seq=state.seq + 1, gpu=gpu, host=host)
        self.tell()

    def close(self) -> None:
        """End every stream: the worker is about to stop."""
        self._closed = True
        self.tell()

    def tell(self) -> None:
        """Wake whoever follows, now."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        self._changed.set()
        self._changed = asyncio.Event()

    def tell_soon(self) -> None:
        """Wake them in a moment, once for all that comes till then."""
        if self._gathering is None and self.followers > 1:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self.tell)

    async def lines(
        self, view: Callable[[State], State] = lambda state: state
    ) -> AsyncIterator[bytes]:
        """The state now, at every change, and from time to time, as JSON lines.

        `view` makes of the state what this follower is told.
        """
        encode = msgspec.json.Encoder().encode
        self.followers += 1
        told: State | None = None
        try:
            while not self._closed:
                changed = self._changed
                state = view(self.state)
                if state != told:
                    yield encode(state) + b"\n"
                    told = state
                busy = state.running or state.waiting
                try:
                    async with asyncio.timeout(BUSY_PERIOD_S if busy else IDLE_PERIOD_S):
                        await changed.wait()
                except TimeoutError:
                    told = None
        finally:
            self.followers -= 1


class WorkerService:
    """The routes of protocol.py, less HTTP."""

    def __init__(
        self,
        engine: Engine,
        info: Info,
        feed: StateFeed,
        *,
        token: str | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._info = info
        self._feed = feed
        self._token = token
        self._locks: dict[str, asyncio.Lock] = {}
        self._arbiter = Arbiter(info.max_loras, info.max_ongoing_requests, now)
        self._arrivals: dict[AdapterId, asyncio.Event] = {}
        self._left = asyncio.Event()  # set, and made anew, when a request or a load has ended

    def authorized(self, header: str | None) -> bool:
        """Whether an `Authorization` header carries the token, where there is one."""
        if self._token is None:
            return True
        return hmac.compare_digest((header or "").encode(), f"Bearer {self._token}".encode())

    def info(self) -> bytes:
        """The body of `GET /worker/v1/info`."""
        return msgspec.json.encode(self._info)

    def state(self, router: str = "") -> bytes:
        """The body of `GET /worker/v1/adapters`."""
        return msgspec.json.encode(self._view(router, self._feed.state))

    def occupancy(self) -> bytes:
        """The body of `GET /worker/v1/occupancy`."""
        return msgspec.json.encode(self._arbiter.occupancy())

    def lines(self, router: str = "") -> AsyncIterator[bytes]:
        """The body of `GET /worker/v1/state`."""
        return self._feed.lines(partial(self._view, router))

    def _view(self, router: str, state: State) -> State:
        """The state as that router is told: with what the others do, and loads as if they had ended."""
        arbiter = self._arbiter
        gpu, coming, leaving = state.gpu, arbiter.coming, arbiter.leaving
        if coming or leaving:
            stay = tuple(adapter for adapter in gpu if adapter not in leaving)
            gpu = (*stay, *(adapter for adapter in coming if adapter not in stay))
        others, used = arbiter.others(router), arbiter.used_by_others(router)
        if gpu is state.gpu and not others and not used:
            return state
        return msgspec.structs.replace(state, gpu=gpu, others=others, used=used)

    @asynccontextmanager
    async def admitted(self, headers: Mapping[str, str]) -> AsyncIterator[None]:
        """Count one OpenAI request in, and out at its end; `headers` have names in lower case.

        One whose adapter is on its way waits for it. Raises `WorkerError` where it is refused.
        """
        router = headers.get(ROUTER, "")
        name = headers.get(ADAPTER)
        adapter = AdapterId(name, headers.get(VERSION, "")) if name else None
        arbiter = self._arbiter
        try:
            arbiter.enter(router, adapter)
            self._feed.tell_soon()
            try:
                if adapter is not None and not arbiter.holds(adapter):
                    await self._arrivals[adapter].wait()
                    if not arbiter.holds(adapter):
                        raise arbiter.gone(adapter)
                yield
            finally:
                arbiter.leave(router, adapter)
                self._feed.tell_soon()
                self._ended()
        except RefusedError as refused:
            raise WorkerError(503, str(refused), code=refused.refusal) from None

    async def load(self, body: bytes, router: str = "") -> bytes:
        """Load an adapter; one at a time a name, others at once. Raises `WorkerError`.

        Who asks for one that another router is loading waits for that load, and shares it.
        """
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
                while adapter in self._arbiter.leaving:
                    await self._left.wait()
                if not self._arbiter.has_loaded(adapter, request.path):
                    await self._load(request, router)
                self._arbiter.claim(router, adapter)
                return msgspec.json.encode(
                    LoadReply(self._feed.state.seq, time.monotonic() - started)
                )
        finally:
            self._forget_lock(adapter.name, lock)

    async def _load(self, request: LoadRequest, router: str) -> None:
        adapter, arbiter, feed = request.adapter, self._arbiter, self._feed
        try:
            leaves = arbiter.begin_load(router, adapter, request.evict, drain=request.drain_s > 0.0)
        except RefusedError as refused:
            raise self._refused_load(refused, router) from None
        arrival = self._arrivals[adapter] = asyncio.Event()
        feed.set_adapters(feed.state.gpu, feed.state.host)
        loaded = False
        kept: RefusedError | None = None
        tiers: Tiers | None = None
        try:
            if request.drain_s > 0.0:
                await self._drained(adapter, leaves, request.drain_s)
            tiers = await self._engine.add(adapter, request.path, leaves)
            loaded = True
        except RefusedError as refused:
            kept = refused
        finally:
            arbiter.end_load(adapter, request.path, leaves, loaded=loaded)
            if not loaded:
                feed.set_adapters(feed.state.gpu, feed.state.host)
            del self._arrivals[adapter]
            arrival.set()
            self._ended()
        if kept is not None:
            raise self._refused_load(kept, router)
        feed.set_adapters(*(tiers or (feed.state.gpu, feed.state.host)))

    def _ended(self) -> None:
        self._left.set()
        self._left = asyncio.Event()

    async def _drained(
        self, adapter: AdapterId, leaves: Sequence[AdapterId], timeout_s: float
    ) -> None:
        """Wait until nobody uses those who leave. Raises `RefusedError`."""
        if not await self._idle(leaves, timeout_s):
            raise self._arbiter.kept(adapter)

    async def _idle(self, adapters: Sequence[AdapterId], timeout_s: float) -> bool:
        """Wait until nobody uses them, but not for longer; whether that is so."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._arbiter.used(adapters):
                    await self._left.wait()
        except TimeoutError:
            return False
        return True

    def _refused_load(self, refused: RefusedError, router: str) -> WorkerError:
        state = self._view(router, self._feed.state)
        return WorkerError(409, str(refused), code=refused.refusal, state=state)

    async def unload(self, body: bytes, router: str = "") -> bytes:
        """Drop an adapter once its router's last request has ended, unless another one uses it.

        Raises `WorkerError`.
        """
        adapter = _decode(body, UnloadRequest).adapter
        lock = self._locks.setdefault(adapter.name, asyncio.Lock())
        try:
            async with lock:
                while adapter in self._arbiter.leaving:
                    await self._left.wait()
                await self._unload(adapter, router)
                return msgspec.json.encode(LoadReply(self._feed.state.seq))
        finally:
            self._forget_lock(adapter.name, lock)

    async def _unload(self, adapter: AdapterId, router: str) -> None:
        try:
            self._arbiter.begin_unload(router, adapter)
        except RefusedError as refused:
            raise self._refused_load(refused, router) from None
        self._feed.set_adapters(self._feed.state.gpu, self._feed.state.host)
        unloaded = False
        try:
            if not await self._idle((adapter,), LEFTOVER_S):
                raise self._refused_load(self._arbiter.used_still(adapter), router)
            await self._engine.remove(adapter)
            unloaded = True
        finally:
            self._arbiter.end_unload(adapter, unloaded=unloaded)
            self._ended()
            if not unloaded:
                self._feed.set_adapters(self._feed.state.gpu, self._feed.state.host)
        await self.refresh()

    async def refresh(self) -> None:
        """Ask the engine where its adapters are, and tell whoever follows.

        An engine that does not answer leaves the state as it was: what was loaded is loaded.
        """
        for _ in range(REFRESH_TRIES):
            seq, held = self._feed.state.seq, self._arbiter.held
            try:
                gpu, host = await self._engine.residency()
            except Exception:
                log.exception("the engine does not say which adapters it holds")
                gpu = tuple(adapter for adapter in self._feed.state.gpu if adapter in held)
                host = self._feed.state.host
                break
            if self._feed.state.seq == seq:  # else it may be of before a load that has ended since
                there = {*gpu, *host}
                self._arbiter.drop(adapter for adapter in held if adapter not in there)
                break
        self._feed.set_adapters(gpu, host)

    def _forget_lock(self, name: str, lock: asyncio.Lock) -> None:
        if not lock.locked() and self._locks.get(name) is lock:
            del self._locks[name]


def _decode(body: bytes, kind: type[RequestT]) -> RequestT:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise WorkerError(400, f"not a {kind.__name__}: {error}") from None
