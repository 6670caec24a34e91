"""The routes: from an OpenAI request to a job, a lease, a relay, and an outcome with a name.

    GET  /health /ready /metrics     no key needed
    GET  /v1/models /v1/models/{id}  answered here, from the catalog
    POST /v1/... with a JSON body    passed on to a worker, whatever it is that vLLM serves there

A request's model is looked up before any worker is touched. Whatever happens, the lease is left, the
outcome is counted once, and the answer carries `x-request-id`, `x-worker` and `x-adapter`.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from router.adapters.store import StoreError
from router.config import RouterConfig
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, LoadFault, Outcome, Rejected
from router.core.lease import Lease
from router.frontend.auth import Keys
from router.frontend.errors import ApiError, load_failed, model_not_found, rejected
from router.frontend.head import BYTES_PER_TOKEN, Head, parse_head
from router.frontend.prefix import prefix_of
from router.frontend.relay import (
    AdapterNotThereError,
    AnswerCutError,
    WorkerFailedError,
    WorkerStalledError,
    forwarded_headers,
    relay,
    upstream_path,
)
from router.frontend.terms import Terms, TermsReader
from router.model import ModelService
from router.telemetry.answer import Answer
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder, Recording

log = logging.getLogger("lorayard.frontend")

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})
# Of one worker alone in vLLM; here the store and the router decide what is loaded.
NOT_PASSED_ON: Final = frozenset({"load_lora_adapter", "unload_lora_adapter"})
REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Frontend:
    """The web application over the models that are served."""

    def __init__(
        self,
        models: Sequence[ModelService],
        config: RouterConfig,
        metrics: Metrics,
        keys: Keys,
        recorder: Recorder | None = None,
    ) -> None:
        self._models = {model.model_id: model for model in models}
        self._config = config
        self._metrics = metrics
        self._keys = keys
        self._recorder = recorder
        self._terms = TermsReader(config)
        self._created = int(time.time())
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def application(self) -> web.Application:
        """The application to serve."""
        app = web.Application(
            middlewares=[self._stamped], client_max_size=self._config.max_body_bytes
        )
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._page),
                web.get("/v1/models", self._list_models),
                web.get("/v1/models/{id:.+}", self._show_model),
                web.post("/v1/{path:.+}", self._pass_on),
            ]
        )
        return app

    @property
    def in_flight(self) -> int:
        """Requests that are being passed on."""
        return self._in_flight

    async def drained(self) -> None:
        """Return when no request is being passed on."""
        await self._idle.wait()

    # Around every answer.

    @web.middleware
    async def _stamped(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, turn errors into answers, and put the three headers on all of them."""
        given = request.headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request["request_id"] = request_id
        request["stamps"] = stamps = {
            "X-Request-Id": request_id,
            "X-Worker": "none",
            "X-Adapter": AdapterUse.NONE.value,
        }
        try:
            if request.path not in OPEN_PATHS and not self._keys.accept(request.headers):
                raise ApiError(
                    401,
                    "No or wrong API key; send `Authorization: Bearer KEY`, or `x-api-key: KEY`.",
                    code="invalid_api_key",
                )
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        except web.HTTPRequestEntityTooLarge:
            limit = self._config.max_body_bytes
            response = ApiError(413, f"The body is larger than {limit:,} bytes.").response()
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}."
            response = ApiError(error.status, message).response()
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            log.exception("%s: a fault of the router", request_id)
            message = "The router failed; its log has this request's id."
            response = ApiError(500, message, kind="server_error").response()
        if not response.prepared:
            response.headers.update(stamps)
        return response

    # Answered here.

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        states = {name: model.ready for name, model in self._models.items()}
        ready = all(states.values())
        return web.json_response({"ready": ready, "models": states}, status=200 if ready else 503)

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.page(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _list_models(self, _: web.Request) -> web.Response:
        data = []
        for model in self._models.values():
            data.append(self._card(model, None))
            if model.catalog is not None:
                data += [self._card(model, name) for name in model.catalog.names]
        return _json({"object": "list", "data": data})

    async def _show_model(self, request: web.Request) -> web.Response:
        model, adapter = await self._resolve(request.match_info["id"])
        return _json(self._card(model, adapter.name if adapter else None))

    def _card(self, model: ModelService, adapter: str | None) -> dict[str, Any]:
        return {
            "id": f"{model.model_id}:{adapter}" if adapter else model.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "lorayard",
            "root": adapter or model.llm.model_loading_config.source,
            "parent": model.model_id if adapter else None,
        }

    # Passed on.

    async def _resolve(self, model_id: str | None) -> tuple[ModelService, AdapterRef | None]:
        """The model and adapter of an id, or 404. Without an id, the only model there is."""
        if model_id is None:
            if len(self._models) > 1:
                raise ApiError(
                    400,
                    f"`model` is missing; name one of {', '.join(self._models)}.",
                    param="model",
                )
            return next(iter(self._models.values())), None
        base, colon, name = model_id.partition(":")
        model = self._models.get(base)
        if model is None:
            raise model_not_found(model_id)
        if not colon:
            return model, None
        try:
            adapter = await model.find(name)
        except StoreError as error:
            raise load_failed(LoadError(LoadFault.STORE_UNAVAILABLE, str(error))) from None
        if adapter is None:
            raise model_not_found(model_id)
        return model, adapter

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["path"] in NOT_PASSED_ON:
            raise ApiError(
                404, "Adapters are loaded when they are asked for; put new ones into the store."
            )
        url = request.rel_url
        path = upstream_path(url.raw_path.removeprefix("/v1/"), url.raw_query_string)
        if path is None:
            raise ApiError(404, f"No route {url.path}.")
        arrived = asyncio.get_running_loop().time()
        terms = self._terms.read(request.headers)
        body = await self._read(request)
        head = parse_head(body)
        model, adapter = await self._resolve(head.model)
        self._in_flight += 1
        self._idle.clear()
        exchange = Exchange(self, request, body, head, terms, model, adapter, path, arrived)
        try:
            return await exchange.run()
        except ApiError:
            raise
        except Exception:
            exchange.outcome = Outcome.ROUTER_FAILED
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            exchange.ended()

    async def _read(self, request: web.Request) -> bytes:
        """The whole body, which may pause for as long as an answer may."""
        try:
            async with asyncio.timeout(self._config.idle_timeout_s):
                return await request.read()
        except TimeoutError:
            raise ApiError(408, "The body did not come to its end in time.") from None
        except web.RequestPayloadError as error:
            raise ApiError(400, f"The body cannot be read: {error}.") from None

    @property
    def config(self) -> RouterConfig:
        """The router's settings."""
        return self._config

    @property
    def metrics(self) -> Metrics:
        """Where requests are counted."""
        return self._metrics

    @property
    def recorder(self) -> Recorder | None:
        """Where requests are recorded, if they are."""
        return self._recorder


class Exchange:
    """One request from its job to its outcome, over as many workers as its retries allow."""

    def __init__(
        self,
        frontend: Frontend,
        request: web.Request,
        body: bytes,
        head: Head,
        terms: Terms,
        model: ModelService,
        adapter: AdapterRef | None,
        path: str,
        arrived: float,
    ) -> None:
        self._frontend = frontend
        self._request = request
        self._body = body
        self._path = path
        self._looked_again = False
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._arrived = arrived
        self._tokens = 0
        self.outcome = Outcome.CLIENT_GONE  # until another is known: cancelled before an answer
        self._job = Job(
            request["request_id"],
            adapter,
            prompt_tokens=len(body) // BYTES_PER_TOKEN,
            max_output_tokens=head.output_tokens,
            tenant=terms.tenant,
            priority=terms.priority,
            deadline=None if terms.deadline_s is None else arrived + terms.deadline_s,
            refuse_cold=terms.refuse_cold,
            prefix=prefix_of(body),
        )
        self._recording: Recording | None = None
        if frontend.recorder is not None:
            session_id = request.headers.get("x-session-id", "")
            self._recording = frontend.recorder.begin(
                self._job,
                model.model_id,
                session_id=session_id if REQUEST_ID.fullmatch(session_id) else "",
                body=body,
            )

    def ended(self) -> None:
        """Count the request, and hand it to the recorder, now that its outcome is known."""
        metrics, name = self._frontend.metrics, self._model.model_id
        metrics.ended(name, self.outcome)
        if self._job.tenant:
            metrics.tenant_ended(name, self._job.tenant, self.outcome, self._tokens)
        if self._recording is not None:
            assert self._frontend.recorder is not None
            self._frontend.recorder.end(self._recording, self.outcome)

    async def run(self) -> web.StreamResponse:
        """Answer the client. Raises `ApiError` where that is the answer."""
        left = self._frontend.config.max_retries
        while True:
            self.outcome = Outcome.CLIENT_GONE
            lease = self._model.router.lease(self._job)
            if self._recording is not None:
                self._recording.leases.append(lease)
            try:
                async with lease:
                    return await self._relay(lease)
            except Rejected as error:
                self.outcome = error.outcome
                raise rejected(error) from None
            except LoadError as error:
                self.outcome = Outcome.LOAD_FAILED
                if self._recording is not None and error.worker is not None:
                    self._recording.worker = error.worker
                if await self._knows_a_newer(error):
                    continue  # no worker failed, so it costs no retry
                if not left or error.fault is not LoadFault.WORKER:
                    raise load_failed(error) from None
                if error.worker is not None:
                    self._job.avoid = (*self._job.avoid, error.worker)
            except WorkerStalledError as error:
                self.outcome = Outcome.WORKER_STALLED
                if not left:
                    raise self._worker_error(504, error) from None
            except (WorkerFailedError, AdapterNotThereError) as error:
                self.outcome = Outcome.WORKER_FAILED
                if not left:
                    raise self._worker_error(502, error) from None
            left -= 1
            self._frontend.metrics.retries.labels(self._model.model_id).inc()

    async def _knows_a_newer(self, error: LoadError) -> bool:
        """Whether the adapter had changed in the store, and the job is for what it is now; once."""
        if error.fault is not LoadFault.ADAPTER_CHANGED or self._looked_again:
            return False
        self._looked_again = True
        assert self._job.adapter is not None
        try:
            adapter = await self._model.find(self._job.adapter.name, afresh=True)
        except StoreError:
            return False
        if adapter is None:
            raise model_not_found(self._job.adapter.model_id) from None
        self._job.adapter = adapter
        return True

    def _worker_error(self, status: int, error: Exception) -> ApiError:
        worker = self._request["stamps"]["X-Worker"]
        return ApiError(
            status,
            f"Worker {worker} failed before its answer: {error}.",
            kind="server_error",
            code=self.outcome.value,
        )

    async def _relay(self, lease: Lease) -> web.StreamResponse:
        metrics, name, config = self._frontend.metrics, self._model.model_id, self._frontend.config
        worker_id = lease.worker.id
        stamps = self._request["stamps"]
        stamps["X-Worker"] = worker_id
        stamps["X-Adapter"] = lease.use.value
        if lease.queued_s:
            metrics.queue_s.labels(name).observe(lease.queued_s)
        recorder = self._frontend.recorder
        answer = Answer(time.monotonic if recorder is None else recorder.clock)
        if self._recording is not None:
            self._recording.worker = worker_id
            self._recording.adapter_use = lease.use
            self._recording.answer = answer
        # A retry, if there is one, should go elsewhere.
        self._job.avoid = (*self._job.avoid, worker_id)
        client = self._model.pool.client(worker_id)
        if client is None:
            raise WorkerFailedError("it is gone")

        def on_first_byte() -> None:
            metrics.first_byte_s.labels(name).observe(self._loop.time() - self._arrived)

        adapter = self._job.adapter
        try:
            if adapter is not None:
                await client.activate(adapter)
            response = await relay(
                self._request,
                self._body,
                client,
                self._path,
                headers=forwarded_headers(
                    self._request.headers, self._job.id, adapter.version if adapter else ""
                ),
                stamps=stamps,
                adapter=adapter.model_id if adapter else "",
                first_byte_timeout_s=config.first_byte_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
                on_first_byte=on_first_byte,
                on_first_token=lease.first_token,
                answer=answer,
            )
            self._count(lease, answer, response.status)
        except asyncio.CancelledError:
            self._count(lease, answer)
            raise
        except AdapterNotThereError:
            assert adapter is not None
            log.warning("%s does not hold %s, which it should", worker_id, adapter.model_id)
            self._model.router.disown(lease.worker, adapter)
            raise AdapterNotThereError("it has lost the adapter") from None
        except AnswerCutError as error:
            self.outcome = Outcome.CLIENT_GONE if error.client_gone else Outcome.WORKER_FAILED
            self._count(lease, answer)
            log.warning("%s: answer of %s was cut off: %s", self._job.id, worker_id, error)
            # Closed without its end, so that the client sees that the answer is not whole.
            if self._request.transport is not None:
                self._request.transport.abort()
            raise asyncio.CancelledError from None
        now = self._loop.time()
        if response.status >= 500:  # noqa: PLR2004
            self.outcome = Outcome.WORKER_FAILED
        else:
            self.outcome = Outcome.COMPLETED if response.status < 400 else Outcome.REFUSED  # noqa: PLR2004
        metrics.placed(self._job, lease.use)
        metrics.request_s.labels(name).observe(now - self._arrived)
        return response

    def _count(self, lease: Lease, answer: Answer, status: int | None = None) -> None:
        """Tell the core how many tokens there were; those that came, of an answer that was cut off."""
        usage = answer.usage()
        prompt = None if usage is None else usage.input_tokens
        output = None if usage is None else usage.output_tokens
        if output is None:
            output = answer.events or None
        if output is None:
            if status is None or status < 400:  # noqa: PLR2004
                return  # not known: the quota keeps what was reserved, unless it was cut off
            prompt = output = 0  # the engine refused it, and computed nothing
        self._tokens = output + (self._job.prompt_tokens if prompt is None else prompt)
        lease.answered(output, prompt)


def _json(data: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json")
