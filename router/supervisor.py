"""`router serve --processes N`: several router processes at one port, over the same workers.

This process routes nothing. It holds the port, so that it is ours from the beginning, keeps the workers
up, and keeps N router processes up, each with a listening socket of its own at that port (SO_REUSEPORT:
the kernel deals connections out). Nothing is shared between them: each hears from each worker what the
others have there, and the worker arbitrates what they decide at once (see ARCHITECTURE.md).

The order of stopping: the router processes drain, the workers are told to stop, this process ends. A
second signal cuts the wait short. Whatever ends this process, routers and workers end with it: each
holds the reading end of a pipe from here.
"""

import asyncio
import contextlib
import logging
import math
import os
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Final

import msgspec

from engine_worker.protocol import TOKEN_ENV
from router.adapters.cache import default_cache_dir
from router.config import Config, LLMConfig, RouterConfig, TenantConfig
from router.frontend.admin_key import AdminKey
from router.frontend.gate import key_file
from router.part import Part, bound
from router.stopping import listen_for_signals, until_started
from router.workers.client import WorkerUnreachableError, is_healthy, open_session
from router.workers.devices import gpus_per_worker, this_machine
from router.workers.keeper import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    WorkerKeeper,
    life_ended,
    socket_folder,
)
from router.workers.pool import LAUNCHED_TOKEN_ENV, SILENT_MAX_S
from router.workers.process import KILL_GRACE_S, WorkerProcess

log = logging.getLogger("lorayard")
HEALTH_PERIOD_S: Final = 2.0
LINE_MAX_BYTES: Final = 1 << 20


class PartStartError(Exception):
    """A router process ended before it was ready; it has said why. `status` is its exit status."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"router process {name} ended with status {status} before it was ready")
        self.status = status


def part_of(config: Config, number: int, seed: int, attach: Sequence[Sequence[str]]) -> Config:
    """The configuration of one router process: its share of what is counted, and workers to attach.

    What is a limit of the whole is divided by the number of processes, since connections are dealt out
    evenly: quotas and the length of the queue. (Keys' quotas each process divides as it reads them.)
    `attach` are the addresses of each model's workers.
    """
    settings = config.router
    count = settings.processes
    record = settings.record
    if record is not None:
        path = Path(record.path)
        own = path.with_name(f"{path.stem}.{number}{path.suffix}")
        record = msgspec.structs.replace(record, path=str(own))
    router = msgspec.structs.replace(
        settings,
        processes=1,
        seed=seed if settings.seed is None else settings.seed,
        max_queued_requests=math.ceil(settings.max_queued_requests / count),
        tenants=tuple(_share(tenant, count) for tenant in settings.tenants),
        record=record,
    )
    models = tuple(
        msgspec.structs.replace(llm, engine="attached", attach=tuple(addresses))
        for llm, addresses in zip(config.llm_configs, attach, strict=True)
    )
    return Config(models, router)


def _share(tenant: TenantConfig, count: int) -> TenantConfig:
    requests, tokens = tenant.requests_per_minute, tenant.tokens_per_minute
    return msgspec.structs.replace(
        tenant,
        requests_per_minute=None if requests is None else requests / count,
        tokens_per_minute=None if tokens is None else tokens / count,
    )


async def supervise(config: Config, log_level: str) -> None:
    """Serve with several processes until SIGTERM or SIGINT.

    Raises `OSError` where the port cannot be had, `ConfigError` where the file of keys cannot be used
    or a key is a client's and an operator's, `WorkerStartError` where a worker does not come up, and
    `PartStartError` where a router process does not.
    """
    stop, hurry = listen_for_signals()
    settings = config.router
    # Each process looks at its keys; a mistake is told once, and before any worker is started.
    admin_key = AdminKey.from_environment(settings)
    if (keys := key_file(settings)) is not None:
        listed = keys.read()
        if admin_key is not None:
            admin_key.check_clients(listed)
    with contextlib.ExitStack() as held:
        if settings.port:
            # The shared kind can be had beside another of the same user's; this one cannot.
            bound(settings.host, settings.port, shared=False).close()
        holder = held.enter_context(bound(settings.host, settings.port, shared=True))
        folder = held.enter_context(socket_folder())
        token = os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(24)
        keepers = _keepers(config, token)
        attach = [
            keeper.addresses() if keeper else llm.attach
            for llm, keeper in zip(config.llm_configs, keepers, strict=True)
        ]
        settings = msgspec.structs.replace(settings, port=holder.getsockname()[1])
        config = msgspec.structs.replace(config, router=settings)
        seed = SystemRandom().getrandbits(32)
        parts = [
            _RouterProcess(
                Part(
                    number,
                    settings.processes,
                    folder,
                    log_level,
                    part_of(config, number, seed, attach),
                ),
                token,
            )
            for number in range(settings.processes)
        ]
        try:
            try:
                for keeper in filter(None, keepers):
                    keeper.start(partial(_watch, token))
                for part in parts:
                    part.start()
                await until_started(
                    *(keeper.started() for keeper in keepers if keeper),
                    *(part.ready for part in parts),
                    stop=stop,
                )
                if not stop.is_set():
                    print(parts[0].announcement, flush=True)  # noqa: T201
                await stop.wait()
                log.info("stopping %d router processes", len(parts))
            finally:
                await asyncio.gather(*(part.stop(settings, hurry) for part in parts))
        finally:
            await asyncio.gather(*(keeper.stop(hurry) for keeper in keepers if keeper))
            log.info("stopped")


def _keepers(config: Config, token: str) -> list[WorkerKeeper | None]:
    """Who keeps up each model's workers; None where they are attached."""
    machine = this_machine(config.llm_configs)
    settings = config.router
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()
    place = 0
    keepers: list[WorkerKeeper | None] = []
    for llm in config.llm_configs:
        if llm.engine == "attached":
            keepers.append(None)
            continue
        keepers.append(
            WorkerKeeper(
                llm,
                settings,
                log_dir=Path(settings.log_dir) if settings.log_dir else cache_dir / "logs",
                token=token,
                machine=machine,
                first_place=place,
                limited=True,
            )
        )
        place += _places(llm)
    return keepers


def _places(llm: LLMConfig) -> int:
    return llm.replicas * gpus_per_worker(llm) if llm.engine == "vllm" else 0


async def _watch(
    token: str,
    number: int,  # noqa: ARG001  (the keeper's)
    worker_id: str,
    process: WorkerProcess,
    first: "asyncio.Future[None]",
) -> None:
    """Return when a worker has ended. Raises `WorkerUnreachableError` where it was silent for long."""
    if not first.done():
        first.set_result(None)
    loop = asyncio.get_running_loop()
    session, url = open_session(process.address, token)
    ended = asyncio.create_task(process.wait())
    heard = loop.time()
    try:
        while True:
            done, _ = await asyncio.wait({ended}, timeout=HEALTH_PERIOD_S)
            if done:
                log.warning("%s: ended; the end of its log:\n%s", worker_id, process.log_tail())
                return
            if await is_healthy(session, url):
                heard = loop.time()
            elif loop.time() - heard > SILENT_MAX_S:
                raise WorkerUnreachableError(f"{worker_id} was silent for {SILENT_MAX_S:g} s")
    finally:
        ended.cancel()
        await session.close()


class _RouterProcess:
    """One router process, started again whenever it ends. `ready` is done when it first can serve."""

    def __init__(self, part: Part, token: str) -> None:
        self._part = part
        self._environment = {**os.environ, LAUNCHED_TOKEN_ENV: token}
        self._process: asyncio.subprocess.Process | None = None
        self._life: asyncio.Task[None] | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.announcement = ""

    def start(self) -> None:
        """Begin to start it."""
        self._life = asyncio.create_task(self._live(), name=f"router {self._part.name}")
        self._life.add_done_callback(partial(life_ended, self.ready))

    async def _live(self) -> None:
        name = self._part.name
        backoff_s = BACKOFF_MIN_S
        while True:
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "router.part", name),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=self._environment,
                limit=LINE_MAX_BYTES,
                start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's to pass on
            )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(self._part, enc_hook=str) + b"\n")
            if line := await process.stdout.readline():
                self.announcement = msgspec.json.decode(line, type=str)
                backoff_s = BACKOFF_MIN_S
                if self.ready.done():
                    log.info("%s: serves again", name)
                else:
                    self.ready.set_result(None)
            status = await process.wait()
            if not self.ready.done():
                self.ready.set_exception(PartStartError(name, status))
                return
            log.warning("%s: ended with %d; starting again in %.1f s", name, status, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def stop(self, settings: RouterConfig, hurry: asyncio.Event) -> None:
        """Let it finish what runs, until `hurry` is set; then end it."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        self.ready.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        ended = asyncio.ensure_future(process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        self._terminate(process)
        await asyncio.wait(
            {ended, hurried},
            timeout=settings.drain_timeout_s + KILL_GRACE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurried.cancel()
        if not ended.done():
            self._terminate(process)
            await asyncio.wait({ended}, timeout=KILL_GRACE_S)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await ended

    def _terminate(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
