"""One vLLM engine behind vLLM's own OpenAI application, plus the routes of a worker.

The application, its request handling and its scheduler are vLLM's, unchanged. Added are: our routes,
a stat logger that feeds the pushed state at every engine step, and adapters registered under an id
of their own for each version, so that neither weights nor prefix-cache blocks are ever mixed up.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextvars import ContextVar
from typing import Any, Final

from engine_worker import protocol
from engine_worker.options import WorkerOptions
from engine_worker.protocol import AdapterId, Info
from engine_worker.service import StateFeed, Tiers, WorkerError, WorkerService

# With the CPU build: one gigabyte of KV blocks, one thread an engine unless told otherwise. The
# build's own default takes half of the memory and every core, for each engine of the machine.
CPU_DEFAULTS: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# Set here, from the configuration's other fields or because the worker's routes need them.
OURS: Final = frozenset(
    {"model", "served_model_name", "worker_extension_cls", "disable_log_stats", "lora_modules",
     "host", "port", "uds", "api_key"}
)  # fmt: skip
RESIDENCY_PERIOD_S: Final = 1.0
UNSET: Final = object()

# The version that the request at hand was routed for; each request runs in a context of its own.
log = logging.getLogger("lorayard.worker")
asked_version: ContextVar[str] = ContextVar("asked_version", default="")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def serve(options: WorkerOptions, listener: socket.socket) -> int:
    """Boot the engine and serve until SIGTERM; return the exit status."""
    for name, value in CPU_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("VLLM_API_KEY", None)  # vLLM would ask for it beside our token
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if os.path.isdir(options.model):  # noqa: PTH112  (a hub id is no path)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import uvloop  # noqa: PLC0415

    return uvloop.run(_serve(options, listener))


async def _serve(options: WorkerOptions, listener: socket.socket) -> int:
    import uvicorn  # noqa: PLC0415
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state  # noqa: PLC0415
    from vllm.entrypoints.launchers.app import build_app  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415
    from vllm.version import __version__ as vllm_version  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine_args, args = _arguments(options)
    feed = StateFeed()
    engine = AsyncLLM.from_engine_args(
        engine_args,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[_stat_logger_factory(feed)],
    )
    try:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        lora = engine.vllm_config.lora_config
        adapters = VllmAdapters(engine, app.state.openai_serving_models, lora)
        info = _info(options, engine.vllm_config, vllm_version)
        service = WorkerService(adapters, info, feed, token=options.token)
        config = uvicorn.Config(
            WorkerApp(app, service, engine),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=3600,  # the router keeps connections; it closes them, not we
            timeout_graceful_shutdown=int(options.drain_timeout_s),
        )
        server = _server(config)
        app.state.server = server  # vLLM's error handler ends it when the engine has died
        serving = loop.create_task(server.serve(sockets=[listener]))
        watching = loop.create_task(_follow_residency(service, feed))
        stopping = loop.create_task(stop.wait())
        failing = loop.create_task(_engine_death(engine))
        done, _ = await asyncio.wait(
            {serving, stopping, failing}, return_when=asyncio.FIRST_COMPLETED
        )
        feed.close()
        server.should_exit = True
        for task in (watching, stopping, failing):
            task.cancel()
        await serving
        return 0 if stopping in done else 1
    finally:
        engine.shutdown()


def _info(options: WorkerOptions, config: Any, version: str) -> Info:  # noqa: ANN401
    """What the engine says of its own configuration."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    lora, cache, scheduler = config.lora_config, config.cache_config, config.scheduler_config
    return Info(
        engine="vllm",
        engine_version=version,
        model_id=options.model_id,
        max_loras=lora.max_loras if lora else 0,
        max_lora_rank=lora.max_lora_rank if lora else 0,
        pid=os.getpid(),
        device=current_platform.get_device_name(),
        max_cpu_loras=lora.max_cpu_loras if lora else 0,
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        async_scheduling=bool(scheduler.async_scheduling),
        kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        block_size=cache.block_size,
        max_ongoing_requests=options.max_ongoing_requests,
    )


async def _engine_death(engine: Any) -> None:  # noqa: ANN401  (vLLM publishes no types)
    """Return when the engine's own process has died; its HTTP would go on answering errors."""
    while not engine.errored:
        await asyncio.sleep(0.5)


async def _follow_residency(service: WorkerService, feed: StateFeed) -> None:
    """While requests run, the engine moves adapters between its tiers by itself: look again."""
    while True:
        await asyncio.sleep(RESIDENCY_PERIOD_S)
        if feed.state.running:
            await service.refresh()


def _arguments(options: WorkerOptions) -> tuple[Any, Any]:
    """VLLM's engine arguments, and the namespace that its application reads."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.entrypoints.launchers.cli_args import (  # noqa: PLC0415
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", options.model])
    kwargs = dict(options.engine_kwargs)
    if kwargs.get("enable_lora"):
        # One host slot more than GPU slots, so that a new adapter is loaded, and found good, before
        # the one that it replaces is dropped.
        kwargs.setdefault("max_cpu_loras", int(kwargs.get("max_loras", 1)) + 1)
    for name, value in kwargs.items():
        if name in OURS:
            raise SystemExit(f"engine_kwargs: `{name}` is set by the worker; leave it out")
        if getattr(args, name, UNSET) is UNSET:
            raise SystemExit(f"engine_kwargs: vLLM has no argument `{name}`")
        setattr(args, name, value)
    args.served_model_name = [options.model_id]
    args.api_key = None
    args.worker_extension_cls = "engine_worker.vllm_extension.LoraSlots"
    validate_parsed_serve_args(args)
    return AsyncEngineArgs.from_cli_args(args), args


class ServedAdapters(dict[str, Any]):
    """vLLM's registry of adapters by name, told apart by version where the request names one.

    vLLM looks a request's model up here (`OpenAIServingModels.lora_requests`). A worker may hold two
    versions of one name; the request then gets the one that it was routed for, and 404 where that
    is no longer held. Without a version it gets the one loaded last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[AdapterId, Any] = {}

    def serve(self, adapter: AdapterId, request: Any) -> None:  # noqa: ANN401
        """Answer for this version from now on, and for the bare name."""
        self._versions.pop(adapter, None)
        self._versions[adapter] = request
        self[adapter.name] = request

    def drop(self, adapter: AdapterId) -> None:
        """No longer answer for this version; the bare name falls to another one, if there is one."""
        dropped = self._versions.pop(adapter, None)
        if dropped is None or dict.get(self, adapter.name) is not dropped:
            return
        others = [
            request for other, request in self._versions.items() if other.name == adapter.name
        ]
        if others:
            self[adapter.name] = others[-1]
        else:
            del self[adapter.name]

    @property
    def adapters(self) -> Iterable[AdapterId]:
        """The versions that are served."""
        return self._versions

    def request_of(self, adapter: AdapterId) -> Any:  # noqa: ANN401
        """The request of a version, as vLLM takes it, or None."""
        return self._versions.get(adapter)

    def __contains__(self, name: object) -> bool:
        version = asked_version.get()
        if not version:
            return super().__contains__(name)
        return AdapterId(str(name), version) in self._versions

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        version = asked_version.get()
        if not version:
            return super().__getitem__(name)
        return self._versions[AdapterId(name, version)]


class VllmAdapters:
    """Adapters in one vLLM engine: the `Engine` of service.py."""

    def __init__(self, engine: Any, serving_models: Any, lora_config: Any) -> None:  # noqa: ANN401
        self._engine = engine
        self._ids = serving_models.lora_id_counter
        self._served = serving_models.lora_requests = ServedAdapters()
        # Adding and removing are two calls to the engine; between them it holds one adapter more,
        # and two such pairs at once could make it drop a third by its own choice.
        self._changing = asyncio.Lock()
        # With a host tier of its own, vLLM keeps what it drops from a slot, and drops it there in
        # its own order; without one, what is evicted has to be removed to make the room.
        self._keeps_evicted = bool(
            lora_config and lora_config.max_cpu_loras > lora_config.max_loras + 1
        )
        # What it may still have in host memory: it knows an adapter again by its id alone.
        self._kept: OrderedDict[AdapterId, Any] = OrderedDict()
        self._kept_max = lora_config.max_cpu_loras if lora_config else 0

    async def add(self, adapter: AdapterId, path: str, evict: Sequence[AdapterId]) -> Tiers | None:
        """Load through the engine, which checks the weights before it drops any.

        For an adapter that it holds the engine only notes the use. Each call to an engine that is busy
        waits for the end of a step; what follows the load is sent at once, in order, so that it waits
        for one step and not for one each.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        async with self._changing:
            request = self._served.request_of(adapter) or self._kept.pop(adapter, None)
            if request is None or request.lora_path != path:
                request = LoRARequest(
                    lora_name=adapter.name, lora_int_id=self._ids.inc(1), lora_path=path
                )
            try:
                await self._engine.add_lora(request)
            except Exception as error:
                if self._engine.errored:
                    raise WorkerError(500, f"the engine is dead: {error}") from error
                message = f"vLLM refused {adapter.name}: {_last_line(error)}"
                raise WorkerError(400, message) from error
            self._served.serve(adapter, request)
            drops = [self._drop(evicted) for evicted in evict]
            *dropped, tiers = await asyncio.gather(*drops, self.residency(), return_exceptions=True)
            for failure in dropped:
                if isinstance(failure, BaseException):
                    raise WorkerError(500, f"vLLM did not drop an adapter: {_last_line(failure)}")
            if isinstance(tiers, BaseException):  # what was loaded is loaded
                log.error("the engine does not say which adapters it holds: %s", tiers)
                return None
            return tiers

    async def remove(self, adapter: AdapterId) -> None:
        """Take the adapter out of the engine; requests that run on it keep their weights."""
        async with self._changing:
            request = self._served.request_of(adapter) or self._kept.get(adapter)
            if request is None:
                return
            try:
                await self._engine.remove_lora(request.lora_int_id)
            except Exception as error:
                raise WorkerError(
                    500, f"vLLM did not drop {adapter.name}: {_last_line(error)}"
                ) from error
            self._served.drop(adapter)
            self._kept.pop(adapter, None)

    async def _drop(self, adapter: AdapterId) -> None:
        request = self._served.request_of(adapter)
        self._served.drop(adapter)
        if request is None:
            return
        if not self._keeps_evicted:
            await self._engine.remove_lora(request.lora_int_id)
            return
        self._kept[adapter] = request
        while len(self._kept) > self._kept_max:
            self._kept.popitem(last=False)

    async def residency(self) -> Tiers:
        """Ask the engine's processes; the first speaks for all, they hold the same.

        Of adapters that are no longer served none is told to be in a slot, though the engine may
        not have needed the slot yet: a request for them would find nothing.
        """
        served = {
            self._served.request_of(adapter).lora_int_id: adapter
            for adapter in self._served.adapters
        }
        kept = {request.lora_int_id: adapter for adapter, request in self._kept.items()}
        if not served and not kept:
            return (), ()
        in_slots, known = await asyncio.gather(
            self._engine.collective_rpc("lorayard_gpu_lora_ids"), self._engine.list_loras()
        )
        slots, held = set(in_slots[0]), sorted(known)
        gpu = tuple(served[number] for number in held if number in served and number in slots)
        elsewhere = {**kept, **{number: served[number] for number in served if number not in slots}}
        return gpu, tuple(elsewhere[number] for number in held if number in elsewhere)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _stat_logger_factory(feed: StateFeed) -> Any:  # noqa: ANN401
    from vllm.v1.metrics.loggers import StatLoggerBase  # noqa: PLC0415

    class FeedLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM publishes no types
        """Takes each step's scheduler counts to the feed."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:  # noqa: ANN401
            pass

        def record(
            self,
            scheduler_stats: Any,  # noqa: ANN401
            iteration_stats: Any,  # noqa: ANN401, ARG002
            mm_cache_stats: Any = None,  # noqa: ANN401, ARG002
            engine_idx: int = 0,  # noqa: ARG002
        ) -> None:
            if scheduler_stats is not None:
                feed.set_load(
                    running=scheduler_stats.num_running_reqs,
                    waiting=scheduler_stats.num_waiting_reqs
                    + scheduler_stats.num_skipped_waiting_reqs,
                    kv_usage=scheduler_stats.kv_cache_usage,
                )

        def log_engine_initialized(self) -> None:
            pass

    return FeedLogger


class WorkerApp:
    """vLLM's application with the worker's routes before it, behind the token."""

    def __init__(self, app: Any, service: WorkerService, engine: Any) -> None:  # noqa: ANN401
        self._app = app
        self._service = service
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        router = headers.get(protocol.ROUTER_HEADER.lower(), "")
        if path != protocol.HEALTH and not self._service.authorized(headers.get("authorization")):
            error = WorkerError(401, "no or wrong worker token")
            await _answer(send, 401, error.body())
        elif not path.startswith(protocol.PREFIX):
            asked_version.set(headers.get(protocol.VERSION_HEADER.lower(), ""))
            if method == "POST" and path.startswith("/v1/"):
                await self._admitted(scope, headers, receive, send)
            else:
                await self._app(scope, receive, self._telling_death(send))
        elif (method, path) == ("GET", protocol.STATE):
            await _stream(receive, send, self._service.lines(router))
        else:
            await self._route(method, path, router, receive, send)

    async def _admitted(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send
    ) -> None:
        """Serve an OpenAI request, unless it is refused because of other routers."""
        try:
            async with self._service.admitted(headers):
                await self._app(scope, receive, self._telling_death(send))
        except WorkerError as error:  # vLLM's application raises none
            await _answer(send, error.status, error.body(), error.headers())

    def _telling_death(self, send: Send) -> Send:
        """Answer 503, which a router takes elsewhere, where the 500 is a dead engine's."""

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message.get("status") == 500 and self._engine.errored:  # noqa: PLR2004
                message["status"] = 503
            await send(message)

        return sent

    async def _route(
        self, method: str, path: str, router: str, receive: Receive, send: Send
    ) -> None:
        service = self._service
        try:
            match method, path:
                case "GET", protocol.INFO:
                    body = service.info()
                case "GET", protocol.ADAPTERS:
                    body = service.state(router)
                case "GET", protocol.OCCUPANCY:
                    body = service.occupancy()
                case "POST", protocol.LOAD:
                    body = await service.load(await _body(receive), router)
                case "POST", protocol.UNLOAD:
                    body = await service.unload(await _body(receive), router)
                case _:
                    raise WorkerError(404, f"no route {method} {path}")
        except WorkerError as error:
            await _answer(send, error.status, error.body())
        else:
            await _answer(send, 200, body)


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise WorkerError(400, "the body was cut short")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(
    send: Send, status: int, body: bytes, more: Mapping[str, str] | None = None
) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(receive: Receive, send: Send, lines: AsyncIterator[bytes]) -> None:
    headers = [(b"content-type", b"application/x-ndjson")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.create_task(_disconnected(receive))
    try:
        async for line in lines:
            if gone.done():
                return
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _server(config: Any) -> Any:  # noqa: ANN401
    import uvicorn  # noqa: PLC0415

    class Server(uvicorn.Server):  # type: ignore[misc]  # follow_imports = skip
        """uvicorn without its signal handlers: SIGTERM is ours, to drain by."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)
