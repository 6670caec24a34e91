"""A client's connection: its requests read by llhttp, and answered one after the other.

What is passed on to a worker (`POST /v1/...`) is served here. Every other request goes, read whole, to
the aiohttp application, which answers it as the last one on this connection.

Nothing that a client sends is trusted: a head and a body have limits and must come in time, a second
request that comes before the answer of the first waits and stops the reading, as does one whose client
has yet to take the answers before, and what cannot be read is answered once, in OpenAI's shape, and
ends the connection. A client that leaves ends its request at once, with all that was reserved for it.
"""

import asyncio
import logging
import re
import socket
import struct
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from math import inf
from random import Random
from typing import Any, Final, NoReturn, Protocol, cast

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserInvalidURLError,
    HttpParserUpgrade,
    HttpRequestParser,
    parse_url,
)

from router.frontend.errors import ApiError, too_large, unauthorized
from router.frontend.relay import STATUS_LINES, AnswerCutError
from router.frontend.request import Request, unpacked
from router.patience import Patience
from router.workers.upstream import Upstream

log = logging.getLogger("lorayard.frontend")

HEAD_MAX_BYTES: Final = 64 * 1024
HEAD_TIMEOUT_S: Final = 20.0
KEEPALIVE_S: Final = 75.0
# After an answer that ends a connection, what the client still sends is taken in, for so long: were it
# closed at once, the client would be told so before it has read the answer.
LINGER_S: Final = 5.0
# Whoever sends a body slower than one such block in `idle_timeout_s` is too slow.
BLOCK_BYTES: Final = 64 * 1024
# Requests that came together: one read holds no more than so many.
WAITING_MAX: Final = 256
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: what is not sent yet is dropped
VERSIONS: Final = frozenset({"1.0", "1.1"})
REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Reading(Enum):
    """What of a request has been read."""

    NOTHING = auto()
    HEAD = auto()  # some of it
    BODY = auto()  # the head, and perhaps some of the body
    ENDED = auto()  # whatever comes is nobody's


class Service(Protocol):
    """What the requests are for. One for all connections of the process."""

    max_body_bytes: int
    idle_timeout_s: float
    closing: bool
    connections: "dict[ClientConnection, None]"

    def accepts(self, request: Request) -> bool:
        """Whether the request carries a key, if one is needed; what it gives is noted on it."""

    def lost(self, connection: "ClientConnection") -> None:
        """A connection is gone, or the application's."""

    async def pass_on(self, request: Request, connection: "ClientConnection") -> bool:
        """Answer the request through `connection`; whether another may follow on it.

        Raises `ApiError` while nothing is sent, and `AnswerCutError` after.
        """

    def application(self) -> asyncio.Protocol:
        """A protocol that answers everything else."""


class ClientConnection:
    """One connection. `write` sends bytes; `upstream` is the worker's, which is paused for it.

    An asyncio.Protocol in all but its base, which a compiled class cannot have.
    """

    __slots__ = (
        "_body", "_body_bytes", "_busy", "_choked", "_expects", "_fault", "_loop", "_parser",
        "_patience", "_pieces", "_reading", "_request", "_rng", "_service", "_skipping", "_task",
        "_transport", "_unaccounted", "_waiting", "unframed", "upstream", "write",
    )  # fmt: skip

    write: Callable[[bytes], None]

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, rng: Random) -> None:
        self._service = service
        self._loop = loop
        self._rng = rng
        self._transport: asyncio.Transport | None = None
        self._parser: HttpRequestParser | None = None
        self._patience = Patience(loop, self._expired)
        self._reading = Reading.NOTHING
        self._busy = False  # with an answer
        self._choked = False  # the client takes nothing more for now
        self._request = Request()
        self._skipping = False  # a head that was read before
        self._expects = False  # the client waits to be told to go on
        self._unaccounted = 0  # bytes since the last of what has a limit of its own
        self._body = b""
        self._pieces: bytearray | None = None  # of a body that comes in more than one
        self._body_bytes = 0
        self._fault: ApiError | None = None
        # Requests that came before the answer to the one before them; a fault is answered in its turn.
        self._waiting: deque[Request | ApiError] = deque()
        self._task: asyncio.Task[None] | None = None
        self.upstream: Upstream | None = None
        self.unframed = False

    # The connection's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        # uvloop's has the methods of asyncio's, and is none.
        self._transport = cast("asyncio.Transport", transport)
        self.write = self._transport.write
        self._parser = HttpRequestParser(self)
        self._service.connections[self] = None
        self._patience.wait(HEAD_TIMEOUT_S)

    def eof_received(self) -> None:
        """The client sends no more: it has left."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The client has left, or was left."""
        self._service.lost(self)
        self._patience.end()
        self._transport = None
        self._parser = None  # each holds the other
        self._waiting.clear()
        self._pieces = None
        if self.upstream is not None:
            self.upstream.abandon()
            self.upstream = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def pause_writing(self) -> None:
        """The client is slow."""
        self._choked = True
        if self.upstream is not None:
            self.upstream.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._choked = False
        if self.upstream is not None:
            self.upstream.resume()
        elif self._reading is Reading.ENDED and not self._waiting:
            self._be_patient()
        elif not self._busy and self._transport is not None:
            self._next()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        if self._ended:
            return
        assert self._parser is not None
        # What comes behind a head in the same read is not of a head, but it is no more than one read.
        self._unaccounted += len(data)
        between = self._reading is Reading.NOTHING
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._request.keep_alive = False  # no other protocol is spoken here
            if self._reading is Reading.BODY:
                self._read_on(data[upgrade.args[0] :])
        except HttpParserError as error:
            if not self._ended:
                self._refuse(self._fault or self._told(error))
            return
        if self._reading is Reading.NOTHING:
            return
        if self._unaccounted > HEAD_MAX_BYTES:
            what = "head" if self._reading is Reading.HEAD else "body's framing"
            self._refuse(ApiError(431, f"The {what} is larger than {HEAD_MAX_BYTES:,} bytes."))
        elif between and self._reading is Reading.HEAD:
            self._be_patient()

    def _read_on(self, data: bytes) -> None:
        """Read the body of a request that asked for another protocol too: its parser leaves it."""
        length = self._request.get(b"content-length")
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        self._parser = HttpRequestParser(self)
        self._skipping = True
        self._parser.feed_data(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode("latin-1"))
        self._skipping = False
        self.data_received(data)

    def _told(self, error: HttpParserError) -> ApiError:
        """What a failed parse says: where one of our own callbacks failed, it is no client's fault."""
        if not isinstance(error, HttpParserCallbackError):
            return ApiError(400, f"This is not HTTP: {error}.")
        log.error("a fault of the router while it read a request", exc_info=error)
        return ApiError(500, "The router failed; its log has why.", kind="server_error")

    @property
    def _ended(self) -> bool:
        return self._reading is Reading.ENDED

    def _be_patient(self) -> None:
        """Give the client as long as what it is to send, or to take, may need."""
        if self._busy:
            self._patience.due = inf  # the worker's connection has the patience then
        elif self._choked:
            self._patience.wait(self._service.idle_timeout_s)
        elif self._reading is Reading.ENDED:
            self._patience.wait(LINGER_S)
        elif self._reading is Reading.NOTHING:
            self._patience.wait(KEEPALIVE_S)
        elif self._reading is Reading.HEAD:
            self._patience.wait(HEAD_TIMEOUT_S)
        else:
            self._patience.wait(self._service.idle_timeout_s)

    def _expired(self) -> None:
        if not self._choked and self._reading in {Reading.HEAD, Reading.BODY}:
            self._refuse(ApiError(408, "The request did not come to its end in time."))
        else:
            self.abort()

    # The parser's side.

    def on_message_begin(self) -> None:
        """A request begins, perhaps while another is answered."""
        if self._skipping:
            return
        if self._reading is Reading.ENDED:
            raise HttpParserError("nothing may follow")
        self._reading = Reading.HEAD
        self._request = Request()
        self._expects = False
        self._body = b""
        self._pieces = None
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Some of its target."""
        if not self._skipping:
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; one that comes after the body is nobody's."""
        request = self._request
        if request.arrived:
            return
        request.add(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: say at once what is wrong with it."""
        if self._skipping:
            return
        request, parser = self._request, self._parser
        assert parser is not None
        self._unaccounted = 0
        request.arrived = self._loop.time()
        request.method = parser.get_method()
        version = parser.get_http_version()
        request.http_1_0 = version == "1.0"
        request.keep_alive = parser.should_keep_alive() and not request.http_1_0
        given = request.get(b"x-request-id")
        request.id = given if given and REQUEST_ID.fullmatch(given) else self._new_id()
        if version not in VERSIONS:
            self._fail(ApiError(505, "This is not HTTP/1.1, nor HTTP/1.0."))
        try:
            url: Any = parse_url(request.target)  # its stubs do not say that parts may be None
        except HttpParserInvalidURLError:
            self._fail(ApiError(400, "The request's target is no path."))
        request.path = (url.path or b"/").decode("latin-1")
        request.query = (url.query or b"").decode("latin-1")
        if request.needs_client_key and not self._service.accepts(request):
            self._fail(unauthorized())
        limit = self._body_limit()
        if int(request.get(b"content-length") or 0) > limit:
            self._fail(too_large(limit))
        self._reading = Reading.BODY
        self._expects = request.get(b"expect") is not None and not request.http_1_0
        if not self._busy:
            self._be_patient()
            self._tell_to_go_on()

    def _body_limit(self) -> int:
        """A page takes a small body, if any; and whoever asks for one may have no key."""
        limit = self._service.max_body_bytes
        return limit if self._request.passed_on else min(limit, HEAD_MAX_BYTES)

    def _tell_to_go_on(self) -> None:
        if self._expects and not self._choked:
            self._expects = False
            self.write(CONTINUE)

    def _new_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def on_body(self, data: bytes) -> None:
        """Some of the body."""
        self._unaccounted = 0
        before = self._body_bytes
        self._body_bytes += len(data)
        if not before:
            self._body = data
        elif self._pieces is None:
            # Not a list: a chunk of two bytes would take fifty there.
            self._pieces = bytearray(self._body)
            self._pieces += data
        else:
            self._pieces += data
        limit = self._body_limit()
        if self._body_bytes > limit:
            self._fail(too_large(limit))
        if before // BLOCK_BYTES != self._body_bytes // BLOCK_BYTES:
            self._be_patient()

    def _fail(self, fault: ApiError) -> NoReturn:
        """Stop the parser; what is wrong is told by whoever feeds it."""
        self._fault = fault
        raise fault

    def on_message_complete(self) -> None:
        """The request is whole."""
        request = self._request
        assert self._parser is not None
        if self._parser.should_upgrade() and (
            request.get(b"transfer-encoding") or int(request.get(b"content-length") or 0)
        ):
            return  # its body follows, see `_read_on`
        request.body = self._body if self._pieces is None else bytes(self._pieces)
        self._body = b""
        self._pieces = None
        self._unaccounted = 0
        self._expects = False
        self._reading = Reading.NOTHING
        if self._busy or self._choked:
            if len(self._waiting) == WAITING_MAX:
                self._fail(ApiError(400, f"More than {WAITING_MAX} requests wait for answers."))
            self._waiting.append(request)
            if len(self._waiting) == 1 and self._transport is not None:
                self._transport.pause_reading()
        else:
            self._begin(request)

    # Answers.

    def _begin(self, request: Request) -> None:
        self._busy = True
        self._patience.due = inf
        if request.passed_on:
            self._task = self._loop.create_task(self._serve(request))
        else:
            self._hand_over(request)

    async def _serve(self, request: Request) -> None:
        """Answer a request that is passed on, whatever happens."""
        try:
            encoding = request.get(b"content-encoding")
            if encoding is not None:
                request.body = unpacked(request.body, encoding, self._service.max_body_bytes)
            follows = await self._service.pass_on(request, self)
        except ApiError as error:
            follows = request.keep_alive and not self._service.closing
            self._answer_fault(request, error, last=not follows)
            return
        except AnswerCutError:
            self.abort()  # without its end, so that the client sees that the answer is not whole
            return
        except asyncio.CancelledError:
            self.abort()
            raise
        except Exception:
            log.exception("%s: a fault of the router", request.id)
            message = "The router failed; its log has this request's id."
            self._answer_fault(request, ApiError(500, message, kind="server_error"), last=True)
            return
        finally:
            request.forget()
        self._answered(last=not follows or self._service.closing)

    def _answer_fault(self, request: Request, error: ApiError, *, last: bool) -> None:
        body = error.body()
        status = STATUS_LINES[error.status].decode()
        headers = "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
        end = "connection: close\r\n" if last else ""
        head = (
            f"{status}{headers}content-length: {len(body)}\r\n"
            f"x-request-id: {request.id}\r\n{error.stamps}{end}\r\n"
        )
        if self._transport is not None:
            self.write(head.encode("latin-1") + body)
        self._answered(last=last)

    def _answered(self, *, last: bool) -> None:
        """Go on to the next request, or to the end."""
        self._task = None
        self._busy = False
        if self._transport is None:
            return
        if last:
            self._linger()
        else:
            self._next()

    def _next(self) -> None:
        """Go on to the next request: when there is room for its answer."""
        assert self._transport is not None
        self._be_patient()
        if self._choked:
            return
        if self._reading is Reading.BODY:
            self._tell_to_go_on()
        if self._waiting:
            waiting = self._waiting.popleft()
            if not self._waiting:
                self._transport.resume_reading()
            if isinstance(waiting, ApiError):
                self._answer_fault(self._request, waiting, last=True)
            else:
                self._begin(waiting)

    def _refuse(self, fault: ApiError) -> None:
        """Answer what cannot be read, in its turn, and nothing after it."""
        self._reading = Reading.ENDED
        self._request.id = self._request.id or self._new_id()
        if self._busy or self._choked or self._waiting:
            self._waiting.append(fault)
            return
        self._answer_fault(self._request, fault, last=True)

    def _linger(self) -> None:
        assert self._transport is not None
        self._reading = Reading.ENDED
        self._waiting.clear()
        if not self._transport.is_closing():
            self._transport.resume_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._be_patient()

    def _hand_over(self, request: Request) -> None:
        """Give the connection to the application, for this request."""
        assert self._transport is not None
        encoding = request.get(b"content-encoding")
        if encoding is not None and request.takes_body:
            try:
                request.body = unpacked(request.body, encoding, HEAD_MAX_BYTES)
            except ApiError as error:
                self._answer_fault(request, error, last=True)
                return
        application = self._service.application()
        transport, self._transport = self._transport, None
        transport.resume_reading()
        self._parser = None
        self._reading = Reading.ENDED
        self._service.lost(self)
        self._patience.end()
        transport.set_protocol(application)
        application.connection_made(transport)
        application.data_received(request.for_application())

    def abort(self) -> None:
        """Close at once."""
        if self._transport is None:
            return
        if self.unframed and self._busy:
            # Closed, it would look as if it were whole.
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._transport.abort()

    def close_when_idle(self) -> bool:
        """Close once what was answered is sent; False while a request is under way, which goes on."""
        if self._busy or self._transport is None:
            return False
        self._reading = Reading.ENDED
        self._waiting.clear()
        self._be_patient()
        self._transport.close()
        return True
