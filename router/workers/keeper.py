"""The engine workers of one base model that this process starts: each kept up for as long as it lives.

A worker has the same socket and the same token for ever, so that whoever reaches it reaches its
successor too. One that fails at its first start ends everything, with its own words: a wrong setting
should be read, not retried. Any later end is made good, after a pause that doubles.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from router.config import LLMConfig, RouterConfig
from router.workers.devices import NOTHING, Machine, device_environment, gpus_per_worker
from router.workers.process import WorkerProcess

log = logging.getLogger("lorayard.workers")

BACKOFF_MIN_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
PROGRESS_S: Final = 10.0
SOCKET_PATH_MAX: Final = 100  # the kernel's limit is 108 bytes, 104 elsewhere

# Does with a worker that can serve whatever is to be done with it, and returns when it is gone; sets
# the future, which is that of its first start, where it is not done.
Use = Callable[[int, str, WorkerProcess, "asyncio.Future[None]"], Awaitable[None]]


class WorkerKeeper:
    """Starts `llm.replicas` workers, and starts them again. To be made inside a running loop.

    `machine` is shared out among them, and the first one here gets place `first_place`. With `limited`
    they refuse what is beyond `max_ongoing_requests`: several routers use them.
    """

    def __init__(
        self,
        llm: LLMConfig,
        config: RouterConfig,
        *,
        log_dir: Path,
        token: str,
        machine: Machine = NOTHING,
        first_place: int = 0,
        limited: bool = False,
    ) -> None:
        self._llm = llm
        self._config = config
        self._log_dir = log_dir
        self._token = token
        self._machine = machine
        self._first_place = first_place
        self._limited = limited
        self._folder = socket_folder()
        self._processes: dict[str, WorkerProcess] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._first_start: list[asyncio.Future[None]] = []

    def addresses(self) -> tuple[str, ...]:
        """Where the workers are, or will be."""
        return tuple(
            f"unix:{WorkerProcess.socket_of(Path(self._folder.name), worker_id_of(self._llm, number))}"
            for number in range(self._llm.replicas)
        )

    def start(self, use: Use) -> None:
        """Begin to start all workers; see `started`."""
        loop = asyncio.get_running_loop()
        for number in range(self._llm.replicas):
            first: asyncio.Future[None] = loop.create_future()
            self._first_start.append(first)
            worker_id = worker_id_of(self._llm, number)
            task = loop.create_task(
                self._live(number, worker_id, first, use), name=f"worker {worker_id}"
            )
            task.add_done_callback(partial(life_ended, first))
            self._tasks.append(task)

    async def started(self) -> None:
        """Return when every worker could serve once. Raises `WorkerStartError`."""
        await asyncio.gather(*self._first_start)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End all workers.

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
        self._folder.cleanup()

    async def _live(
        self, number: int, worker_id: str, first: "asyncio.Future[None]", use: Use
    ) -> None:
        place = self._first_place + number * gpus_per_worker(self._llm)
        devices = device_environment(self._llm, place, self._machine)
        backoff_s = BACKOFF_MIN_S
        while True:
            process: WorkerProcess | None = None
            ready = False
            try:
                process = await WorkerProcess.launch(
                    self._llm,
                    worker_id,
                    folder=Path(self._folder.name),
                    log_file=self._log_dir / f"{quote(worker_id, safe='')}.log",
                    token=self._token,
                    drain_timeout_s=self._config.drain_timeout_s,
                    withheld=frozenset(
                        {self._config.api_keys_env, self._config.admin_key_env, "VLLM_API_KEY"}
                    ),
                    given=devices,
                    limited=self._limited,
                )
                self._processes[worker_id] = process
                log.info("%s: starting (log: %s)", worker_id, process.log_file)
                await self._boot(process, worker_id)
                ready = True
                backoff_s = BACKOFF_MIN_S
                await use(number, worker_id, process, first)
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


def worker_id_of(llm: LLMConfig, number: int) -> str:
    """What the worker of that number is called."""
    return f"{llm.model_id}-{number}"


def life_ended(first: "asyncio.Future[None]", task: "asyncio.Task[None]") -> None:
    """A life ends by `stop` alone; anything else is a fault, and must be heard."""
    if task.cancelled() or (error := task.exception()) is None:
        return
    log.error("%s: given up: %s: %s", task.get_name(), type(error).__name__, error)
    if not first.done():
        first.set_exception(error)


def socket_folder() -> "tempfile.TemporaryDirectory[str]":
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
