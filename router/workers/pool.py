"""The workers of one base model: started or attached, kept up, followed, and loaded with adapters.

Each worker has one task for its whole life: launch (keeper.py) or attach, wait until it can serve,
hand it to the router, follow its state, take it from the router when it is gone, and begin again.
Several routers may attach to one engine worker: each names itself there, and what the worker refuses
because of another one is the core's to decide again.
"""

import asyncio
import logging
import os
import secrets
from functools import partial
from pathlib import Path
from typing import Final

from engine_worker.protocol import TOKEN_ENV, AdapterId, Info, State
from router.config import LLMConfig, RouterConfig
from router.core.claims import PATIENCES
from router.core.fleet import Hold, LoadRefusedError, Report, Worker
from router.core.job import AdapterRef, LoadError, LoadFault
from router.core.router import Router
from router.lifecycle.adapters import Adapters
from router.workers.client import (
    EngineWorkerClient,
    LoadConflictError,
    WorkerClient,
    WorkerUnreachableError,
    open_session,
    read_info,
)
from router.workers.devices import NOTHING, Machine
from router.workers.keeper import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    WorkerKeeper,
    life_ended,
    worker_id_of,
)
from router.workers.process import WorkerProcess
from router.workers.stock import StockVllmClient, served_models
from router.workers.upstream import UpstreamPool

log = logging.getLogger("lorayard.workers")

# Set by a supervisor for its router processes: the token of the workers that it launched, which no
# server elsewhere is to hear.
LAUNCHED_TOKEN_ENV: Final = "LORAYARD_LAUNCHED_WORKER_TOKEN"  # noqa: S105  (the name of a variable)
SILENT_MAX_S: Final = 30.0
# Of one on this host it costs nothing to ask whether it is there.
BACKOFF_LOCAL_S: Final = 0.5


class WorkerPool:
    """Workers of one model, and the core's `Loader` for them.

    `machine` is shared out among its workers, and the first one here gets place `first_place`.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: RouterConfig,
        *,
        log_dir: Path,
        adapters: Adapters | None,
        machine: Machine = NOTHING,
        first_place: int = 0,
    ) -> None:
        self._machine = machine
        self._first_place = first_place
        self._router_id = secrets.token_hex(6)
        self._token = secrets.token_urlsafe(24)
        self._llm = llm
        self._config = config
        self._log_dir = log_dir
        self._adapters = adapters
        self._clients: dict[str, WorkerClient] = {}
        self._draining: dict[str, None] = {}  # by their names, so that a restart changes nothing
        self._tasks: list[asyncio.Task[None]] = []
        self._keeper: WorkerKeeper | None = None
        self._router: Router | None = None
        self._first_start: list[asyncio.Future[None]] = []

    def client(self, worker_id: str) -> WorkerClient | None:
        """How to speak to a worker; None where it is gone."""
        return self._clients.get(worker_id)

    def start(self, router: Router) -> None:
        """Begin to start or attach all workers; see `started`."""
        self._router = router
        if self._llm.engine != "attached":
            self._keeper = WorkerKeeper(
                self._llm,
                self._config,
                log_dir=self._log_dir,
                token=self._token,
                machine=self._machine,
                first_place=self._first_place,
            )
            self._keeper.start(self._use_launched)
            return
        loop = asyncio.get_running_loop()
        for number, address in enumerate(self._llm.attach):
            worker_id = worker_id_of(self._llm, number)
            first: asyncio.Future[None] = loop.create_future()
            self._first_start.append(first)
            life = self._live_attached(number, worker_id, address, first)
            task = loop.create_task(life, name=f"worker {worker_id}")
            task.add_done_callback(partial(life_ended, first))
            self._tasks.append(task)

    async def started(self) -> None:
        """Return when every worker has served once. Raises `WorkerStartError`."""
        if self._keeper is not None:
            await self._keeper.started()
        await asyncio.gather(*self._first_start)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End all workers that were launched here, and leave the attached.

        They may finish what runs, unless they were not ready yet, or until `hurry` is set.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for first in self._first_start:
            first.cancel()
        if self._keeper is not None:
            await self._keeper.stop(hurry)

    # An operator's word.

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of all workers, whether they are there or not."""
        return tuple(worker_id_of(self._llm, number) for number in range(self._llm.replicas))

    @property
    def draining(self) -> tuple[str, ...]:
        """The ids of the workers that an operator drains."""
        return tuple(self._draining)

    def drain(self, worker_id: str, *, draining: bool) -> None:
        """Send a worker nothing new, not even loads, started again or not; or send it work again.

        What runs there goes on.
        """
        if draining:
            self._draining[worker_id] = None
        else:
            self._draining.pop(worker_id, None)
        self._hold(worker_id)

    def _hold(self, worker_id: str) -> None:
        worker = self._router.fleet.get(worker_id) if self._router is not None else None
        if worker is not None and self._router is not None:
            self._router.hold(worker, Hold.DRAIN, held=worker_id in self._draining)

    # The core's Loader.

    def staged(self, adapter: AdapterRef) -> bool:
        """Whether the adapter is on this machine's disk."""
        assert self._adapters is not None
        stored = self._adapters.stored(adapter)
        return stored is not None and self._adapters.cache.has(stored)

    async def fetch(self, adapter: AdapterRef) -> None:
        """Bring the adapter to this machine's disk."""
        await self._folder_of(adapter)

    async def _folder_of(self, adapter: AdapterRef) -> Path:
        assert self._adapters is not None
        stored = self._adapters.stored(adapter)
        if stored is None:
            raise LoadError(
                LoadFault.ADAPTER_CHANGED,
                f"adapter {adapter.name} changed in the store while it was asked for; ask again",
            )
        return await self._adapters.cache.folder_of(stored)

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        """Fetch the adapter to this machine's disk, then have the worker load it."""
        client = self._clients.get(worker.id)
        if client is None:
            raise LoadError(LoadFault.WORKER, f"worker {worker.id} is gone")
        assert self._adapters is not None
        cache = self._adapters.cache
        # From here on no other adapter's download may have it removed, until the engine has read it.
        cache.hold(adapter.name, adapter.version)
        try:
            return await self._load(client, worker, adapter, evict)
        finally:
            cache.let_go(adapter.name, adapter.version)

    async def _load(
        self, client: WorkerClient, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None
    ) -> int:
        folder = await self._folder_of(adapter)
        leaves = worker.slots.get(evict) if evict is not None else None
        # The core lets one leave that others use only for who has waited too long.
        patient = leaves is not None and leaves.foreign
        drain_s = PATIENCES * self._config.slot_patience_s if patient else 0.0
        try:
            return await client.load(
                _wire(adapter), folder, _wire(evict) if evict else None, drain_s
            )
        except LoadConflictError as conflict:
            raise self._refused(conflict) from None

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        """Have the worker drop the adapter; its files stay."""
        client = self._clients.get(worker.id)
        if client is None:
            raise LoadError(LoadFault.WORKER, f"worker {worker.id} is gone")
        try:
            return await client.unload(_wire(adapter))
        except LoadConflictError as conflict:
            raise self._refused(conflict) from None

    def _refused(self, conflict: LoadConflictError) -> LoadRefusedError:
        report = None if conflict.state is None else self._report(conflict.state)
        return LoadRefusedError(str(conflict), report)

    # A worker's life.

    async def _use_launched(
        self, number: int, worker_id: str, process: WorkerProcess, first: "asyncio.Future[None]"
    ) -> None:
        """Serve with a worker that was started here, until it is gone."""
        session, url = open_session(process.address, self._token, self._router_id)
        upstreams = UpstreamPool(process.address, self._token, self._router_id)
        client = EngineWorkerClient(session, url, worker_id, upstreams)
        info = await read_info(session, url)
        await self._serve_until_gone(number, worker_id, client, first, process, info)

    async def _live_attached(
        self, number: int, worker_id: str, address: str, first: "asyncio.Future[None]"
    ) -> None:
        local = address.startswith("unix:")
        backoff_s = BACKOFF_MIN_S
        told = False
        while True:
            token = (local and os.environ.get(LAUNCHED_TOKEN_ENV)) or os.environ.get(TOKEN_ENV)
            session, url = open_session(address, token, self._router_id)
            upstreams = UpstreamPool(address, token, self._router_id)
            try:
                info = await read_info(session, url)
                client: WorkerClient
                if info is not None:
                    self._check_attached(address, info.model_id, info.max_loras)
                    client = EngineWorkerClient(session, url, worker_id, upstreams)
                    kind = f"{info.engine} {info.engine_version} engine worker"
                else:
                    models = await served_models(session, url)
                    if self._llm.model_id not in models:
                        raise WorkerUnreachableError(
                            f"{address} serves {', '.join(models)}, not `{self._llm.model_id}`; "
                            f"start it with --served-model-name {self._llm.model_id}"
                        )
                    client = StockVllmClient(session, url, worker_id, upstreams, self._llm.model_id)
                    kind = "stock vLLM server"
                log.info("%s: attached to the %s at %s", worker_id, kind, address)
                backoff_s = BACKOFF_MIN_S
                told = False
                await self._serve_until_gone(number, worker_id, client, first, None, info)
            except WorkerUnreachableError as error:
                level = logging.DEBUG if told and local else logging.WARNING
                log.log(level, "%s: %s; trying again in %.1f s", worker_id, error, backoff_s)
                told = True
            except Exception:
                log.exception("%s: trying again in %.1f s", worker_id, backoff_s)
            finally:
                await session.close()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LOCAL_S if local else BACKOFF_MAX_S)

    def _check_attached(self, address: str, model_id: str, max_loras: int) -> None:
        if model_id != self._llm.model_id:
            raise WorkerUnreachableError(
                f"{address} serves `{model_id}`, not `{self._llm.model_id}`; "
                f"start it with --model-id {self._llm.model_id}"
            )
        if max_loras != self._llm.slots:
            raise WorkerUnreachableError(
                f"{address} holds {max_loras} adapters, but max_num_adapters_per_replica is "
                f"{self._llm.slots}; make them equal"
            )

    async def _serve_until_gone(
        self,
        number: int,
        worker_id: str,
        client: WorkerClient,
        first: "asyncio.Future[None]",
        process: WorkerProcess | None,
        info: Info | None,
    ) -> None:
        """Hand the worker to the router, follow its state, and take it back at its end."""
        router = self._router
        assert router is not None
        max_ongoing = self._llm.deployment_config.max_ongoing_requests
        if info is not None and info.max_ongoing_requests:
            max_ongoing = min(max_ongoing, info.max_ongoing_requests)
        worker = Worker(
            worker_id,
            max_ongoing=max_ongoing,
            slots=self._llm.slots,
            eviction=self._llm.eviction,
            kv_tokens=info.kv_tokens if info is not None else 0,
            rank=number,
        )
        self._clients[worker_id] = client
        router.fleet.hold(worker, Hold.DRAIN, held=worker_id in self._draining)
        router.add_worker(worker)
        if not first.done():
            first.set_result(None)
        following = asyncio.create_task(self._follow(worker, client, router, info))
        ends: list[asyncio.Task[object]] = [following]
        if process is not None:
            ends.append(asyncio.create_task(process.wait()))
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if following in done and (error := following.exception()) is not None:
                raise error
            assert process is not None
            log.warning("%s: ended; the end of its log:\n%s", worker_id, process.log_tail())
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            router.remove_worker(worker)
            del self._clients[worker_id]
            await client.close()

    async def _follow(
        self, worker: Worker, client: WorkerClient, router: Router, info: Info | None
    ) -> None:
        """Take the worker's states to the router.

        While an engine worker is silent it gets no new requests, and what runs there goes on: it may be
        busy, or end what it has before it stops. One that stays silent is given up. A stock server, and
        an engine that was started again, are anew at once: nothing that was known of them holds.
        """
        loop = asyncio.get_running_loop()
        silent_since: float | None = None
        while True:
            try:
                async for state in client.states():
                    if silent_since is not None:
                        silent_since = None
                        log.info("%s: speaks again", worker.id)
                        router.hold(worker, Hold.SILENT, held=False)
                    router.observe(worker, self._report(state))
            except WorkerUnreachableError as error:
                if info is None:
                    raise
                if silent_since is None:
                    silent_since = loop.time()
                    log.warning("%s: %s; it gets nothing new meanwhile", worker.id, error)
                    router.hold(worker, Hold.SILENT, held=True)
                elif loop.time() - silent_since > SILENT_MAX_S:
                    raise WorkerUnreachableError(
                        f"{worker.id} was silent for {SILENT_MAX_S:g} s"
                    ) from None
                await asyncio.sleep(BACKOFF_MIN_S)
                await _check_same(worker, client, info)

    def _report(self, state: State) -> Report:
        return Report(
            seq=state.seq,
            running=state.running,
            waiting=state.waiting,
            kv_usage=state.kv_usage,
            gpu=tuple(map(self._ref, state.gpu)),
            host=tuple(map(self._ref, state.host)),
            others=state.others,
            used=tuple(map(self._ref, state.used)),
        )

    def _ref(self, adapter: AdapterId) -> AdapterRef:
        name = adapter.name.removeprefix(f"{self._llm.model_id}:")
        return AdapterRef(self._llm.model_id, name, adapter.version)


def _wire(adapter: AdapterRef) -> AdapterId:
    return AdapterId(adapter.model_id, adapter.version)


async def _check_same(worker: Worker, client: WorkerClient, info: Info) -> None:
    """Raise `WorkerUnreachableError` if another engine answers there now."""
    try:
        now = await client.info()
    except WorkerUnreachableError:
        return  # silent still
    if now is None or now.pid != info.pid:
        raise WorkerUnreachableError(f"{worker.id} was started again")
