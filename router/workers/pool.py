"""The workers of one base model: started or attached, kept up, followed, and loaded with adapters.

Each worker has one task for its whole life: launch or attach, wait until it can serve, hand it to
the router, follow its state, take it from the router when it is gone, and begin again. A worker that
this router launched and that fails at its first start ends the router, with the worker's own words:
a wrong setting should be read, not retried.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from engine_worker.protocol import TOKEN_ENV, AdapterId, State
from router.adapters.cache import AdapterCache
from router.adapters.catalog import AdapterCatalog
from router.config import LLMConfig, RouterConfig
from router.core.fleet import Report, Worker
from router.core.job import AdapterRef, LoadError, LoadFault
from router.core.router import Router
from router.workers.client import (
    EngineWorkerClient,
    StockVllmClient,
    WorkerClient,
    WorkerUnreachableError,
    open_session,
    read_info,
    served_models,
)
from router.workers.devices import NOTHING, Machine, device_environment, gpus_per_worker
from router.workers.process import WorkerProcess
from router.workers.upstream import UpstreamPool

log = logging.getLogger("lorayard.workers")

BACKOFF_MIN_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
PROGRESS_S: Final = 10.0
SILENT_MAX_S: Final = 30.0
SOCKET_PATH_MAX: Final = 100  # the kernel's limit is 108 bytes, 104 elsewhere


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
        catalog: AdapterCatalog | None,
        cache: AdapterCache | None,
        machine: Machine = NOTHING,
        first_place: int = 0,
    ) -> None:
        self._machine = machine
        self._first_place = first_place
        self._llm = llm
        self._config = config
        self._log_dir = log_dir
        self._catalog = catalog
        self._cache = cache
        self._clients: dict[str, WorkerClient] = {}
        self._processes: dict[str, WorkerProcess] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._router: Router | None = None
        self._first_start: list[asyncio.Future[None]] = []

    def client(self, worker_id: str) -> WorkerClient | None:
        """How to speak to a worker; None where it is gone."""
        return self._clients.get(worker_id)

    def start(self, router: Router) -> None:
        """Begin to start or attach all workers; see `started`."""
        self._router = router
        loop = asyncio.get_running_loop()
        attached = self._llm.engine == "attached"
        if not attached:
            self._folder = _socket_folder()
        for number in range(self._llm.replicas):
            worker_id = f"{self._llm.model_id}-{number}"
            first: asyncio.Future[None] = loop.create_future()
            self._first_start.append(first)
            if attached:
                life = self._live_attached(worker_id, self._llm.attach[number], first)
            else:
                place = self._first_place + number * gpus_per_worker(self._llm)
                devices = device_environment(self._llm, place, self._machine)
                life = self._live_launched(worker_id, devices, first)
            task = loop.create_task(life, name=f"worker {worker_id}")
            task.add_done_callback(partial(self._life_ended, first))
            self._tasks.append(task)

    def _life_ended(self, first: "asyncio.Future[None]", task: "asyncio.Task[None]") -> None:
        """A life ends by `stop` alone; anything else is a fault, and must be heard."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("%s: given up: %s: %s", task.get_name(), type(error).__name__, error)
        if not first.done():
            first.set_exception(error)

    async def started(self) -> None:
        """Return when every worker has served once. Raises `WorkerStartError`."""
        await asyncio.gather(*self._first_start)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End all workers that were launched here, and leave the attached.

        They may finish what runs, unless they were not ready yet, or until `hurry` is set.
        """
        for task in self._tasks:
            task.cancel()
        ended = asyncio.gather(*self._tasks, return_exceptions=True)
        hurried = asyncio.ensure_future(hurry.wait())
        ends: tuple[asyncio.Future[Any], ...] = (ended, hurried)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for process in self._processes.values():
            process.kill()
        await ended
        for first in self._first_start:
            first.cancel()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # The core's Loader.

    def staged(self, adapter: AdapterRef) -> bool:
        """Whether the adapter is on this machine's disk."""
        assert self._catalog is not None
        assert self._cache is not None
        stored = self._catalog.get(adapter.name)
        return stored is not None and stored.version == adapter.version and self._cache.has(stored)

    async def fetch(self, adapter: AdapterRef) -> None:
        """Bring the adapter to this machine's disk."""
        await self._folder_of(adapter)

    async def _folder_of(self, adapter: AdapterRef) -> Path:
        assert self._catalog is not None
        assert self._cache is not None
        stored = self._catalog.get(adapter.name)
        if stored is None or stored.version != adapter.version:
            raise LoadError(
                LoadFault.ADAPTER_CHANGED,
                f"adapter {adapter.name} changed in the store while it was asked for; ask again",
            )
        return await self._cache.folder_of(stored)

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        """Fetch the adapter to this machine's disk, then have the worker load it."""
        client = self._clients.get(worker.id)
        if client is None:
            raise LoadError(LoadFault.WORKER, f"worker {worker.id} is gone")
        folder = await self._folder_of(adapter)
        return await client.load(_wire(adapter), folder, _wire(evict) if evict else None)

    # A worker's life.

    async def _live_launched(
        self, worker_id: str, devices: dict[str, str], first: "asyncio.Future[None]"
    ) -> None:
        assert self._folder is not None
        backoff_s = BACKOFF_MIN_S
        while True:
            token = secrets.token_urlsafe(24)
            process: WorkerProcess | None = None
            ready = False
            try:
                process = await WorkerProcess.launch(
                    self._llm,
                    worker_id,
                    folder=Path(self._folder.name),
                    log_file=self._log_dir / f"{quote(worker_id, safe='')}.log",
                    token=token,
                    drain_timeout_s=self._config.drain_timeout_s,
                    withheld=frozenset({self._config.api_keys_env, "VLLM_API_KEY"}),
                    given=devices,
                )
                self._processes[worker_id] = process
                log.info("%s: starting (log: %s)", worker_id, process.log_file)
                await self._boot(process, worker_id)
                ready = True
                session, url = open_session(process.address, token)
                upstreams = UpstreamPool(process.address, token)
                client = EngineWorkerClient(session, url, worker_id, upstreams)
                backoff_s = BACKOFF_MIN_S
                info = await read_info(session, url)
                kv_tokens = info.kv_tokens if info is not None else 0
                await self._serve_until_gone(worker_id, client, first, process, kv_tokens)
            except asyncio.CancelledError:
                if process is not None:
                    # Nothing runs on one that was not ready, and vLLM is deaf while it boots.
                    await process.stop(
                        self._config.drain_timeout_s if ready else 0.0, kill=not ready
                    )
                raise
            except Exception as error:  # noqa: BLE001  (told at the first start, logged after)
                if process is not None:
                    await process.end()
                if not first.done():
                    first.set_exception(error)
                    return
                log.warning("%s: %s", worker_id, error)
            finally:
                self._processes.pop(worker_id, None)
            log.warning("%s: starting again in %.1f s", worker_id, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _boot(self, process: WorkerProcess, worker_id: str) -> None:
        """Wait until it can serve, saying from time to time how far it is."""
        loop = asyncio.get_running_loop()
        started = loop.time()

        async def tell() -> None:
            while True:
                await asyncio.sleep(PROGRESS_S)
                last = process.log_tail(1).strip()[-120:]
                log.info("%s: booting for %.0f s: %s", worker_id, loop.time() - started, last)

        telling = loop.create_task(tell())
        try:
            await process.wait_ready(self._config.boot_timeout_s)
        finally:
            telling.cancel()
        log.info("%s: ready after %.1f s", worker_id, loop.time() - started)

    async def _live_attached(
        self, worker_id: str, address: str, first: "asyncio.Future[None]"
    ) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            token = os.environ.get(TOKEN_ENV) or None
            session, url = open_session(address, token)
            upstreams = UpstreamPool(address, token)
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
                    client = StockVllmClient(session, url, worker_id, upstreams)
                    kind = "stock vLLM server"
                log.info("%s: attached to the %s at %s", worker_id, kind, address)
                backoff_s = BACKOFF_MIN_S
                kv_tokens = info.kv_tokens if info is not None else 0
                await self._serve_until_gone(worker_id, client, first, None, kv_tokens)
            except WorkerUnreachableError as error:
                log.warning("%s: %s; trying again in %.1f s", worker_id, error, backoff_s)
            except Exception:
                log.exception("%s: trying again in %.1f s", worker_id, backoff_s)
            finally:
                await session.close()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

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
        worker_id: str,
        client: WorkerClient,
        first: "asyncio.Future[None]",
        process: WorkerProcess | None,
        kv_tokens: int,
    ) -> None:
        """Hand the worker to the router, follow its state, and take it back at its end."""
        router = self._router
        assert router is not None
        worker = Worker(
            worker_id,
            max_ongoing=self._llm.deployment_config.max_ongoing_requests,
            slots=self._llm.slots,
            eviction=self._llm.eviction,
            kv_tokens=kv_tokens,
        )
        self._clients[worker_id] = client
        router.add_worker(worker)
        if not first.done():
            first.set_result(None)
        following = asyncio.create_task(self._follow(worker, client, router, process))
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
        self, worker: Worker, client: WorkerClient, router: Router, process: WorkerProcess | None
    ) -> None:
        """Take the worker's states to the router.

        While a launched worker is silent it gets no new requests, and one that stays silent is ended.
        """
        loop = asyncio.get_running_loop()
        silent_since: float | None = None
        while True:
            try:
                async for state in client.states():
                    if silent_since is not None:
                        silent_since = None
                        log.info("%s: speaks again", worker.id)
                        router.set_accepting(worker, accepting=True)
                    router.observe(worker, self._report(state))
            except WorkerUnreachableError as error:
                if process is None:
                    raise
                if silent_since is None:
                    silent_since = loop.time()
                    log.warning("%s: %s; it gets nothing new meanwhile", worker.id, error)
                    router.set_accepting(worker, accepting=False)
                elif loop.time() - silent_since > SILENT_MAX_S:
                    raise WorkerUnreachableError(
                        f"{worker.id} was silent for {SILENT_MAX_S:g} s"
                    ) from None
                await asyncio.sleep(BACKOFF_MIN_S)

    def _report(self, state: State) -> Report:
        return Report(
            seq=state.seq,
            running=state.running,
            waiting=state.waiting,
            kv_usage=state.kv_usage,
            gpu=tuple(map(self._ref, state.gpu)),
            host=tuple(map(self._ref, state.host)),
        )

    def _ref(self, adapter: AdapterId) -> AdapterRef:
        name = adapter.name.removeprefix(f"{self._llm.model_id}:")
        return AdapterRef(self._llm.model_id, name, adapter.version)


def _socket_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder of this process's own; those that killed routers left are removed."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > SOCKET_PATH_MAX // 2:
        base = Path("/tmp")  # noqa: S108  (the folder in it is this user's alone)
    for left in base.glob("lorayard-*-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(left.name.split("-")[1])
            if left.stat().st_uid == os.getuid() and not _runs(owner):
                shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"lorayard-{os.getpid()}-", dir=base)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wire(adapter: AdapterRef) -> AdapterId:
    return AdapterId(adapter.model_id, adapter.version)
