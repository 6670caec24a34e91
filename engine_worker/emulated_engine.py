"""An engine that costs nothing: vLLM's routes and timing, with made-up words for answers.

It stands where vLLM is not installed and where a test needs seconds, not minutes. Its timing is the
simulator's engine model, paced by the real clock. Its words are a fixed function of the model id and
the prompt, so that the same request gives the same answer on every worker, each adapter answers
differently, and streaming equals not streaming. It says of itself that it is emulated.
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import simpy
from aiohttp import web

from engine_worker import protocol
from engine_worker.options import WorkerOptions
from engine_worker.protocol import AdapterId, Info
from engine_worker.service import StateFeed, Tiers, WorkerError, WorkerService
from sim.engine import EngineRequest, SimEngine, engine_limits
from sim.environment import Environment
from sim.latency import CalibrationError, LatencyModel, read_calibration
from sim.pace import Pacer

VERSION: Final = "1"
WORDS: Final = [
    "river",
    "stone",
    "lantern",
    "meadow",
    "copper",
    "winter",
    "signal",
    "harbor",
    "orchard",
    "thunder",
    "velvet",
    "compass",
    "ember",
    "glacier",
    "saddle",
    "whisper",
    "marble",
    "canyon",
    "feather",
    "anchor",
]
EMBEDDING_SIZE: Final = 16
HEADER_MAX_BYTES: Final = 100 * 2**20


class _Message(msgspec.Struct):
    role: str
    content: Any = ""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Request(msgspec.Struct):
    """What the emulation understands of an OpenAI request; the rest is let be."""

    model: str | None = None
    messages: list[_Message] | None = None
    prompt: Any = None
    input: Any = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


def serve(options: WorkerOptions, listener: socket.socket) -> int:
    """Serve until SIGTERM; return the exit status."""
    try:
        import uvloop  # noqa: PLC0415  (not on every platform)
    except ImportError:
        return asyncio.run(_serve(options, listener))
    return uvloop.run(_serve(options, listener))


async def _serve(options: WorkerOptions, listener: socket.socket) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        worker = EmulatedWorker(options)
    except (CalibrationError, msgspec.ValidationError) as error:
        raise SystemExit(f"engine_kwargs: {error}") from None
    runner = web.AppRunner(
        worker.application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=options.drain_timeout_s,
        keepalive_timeout=3600,
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()
    await stop.wait()
    worker.close()
    await runner.cleanup()
    return 0


class EmulatedAdapters:
    """Adapters in the emulated engine: the `Engine` of service.py."""

    def __init__(self, engine: SimEngine, pacer: Pacer) -> None:
        self._engine = engine
        self._pacer = pacer
        # What each version's weights are, loaded last at the end.
        self._weights: dict[AdapterId, str] = {}

    async def add(self, adapter: AdapterId, path: str, evict: Sequence[AdapterId]) -> Tiers:
        """Check the weights as an engine would, then load for as long as the model says."""
        digest = await asyncio.to_thread(check_weights, Path(path))
        self._pacer.catch_up()
        await self._happened(self._engine.load(adapter, evict[0] if evict else None))
        self._weights.pop(adapter, None)
        self._weights[adapter] = digest
        for victim in evict:
            self._weights.pop(victim, None)
        for victim in evict[1:]:
            self._engine.evict(victim)
        return await self.residency()

    async def remove(self, adapter: AdapterId) -> None:
        """Drop the adapter from both tiers, at the end of the step under way."""
        self._weights.pop(adapter, None)
        self._pacer.catch_up()
        await self._happened(self._engine.unload(adapter))

    async def _happened(self, event: simpy.Event) -> None:
        """Wait until the engine has come to it."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def happened(_: simpy.Event) -> None:
            if not over.done():
                over.set_result(None)

        event.callbacks.append(happened)
        self._pacer.arm()
        await over

    @property
    def names(self) -> list[str]:
        """The names that are served."""
        return list(dict.fromkeys(adapter.name for adapter in self._weights))

    def find(self, name: str, version: str) -> tuple[AdapterId, str] | None:
        """The version asked for, or the one loaded last; with the digest of its weights."""
        for adapter, digest in reversed(self._weights.items()):
            if adapter.name == name and version in {"", adapter.version}:
                return adapter, digest
        return None

    async def residency(self) -> Tiers:
        """Read off the model."""
        gpu, host = self._engine.gpu, self._engine.host
        # The model's keys are the ids that `add` gave it.
        in_slots = tuple(adapter for adapter in gpu if isinstance(adapter, AdapterId))
        elsewhere = tuple(
            adapter for adapter in host if adapter not in gpu and isinstance(adapter, AdapterId)
        )
        return in_slots, elsewhere


def check_weights(folder: Path) -> str:
    """Read `adapter_model.safetensors` as a loader does; its digest. Raises `WorkerError`."""
    path = folder / "adapter_model.safetensors"
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_MAX_BYTES:
                raise WorkerError(400, f"{path.name}: not a safetensors file")
            tensors = msgspec.json.decode(file.read(size), type=dict[str, Any])
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        if path.stat().st_size != 8 + size + max(ends, default=0):
            raise WorkerError(400, f"{path.name} is cut short")
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise WorkerError(400, f"{path.name}: {error.strerror}") from None
    except (msgspec.DecodeError, KeyError, TypeError, IndexError):
        raise WorkerError(400, f"{path.name}: not a safetensors file") from None


class EmulatedWorker:
    """The engine model, its pacer, and the routes."""

    def __init__(self, options: WorkerOptions) -> None:
        calibration = read_calibration(options.calibration or "emulated")
        limits = engine_limits(options.engine_kwargs, calibration.defaults)
        with_lora = bool(options.engine_kwargs.get("enable_lora"))
        slots = limits.max_loras if with_lora else 0
        latency = LatencyModel(calibration, slots=slots, rank_max=limits.max_lora_rank)
        self._model_id = options.model_id
        self._env = Environment()
        self._pacer = Pacer(self._env)
        self._feed = StateFeed()
        self._engine = SimEngine(self._env, latency, limits, on_change=self._report, jump=False)
        self._adapters = EmulatedAdapters(self._engine, self._pacer)
        info = Info(
            engine="emulated",
            engine_version=VERSION,
            model_id=options.model_id,
            max_loras=slots,
            max_lora_rank=limits.max_lora_rank,
            pid=os.getpid(),
            device="none",
            max_cpu_loras=self._engine.host_slots,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            async_scheduling=limits.async_scheduling,
            kv_tokens=self._engine.kv.total * limits.block_size,
            block_size=limits.block_size,
            max_ongoing_requests=options.max_ongoing_requests,
        )
        self._service = WorkerService(self._adapters, info, self._feed, token=options.token)
        self._max_model_len = limits.max_model_len

    def _report(self) -> None:
        engine = self._engine
        self._feed.set_load(
            running=engine.running, waiting=engine.waiting, kv_usage=engine.kv_usage
        )

    def close(self) -> None:
        """End the state streams; requests run on."""
        self._feed.close()

    def application(self) -> web.Application:
        """The web application: vLLM's routes as far as they are emulated, and the worker's."""
        app = web.Application(middlewares=[self._guard], client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get(protocol.HEALTH, self._health),
                web.get(protocol.INFO, self._info),
                web.get(protocol.ADAPTERS, self._state),
                web.get(protocol.OCCUPANCY, self._occupancy),
                web.get(protocol.STATE, self._state_stream),
                web.post(protocol.LOAD, self._load),
                web.post(protocol.UNLOAD, self._unload),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.post("/v1/embeddings", self._embeddings),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:  # noqa: ANN401
        if request.path != protocol.HEALTH and not self._service.authorized(
            request.headers.get("Authorization")
        ):
            return _json(WorkerError(401, "no or wrong worker token").body(), 401)
        response: web.StreamResponse
        try:
            if request.method == "POST" and request.path.startswith("/v1/"):
                async with self._service.admitted(_names_in_lower_case(request)):
                    response = await handler(request)
            else:
                response = await handler(request)
        except WorkerError as error:
            return _json(error.body(), error.status, error.headers())
        except web.HTTPException as error:
            return _json(WorkerError(error.status, error.reason).body(), error.status)
        return response

    # The worker's routes.

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _info(self, _: web.Request) -> web.Response:
        return _json(self._service.info())

    async def _state(self, request: web.Request) -> web.Response:
        return _json(self._service.state(_router(request)))

    async def _occupancy(self, _: web.Request) -> web.Response:
        return _json(self._service.occupancy())

    async def _load(self, request: web.Request) -> web.Response:
        return _json(await self._service.load(await request.read(), _router(request)))

    async def _unload(self, request: web.Request) -> web.Response:
        return _json(await self._service.unload(await request.read(), _router(request)))

    async def _state_stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            async for line in self._service.lines(_router(request)):
                await response.write(line)
        return response

    # vLLM's routes.

    async def _models(self, _: web.Request) -> web.Response:
        ids = [self._model_id, *self._adapters.names]
        data = [{"id": name, "object": "model", "owned_by": "emulated"} for name in ids]
        return _json(msgspec.json.encode({"object": "list", "data": data}))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body, adapter, weights = await self._read(request)
        if body.messages is None:
            raise WorkerError(400, "`messages` is missing")
        prompt = "\n".join(f"{message.role}: {message.content}" for message in body.messages)
        tokens = body.max_completion_tokens or body.max_tokens or 24
        return await self._generate(request, body, adapter, weights, prompt, tokens, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body, adapter, weights = await self._read(request)
        if body.prompt is None:
            raise WorkerError(400, "`prompt` is missing")
        tokens = body.max_tokens or 16
        given = body.prompt
        length = len(given) if is_token_ids(given) else None
        prompt = str(given)
        return await self._generate(
            request, body, adapter, weights, prompt, tokens, chat=False, prompt_tokens=length
        )

    async def _embeddings(self, request: web.Request) -> web.Response:
        body, adapter, _ = await self._read(request)
        if body.input is None:
            raise WorkerError(400, "`input` is missing")
        texts = body.input if isinstance(body.input, list) else [body.input]
        total = 0
        data = []
        for index, text in enumerate(texts):
            count = count_tokens(str(text))
            total += count
            async for _ in self._run(adapter, count, 1):
                pass
            digest = hashlib.blake2b(f"{body.model}\n{text}".encode(), digest_size=EMBEDDING_SIZE)
            vector = [round(byte / 127.5 - 1, 6) for byte in digest.digest()]
            data.append({"object": "embedding", "index": index, "embedding": vector})
        usage = {"prompt_tokens": total, "total_tokens": total}
        answer = {"object": "list", "model": body.model, "data": data, "usage": usage}
        return _json(msgspec.json.encode(answer))

    async def _read(self, request: web.Request) -> tuple[_Request, AdapterId | None, str]:
        """The body, and the adapter with its weights' digest."""
        try:
            body = msgspec.json.decode(await request.read(), type=_Request)
        except msgspec.DecodeError as error:
            raise WorkerError(400, str(error)) from None
        if body.model in {None, self._model_id}:
            return body, None, ""
        assert body.model is not None
        version = request.headers.get(protocol.VERSION_HEADER, "")
        found = self._adapters.find(body.model, version)
        if found is None:
            raise WorkerError(404, f"The model `{body.model}` does not exist.")
        return body, *found

    async def _run(
        self, adapter: AdapterId | None, prompt_tokens: int, tokens: int
    ) -> AsyncGenerator[int, None]:
        """Run a request on the engine model; yield the number of each token as it comes."""
        come: asyncio.Queue[None] = asyncio.Queue()
        self._pacer.catch_up()
        engine_request = EngineRequest(
            adapter=adapter,
            prompt_tokens=prompt_tokens,
            output_tokens=tokens,
            on_token=lambda: come.put_nowait(None),
        )
        if not self._engine.fits(engine_request):
            raise WorkerError(
                400,
                f"{prompt_tokens} prompt tokens and {tokens} to generate are more than this "
                f"model's context of {self._max_model_len}",
            )
        self._engine.submit(engine_request)
        self._pacer.arm()
        try:
            for number in range(tokens):
                await come.get()
                yield number
        finally:
            self._pacer.catch_up()
            self._engine.abort(engine_request)
            self._pacer.arm()

    async def _generate(
        self,
        request: web.Request,
        body: _Request,
        adapter: AdapterId | None,
        weights: str,
        prompt: str,
        tokens: int,
        *,
        chat: bool,
        prompt_tokens: int | None = None,
    ) -> web.StreamResponse:
        model = body.model or self._model_id
        if tokens > self._max_model_len:  # before so many words are made
            raise WorkerError(
                400, f"{tokens} tokens are more than this model's context of {self._max_model_len}"
            )
        pieces = answer_words(model, weights, prompt, tokens)
        if prompt_tokens is None:
            prompt_tokens = count_tokens(prompt)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        digest = hashlib.blake2b(f"{model}\n{prompt}".encode(), digest_size=12).hexdigest()
        head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + digest,
            "created": int(time.time()),
            "model": model,
        }
        running = self._run(adapter, prompt_tokens, tokens)
        if not body.stream:
            async for _ in running:
                pass
            text = "".join(pieces)
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
            if chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            kind = "chat.completion" if chat else "text_completion"
            answer = {**head, "object": kind, "choices": [choice], "usage": usage}
            return _json(msgspec.json.encode(answer))
        kind = "chat.completion.chunk" if chat else "text_completion"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        async with contextlib.aclosing(running):
            async for number in running:
                if not response.prepared:
                    await response.prepare(request)
                last = number == tokens - 1
                choice = {"index": 0, "finish_reason": "length" if last else None, "logprobs": None}
                if chat:
                    role = {} if number else {"role": "assistant"}
                    choice["delta"] = {**role, "content": pieces[number]}
                else:
                    choice["text"] = pieces[number]
                await response.write(_event({**head, "object": kind, "choices": [choice]}))
        if body.stream_options is not None and body.stream_options.include_usage:
            await response.write(_event({**head, "object": kind, "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def answer_words(model: str, weights: str, prompt: str, tokens: int) -> list[str]:
    """The answer's tokens: it names its model, then says words drawn by weights and prompt."""
    seed = hashlib.blake2b(f"{model}\n{weights}\n{prompt}".encode(), digest_size=32).digest()
    pieces = [f"[emulated {model}]"]
    pieces += [f" {WORDS[(seed[i % 32] + i // 32) % len(WORDS)]}" for i in range(1, tokens)]
    return pieces[:tokens]


def is_token_ids(prompt: object) -> bool:
    """Whether a prompt is given as token ids: its length is then exact."""
    return isinstance(prompt, list) and all(isinstance(one, int) for one in prompt)


def count_tokens(text: str) -> int:
    """About four characters a token, as English has."""
    return max(1, len(text) // 4)


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _router(request: web.Request) -> str:
    return request.headers.get(protocol.ROUTER_HEADER, "")


def _names_in_lower_case(request: web.Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
