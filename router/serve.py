"""`router serve`: start everything in order, say how far it is, and stop without losing a request.

The order of stopping: no new leases, the running answers end (within `drain_timeout_s`), the workers
are told to stop, the process ends. A second signal cuts the wait short.
"""

import asyncio
import gc
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import prometheus_client

from router.adapters.transfer import Downloads
from router.config import Config
from router.core.quotas import Quotas
from router.frontend.admin_key import AdminKey
from router.frontend.gate import Gate
from router.frontend.models import Models
from router.frontend.service import Frontend
from router.model import ModelService
from router.part import Alone, Part, bound
from router.stopping import listen_for_signals, until_started
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder
from router.workers.devices import gpus_per_worker, this_machine

log = logging.getLogger("lorayard")
GC_THRESHOLD: Final = 50_000


async def serve(config: Config, part: Part | None = None) -> None:
    """Serve until SIGTERM or SIGINT, alone or as `part` of several processes.

    Raises `OSError` where the port cannot be had, `RecordError` where the recording's file cannot,
    `ConfigError` where the file of keys cannot be used or a key is a client's and an operator's,
    `RegistryError` where what was decided of adapters cannot be kept, `StoreError` where a store cannot
    be read, and `WorkerStartError` where a worker does not come up.
    """
    stop, hurry = listen_for_signals()
    settings = config.router
    admin_key = AdminKey.from_environment(settings)
    listener = bound(settings.host, settings.port, shared=part is not None)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    models: list[ModelService] = []
    share = 1.0 if part is None else 1.0 / part.count
    gate = Gate(settings, share=share, admin_key=admin_key)
    recorder: Recorder | None = None
    try:
        await gate.open()
        if settings.record is not None:
            recorder = Recorder.open(settings.record, metrics)
        models += _services(config, metrics, gate.quotas, alone=part is None)
        frontend = Frontend(Models(models), settings, metrics, gate.keys, recorder, admin_key)
        try:
            if part is not None:
                await part.share(metrics)
            for model in models:  # before any request: what names mean is known by then
                await model.start()
            await frontend.start(listener)
            address = url_of(listener)
            log.info("listening on %s/v1, waiting for workers", address)
            await until_started(*(model.started() for model in models), stop=stop)
            _collect_seldom()
            if not stop.is_set():
                text = announcement(address, models, with_key=not gate.keys.anyone)
                (part or Alone).ready(text)
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
            await gate.aclose()
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


def _services(
    config: Config, metrics: Metrics, quotas: Quotas, *, alone: bool
) -> Iterator[ModelService]:
    """Each model's, with its share of what this machine has."""
    machine = this_machine(config.llm_configs)
    settings = config.router
    downloads = Downloads(settings.download_connections, settings.download_mib_per_s)
    place = 0
    for llm in config.llm_configs:
        yield ModelService(llm, settings, metrics, downloads, quotas, machine, place, alone=alone)
        if llm.engine == "vllm":
            place += llm.replicas * gpus_per_worker(llm)


async def _drain(frontend: Frontend, hurry: asyncio.Event, timeout_s: float) -> None:
    drained = asyncio.create_task(frontend.drained())
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({drained, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        log.warning("%d requests are cut off", frontend.in_flight)
    drained.cancel()
    hurried.cancel()


def url_of(listener: socket.socket) -> str:
    """The address that a listener is reached at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announcement(address: str, models: Sequence[ModelService], *, with_key: bool) -> str:
    """That it is ready, with two lines to try: for a base model, and for an adapter if there is one."""
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
    return f"\nready on {address}/v1\n\n" + "\n\n".join(lines) + "\n"
