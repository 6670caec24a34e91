"""One answer on its way from a worker to a client: the bytes that came are the bytes that go.

Its head is made anew, with our headers on it; of its body nothing is parsed, copied or put into other
pieces. Up to the first byte to the client a failure can be made good on another worker; from then on
the answer is the worker's, and a failure cuts it off, so that no client takes half for whole. A short
answer whose length is known is held back until it is whole, so that it too can be made good.

A client that is slow pauses its own worker's connection and nothing else: what waits for it in memory
is bounded by the transport's own mark and one read.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Protocol

from engine_worker.protocol import REFUSED_HEADER
from router.core.job import Outcome
from router.frontend.request import HOP_BY_HOP
from router.telemetry.answer import Answer
from router.workers.upstream import (
    StaleConnectionError,
    Upstream,
    UpstreamPool,
    WorkerFailedError,
    WorkerRefusedError,
    WorkerStalledError,
)

WHOLE_MAX_BYTES: Final = 256 * 1024
NOT_FOUND: Final = 404
MODEL_MISSING: Final = b"does not exist"  # vLLM: "The model `base:adapter` does not exist."
# Not an answer to this request, but a worker that cannot serve or does not know its router.
WORKERS_FAULT: Final = frozenset({401, 403, 502, 503})
REFUSED: Final = REFUSED_HEADER.lower().encode()
NOT_RETURNED: Final = HOP_BY_HOP | {b"server", b"x-request-id", b"x-worker", b"x-adapter"}
STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class AnswerCutError(Exception):
    """The worker failed within its answer, or the client went away; `outcome` says which."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class AdapterNotThereError(Exception):
    """The worker does not hold the adapter that it was thought to; nothing was sent to the client."""


class Client(Protocol):
    """The connection to whoever asked."""

    upstream: Upstream | None
    unframed: bool  # the end of its answer is that of the connection: cut off, it must be reset
    write: Callable[[bytes], None]


class Passage:
    """Reads one answer and writes it to a client. `over` ends with its status, or with what failed.

    `chunked` says whether the client can read that; if not, it gets the content alone, and its end is
    that of the connection. `last` asks for that too: no other answer follows on it.
    `stamps` are our own header lines. `adapter` is what the worker calls the adapter that it was leased
    for, empty for the base model. `answer` is shown what passes. `on_first_byte` is called when the
    answer begins, `on_first_token` when the first event of a stream has come: a stream's head comes
    before its prompt is computed.
    """

    __slots__ = (
        "_adapter", "_answer", "_chunked", "_client", "_content", "_head", "_held", "_last", "_loop",
        "_on_first_byte", "_on_first_token", "_refusal", "_stamps", "_started", "_status", "closes",
        "over",
    )  # fmt: skip

    def __init__(
        self,
        client: Client,
        loop: asyncio.AbstractEventLoop,
        *,
        chunked: bool,
        last: bool,
        stamps: bytes,
        adapter: bytes,
        answer: Answer,
        on_first_byte: Callable[[], None],
        on_first_token: Callable[[], None],
    ) -> None:
        self._client = client
        self._loop = loop
        self._chunked = chunked
        self._last = last
        self._stamps = stamps
        self._adapter = adapter
        self._answer = answer
        self._on_first_byte = on_first_byte
        self._on_first_token = on_first_token
        self._status = 0
        self._refusal = b""
        self._head = b""
        self._held: list[bytes] | None = None  # the content of a short answer
        self._content: list[bytes] | None = None  # what is to be sent without its framing
        self._started = False  # bytes have gone to the client
        self.closes = last
        self.over: asyncio.Future[int] = loop.create_future()

    def again(self) -> None:
        """Nothing has come, and it is asked for once more."""
        self.over = self._loop.create_future()

    def head(self, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
        """The answer begins."""
        if status in WORKERS_FAULT:
            self._refused(status, headers, length)
            return
        self._status = status
        chunks = content_type = False
        kind = b""
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in headers:
            if name == b"transfer-encoding":
                chunks = True
            elif name == b"content-type":
                content_type, kind = True, value
                lines.append(b"content-type: %b\r\n" % value)
            elif name not in NOT_RETURNED:
                lines.append(b"%b: %b\r\n" % (name, value))
        if length is None and chunks and self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif length is None:
            self.closes = True
            self._client.unframed = True
            if chunks:
                self._content = []
        elif length > WHOLE_MAX_BYTES:
            self._content = []  # nothing that may be behind it
        if self.closes:
            lines.append(b"connection: close\r\n")
        lines.append(self._stamps)
        lines.append(b"\r\n")
        self._head = b"".join(lines)
        if length is not None and length <= WHOLE_MAX_BYTES:
            self._held = []
        else:
            self._answer.begins(kind.decode("latin-1") if content_type else "")

    def _refused(self, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
        """A short refusal with a name is read to its end, so that the connection can be used again."""
        self._refusal = dict(headers).get(REFUSED, b"")
        if not self._refusal:
            raise WorkerFailedError(f"it answered {status}")
        if length is None or length > WHOLE_MAX_BYTES:
            raise self._named()
        self._held = []

    def _named(self) -> WorkerRefusedError:
        return WorkerRefusedError(self._refusal.decode("latin-1"))

    def content(self, data: bytes) -> None:
        """Some of its content."""
        if self._held is not None:
            self._held.append(data)
            return
        answer = self._answer
        if answer.first_byte_at is None:
            self._on_first_token()
        answer.passes(data)
        if self._content is not None:
            self._content.append(data)

    def wire(self, data: bytes) -> None:
        """The bytes in which it came."""
        if self._held is not None:
            return
        if self._content is not None:
            data = b"".join(self._content)
            self._content = []
        if not self._started:
            self._started = True
            self._on_first_byte()
            data = self._head + data
            self._head = b""
        if data:
            self._client.write(data)

    def ended(self) -> None:
        """It is whole."""
        if self._refusal:
            self._end(self._named())
        elif self._held is not None:
            body = b"".join(self._held)
            # Not every 404 is that: a route or a stored response may be what is not there.
            missing = self._status == NOT_FOUND and MODEL_MISSING in body
            if missing and self._adapter and self._adapter in body:
                self._end(AdapterNotThereError())
                return
            self._on_first_byte()
            self._answer.whole(body)
            self._client.write(self._head + body)
            self._end(None)
        else:
            self._end(None)

    def failed(self, error: WorkerFailedError | WorkerStalledError) -> None:
        """It will never be whole."""
        if not self._started:
            self._end(error)
            return
        upstream = self._client.upstream
        slow = upstream is not None and upstream.paused and isinstance(error, WorkerStalledError)
        if slow:
            self._end(AnswerCutError("the client takes nothing", Outcome.CLIENT_GONE))
        elif isinstance(error, WorkerStalledError):
            self._end(AnswerCutError(str(error), Outcome.WORKER_STALLED))
        else:
            self._end(AnswerCutError(str(error), Outcome.WORKER_FAILED))

    def _end(self, error: Exception | None) -> None:
        self._client.upstream = None
        if self.over.done():
            return
        if error is None:
            self.over.set_result(self._status)
        else:
            self.over.set_exception(error)


async def relay(
    passage: Passage,
    client: Client,
    pool: UpstreamPool,
    request: Callable[[], tuple[bytes, bytes]],
    *,
    first_byte_timeout_s: float,
    idle_timeout_s: float,
) -> tuple[int, bool]:
    """Send a request, its head and its body, to a worker and its answer to the client.

    Returns the answer's status, and whether its end is that of the client's connection. A kept
    connection that turns out to be closed costs no retry: the request goes over a new one.

    Raises `WorkerFailedError`, `WorkerRefusedError`, `WorkerStalledError` or `AdapterNotThereError`
    while nothing was sent, `AnswerCutError` after.
    """
    upstream = pool.idle()
    while True:
        if upstream is None:
            upstream = await pool.connect()
        client.upstream = upstream
        upstream.ask(
            passage,
            *request(),
            first_byte_timeout_s=first_byte_timeout_s,
            idle_timeout_s=idle_timeout_s,
        )
        try:
            return await passage.over, passage.closes
        except StaleConnectionError:
            upstream = None
            passage.again()
        except asyncio.CancelledError:
            # Its answer may have ended in the meantime, and the connection be another's.
            if passage.over.cancelled() or not passage.over.done():
                upstream.abandon()
                client.upstream = None
            raise
