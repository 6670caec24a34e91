"""One request from its job to its outcome, over as many workers as its retries allow.

The model is looked up before any worker is touched. Whatever happens, the lease is left, the outcome is
counted once, and the answer carries `x-request-id`, `x-worker` and `x-adapter`.
"""

import asyncio
import logging
import re
import time
from functools import lru_cache
from typing import Final

from engine_worker.protocol import Refusal
from router.adapters.store import StoreError
from router.config import RouterConfig
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, LoadFault, Outcome, Rejected
from router.core.lease import Lease
from router.frontend.errors import ApiError, load_failed, model_not_found, rejected
from router.frontend.head import BYTES_PER_TOKEN, Head, for_model
from router.frontend.prefix import prefix_of
from router.frontend.relay import AdapterNotThereError, AnswerCutError, Client, Passage, relay
from router.frontend.request import Request
from router.frontend.terms import Terms
from router.model import ModelService
from router.telemetry.answer import Answer
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder, Recording
from router.workers.upstream import WorkerFailedError, WorkerRefusedError, WorkerStalledError

log = logging.getLogger("lorayard.frontend")

SEGMENT: Final = re.compile(r"[A-Za-z0-9_.-]+")
SESSION: Final = b"x-session-id"
SESSION_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
PATHS_MAX: Final = 256
REFUSED_FROM: Final = 400
FAILED_FROM: Final = 500
# Endings that speak against the version of an adapter, if they are many.
FAILURES: Final = frozenset({Outcome.LOAD_FAILED, Outcome.WORKER_FAILED, Outcome.WORKER_STALLED})


@lru_cache(maxsize=PATHS_MAX)
def worker_path(path: str, query: str) -> bytes | None:
    """The path and query to ask a worker for, or None where no route can be meant.

    A worker has routes that are not for clients, so nothing may be left that some later reader could
    take for a step upwards: each segment is plain, and the whole goes on as it was checked.
    """
    segments = path.split("/")
    if not all(SEGMENT.fullmatch(segment) and segment not in {".", ".."} for segment in segments):
        return None
    return (f"/v1/{path}?{query}" if query else f"/v1/{path}").encode("latin-1")


class Exchange:
    """Passes one request on. `outcome` is how it ended, once `run` has."""

    __slots__ = (
        "_begun",
        "_client",
        "_config",
        "_job",
        "_last",
        "_looked_again",
        "_loop",
        "_metrics",
        "_model",
        "_model_id",
        "_path",
        "_recorder",
        "_recording",
        "_request",
        "_stamps",
        "_tokens",
        "_use",
        "_worker_id",
        "outcome",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        client: Client,
        path: bytes,
        head: Head,
        terms: Terms,
        model: ModelService,
        adapter: AdapterRef | None,
        *,
        config: RouterConfig,
        metrics: Metrics,
        recorder: Recorder | None,
        last: bool,
    ) -> None:
        self._request = request
        self._client = client
        self._path = path
        self._model = model
        self._model_id = head.model
        self._config = config
        self._metrics = metrics
        self._recorder = recorder
        self._last = last
        self._loop = asyncio.get_running_loop()
        self._looked_again = False
        self._begun = False  # bytes of an answer have gone to the client
        self._tokens = 0
        self._use: AdapterUse | None = None
        self._worker_id = "none"
        self._stamps = ""
        self.outcome = Outcome.CLIENT_GONE  # until another is known: cancelled before an answer
        body = request.body
        self._job = Job(
            request.id,
            adapter,
            prompt_tokens=len(body) // BYTES_PER_TOKEN,
            max_output_tokens=head.output_tokens,
            tenant=terms.tenant,
            accounts=terms.accounts,
            priority=terms.priority,
            deadline=None if terms.deadline_s is None else request.arrived + terms.deadline_s,
            refuse_cold=terms.refuse_cold,
            prefix=prefix_of(body),
        )
        self._recording: Recording | None = None
        if recorder is not None:
            session_id = request.get(SESSION) or ""
            self._recording = recorder.begin(
                self._job,
                model.model_id,
                session_id=session_id if SESSION_ID.fullmatch(session_id) else "",
                body=body,
            )

    async def run(self) -> bool:
        """Answer the client; whether another answer may follow on its connection.

        Raises `ApiError` where that is the answer, and `AnswerCutError` where there is half of one.
        """
        try:
            return await self._run()
        except ApiError as error:
            if self._stamps:
                error.stamps = self._stamps
            raise
        except (AnswerCutError, asyncio.CancelledError):
            raise
        except Exception as error:
            self.outcome = Outcome.ROUTER_FAILED
            if not self._begun:
                raise
            log.exception("%s: a fault of the router", self._request.id)
            raise AnswerCutError("the router failed", Outcome.ROUTER_FAILED) from error
        finally:
            self._ended()

    def _ended(self) -> None:
        """Count the request, and hand it to the recorder, now that its outcome is known."""
        metrics, name = self._metrics, self._model.model_id
        metrics.ended(name, self.outcome)
        if self._job.tenant:
            metrics.tenant_ended(name, self._job.tenant, self.outcome, self._tokens)
        self._model.ended(self._job.adapter, self._use, failed=self.outcome in FAILURES)
        if self._recording is not None:
            assert self._recorder is not None
            self._recorder.end(self._recording, self.outcome)

    async def _run(self) -> bool:
        left = self._config.max_retries
        while True:
            self.outcome = Outcome.CLIENT_GONE
            lease = self._lease()
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
                if await self._knows_another(error):
                    continue  # no worker failed, so it costs no retry
                if not left or error.fault is not LoadFault.WORKER:
                    raise load_failed(error) from None
                if error.worker is not None:
                    self._job.avoid = (*self._job.avoid, error.worker)
            except WorkerRefusedError:
                continue  # another router was there first: no worker failed, so it costs no retry
            except WorkerStalledError as error:
                self.outcome = Outcome.WORKER_STALLED
                if not left:
                    raise self._worker_error(504, error) from None
            except (WorkerFailedError, AdapterNotThereError) as error:
                self.outcome = Outcome.WORKER_FAILED
                if not left:
                    raise self._worker_error(502, error) from None
            left -= 1
            self._retried()

    def _retried(self) -> None:
        self._metrics.retried(self._model.model_id)
        if self._recording is not None:
            self._recording.retries += 1

    def _lease(self) -> Lease:
        lease = self._model.router.lease(self._job)
        if self._recording is not None:
            self._recording.leases.append(lease)
        return lease

    async def _knows_another(self, error: LoadError) -> bool:
        """Whether the job is for another version of its adapter now; once.

        What has changed in the store is what it is now, and from a new version that no worker can load
        the adapter goes back to the one before. Who named a version gets that one or none.
        """
        job = self._job
        if self._looked_again or job.adapter is None:
            return False
        self._looked_again = True
        named = self._named_version(job.adapter)
        if error.fault is LoadFault.ADAPTER_INVALID:
            adapter = await self._model.instead_of(job.adapter, str(error))
            if adapter is None or named:
                return False
        elif error.fault is LoadFault.ADAPTER_CHANGED:
            try:
                adapter = await self._model.find(job.adapter.name + named, afresh=True)
            except StoreError:
                return False
            if adapter is None:
                raise model_not_found(job.adapter.model_id + named) from None
        else:
            return False
        job.adapter = adapter
        return True

    def _worker_error(self, status: int, error: Exception) -> ApiError:
        return ApiError(
            status,
            f"Worker {self._worker_id} failed before its answer: {error}.",
            kind="server_error",
            code=self.outcome.value,
        )

    async def _relay(self, lease: Lease) -> bool:
        name, job, request, config = self._model.model_id, self._job, self._request, self._config
        answer = self._placed(lease)
        worker_id = self._worker_id
        # A retry, if there is one, should go elsewhere.
        avoid = job.avoid
        job.avoid = (*avoid, worker_id)
        client = self._model.pool.client(worker_id)
        if client is None:
            raise WorkerFailedError("it is gone")
        adapter = job.adapter
        named = adapter.model_id if adapter else ""
        model = (client.model_for(adapter) or self._without_version(adapter)) if adapter else ""
        own = client.upstreams.headers
        passage = Passage(
            self._client,
            self._loop,
            chunked=not request.http_1_0,
            last=self._last,
            stamps=f"x-request-id: {request.id}\r\n{self._stamps}".encode(),
            adapter=(model or named).encode(),
            answer=answer,
            on_first_byte=self._first_byte,
            on_first_token=lease.first_token,
        )
        try:
            status, closes = await relay(
                passage,
                self._client,
                client.upstreams,
                lambda: self._asked(own, named, model),
                first_byte_timeout_s=config.first_byte_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
            )
            self._count(lease, answer, status)
        except asyncio.CancelledError:
            self._count(lease, answer)
            raise
        except WorkerRefusedError as refused:  # a name of its own: compiled, a name has one type
            job.avoid = avoid
            self._refused(lease, refused.refusal)
            raise
        except AdapterNotThereError:
            assert adapter is not None
            log.warning("%s does not hold %s, which it should", worker_id, adapter.model_id)
            self._model.router.disown(lease.worker, adapter)
            raise AdapterNotThereError("it has lost the adapter") from None
        except AnswerCutError as error:
            self.outcome = error.outcome
            self._count(lease, answer)
            # What a client does, any number of clients may do at once.
            level = logging.INFO if error.outcome is Outcome.CLIENT_GONE else logging.WARNING
            log.log(level, "%s: answer of %s was cut off: %s", job.id, worker_id, error)
            raise
        if status >= FAILED_FROM:
            self.outcome = Outcome.WORKER_FAILED
        else:
            self.outcome = Outcome.COMPLETED if status < REFUSED_FROM else Outcome.REFUSED
        self._metrics.placed(job, lease.use)
        self._metrics.answered(name, self._loop.time() - request.arrived)
        return not closes

    def _placed(self, lease: Lease) -> Answer:
        """Note where the request goes, for whoever looks at it later; where its answer is followed."""
        self._worker_id = lease.worker.id
        self._use = lease.use
        self._stamps = f"x-worker: {self._worker_id}\r\nx-adapter: {lease.use.value}\r\n"
        if self._job.adapter is not None:
            self._stamps += f"x-adapter-version: {self._job.adapter.version}\r\n"
        if lease.queued_s:
            self._metrics.queued(self._model.model_id, lease.queued_s)
        answer = Answer(time.monotonic if self._recorder is None else self._recorder.clock)
        if self._recording is not None:
            self._recording.worker = self._worker_id
            self._recording.adapter_use = lease.use
            self._recording.answer = answer
        return answer

    def _named_version(self, adapter: AdapterRef) -> str:
        """What the client has put behind the adapter's id, `@version`, if it has."""
        return (self._model_id or "").removeprefix(adapter.model_id)

    def _without_version(self, adapter: AdapterRef) -> str:
        """The adapter's id, where the client has named its version too, which a worker gets apart."""
        return adapter.model_id if self._named_version(adapter) else ""

    def _asked(self, own: bytes, named: str, model: str) -> tuple[bytes, bytes]:
        """The head and body that a worker gets, which may know the adapter by a `model` of its own."""
        request, adapter = self._request, self._job.adapter
        version = adapter.version if adapter else ""
        body = for_model(request.body, model) if model else request.body
        return request.for_worker(self._path, named.encode(), version, own, len(body)), body

    def _refused(self, lease: Lease, refusal: str) -> None:
        self._metrics.refused(self._model.model_id, refusal)
        lease.refused(full=refusal == Refusal.FULL)

    def _first_byte(self) -> None:
        self._begun = True
        self._request.forget()  # from here on there is no other worker to send it to
        self._metrics.first_byte(self._model.model_id, self._loop.time() - self._request.arrived)

    def _count(self, lease: Lease, answer: Answer, status: int | None = None) -> None:
        """Tell the core how many tokens there were; those that came, of an answer that was cut off."""
        usage = answer.usage()
        prompt = None if usage is None else usage.input_tokens
        output = None if usage is None else usage.output_tokens
        if output is None:
            output = answer.events or None
        if output is None:
            if status is None or status < REFUSED_FROM:
                return  # not known: the quota keeps what was reserved, unless it was cut off
            prompt = output = 0  # the engine refused it, and computed nothing
        self._tokens = output + (self._job.prompt_tokens if prompt is None else prompt)
        lease.answered(output, prompt)
