"""`router serve`: start everything in order, say how far it is, and stop without losing a request.

The order of stopping: no new leases, the running answers end (within `drain_timeout_s`), the workers
are told to stop, the process ends. A second signal cuts the wait short.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Sequence
from typing import Any, Final

import prometheus_client

from router.config import Config
from router.frontend.auth import Keys
from router.frontend.models import Models
from router.frontend.service import Frontend
from router.model import ModelService
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder
from router.workers.devices import gpus_per_worker, this_machine

log = logging.getLogger("lorayard")
GC_THRESHOLD: Final = 50_000


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises `OSError` where the port cannot be had, `RecordError` where the recording's file cannot,
    `StoreError` where a store cannot be read, and `WorkerStartError` where a worker does not come up.
    """
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    settings = config.router
    listener = listen(settings.host, settings.port)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    models: list[ModelService] = []
    keys = Keys.from_environment(settings.api_keys_env)
    recorder: Recorder | None = None
    try:
        if settings.record is not None:
            recorder = Recorder.open(settings.record, metrics)
        machine = this_machine(config.llm_configs)
        place = 0
        for llm in config.llm_configs:
            models.append(ModelService(llm, settings, metrics, machine, place))
            if llm.engine == "vllm":
                place += llm.replicas * gpus_per_worker(llm)
        frontend = Frontend(Models(models), settings, metrics, keys, recorder)
        try:
            await frontend.start(listener)
            for model in models:
                await model.start()
            address = url_of(listener)
            log.info("listening on %s/v1, waiting for workers", address)
            await _until_started(models, stop)
            _collect_seldom()
            if not stop.is_set():
                announce(address, models, with_key=bool(keys))
            await stop.wait()
            log.info("stopping: %d requests are running", frontend.in_flight)
            for model in models:
                model.router.close()
            await _drain(frontend, hurry, settings.drain_timeout_s)
        finally:
            await frontend.aclose()
    finally:
        try:
            await asyncio.gather(*(model.stop(hurry) for model in models))
        finally:
            listener.close()
            if recorder is not None:
                await recorder.aclose()
        log.info("stopped")


def _collect_seldom() -> None:
    """Look for garbage seldom, and never at what lives already.

    Requests go by reference counts. What looking costs them is a pause that grows with the streams
    that are open, and a twentieth of all CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])


async def _until_started(models: Sequence[ModelService], stop: asyncio.Event) -> None:
    starting = asyncio.gather(*(model.started() for model in models))
    stopping = asyncio.ensure_future(stop.wait())
    ends: tuple[asyncio.Future[Any], ...] = (starting, stopping)
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
    finally:
        stopping.cancel()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _drain(frontend: Frontend, hurry: asyncio.Event, timeout_s: float) -> None:
    drained = asyncio.create_task(frontend.drained())
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({drained, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        log.warning("%d requests are cut off", frontend.in_flight)
    drained.cancel()
    hurried.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Bind the front end's socket, before anything slow is begun. Raises `OSError`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """The address that a listener is reached at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(address: str, models: Sequence[ModelService], *, with_key: bool) -> None:
    """Print two lines to try: one for a base model, one for an adapter if there is one."""
    model = models[0]
    ids = [model.model_id]
    if model.catalog is not None and model.catalog.names:
        ids.append(f"{model.model_id}:{model.catalog.names[0]}")
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    lines = [
        f"curl -s {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{model_id}", "max_tokens": 48, "temperature": 0, "messages": '
        '[{"role": "user", "content": "What is the capital of France?"}]}\''
        for model_id in ids
    ]
    print(f"\nready on {address}/v1\n\n" + "\n\n".join(lines) + "\n", flush=True)  # noqa: T201
