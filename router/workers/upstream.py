"""Connections to one worker: kept open, one answer at a time, handed on in the bytes that came.

llhttp (by httptools) reads every answer and alone says what is in it and where it ends; nothing here
looks for structure in a body. Its bytes are handed on twice: as they were on the wire, and as the
content that was in them. Where the head ends is proposed by a search for the blank line, and the
parser has to agree to the byte, or the answer is refused.

One callback a chunk, no copy: the read buffer's bytes object is what the reader is given.
"""

import asyncio
from typing import Final, Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from yarl import URL

from engine_worker.protocol import ROUTER_HEADER
from router.patience import Patience

CONNECT_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 600.0
HEAD_MAX_BYTES: Final = 64 * 1024
HEAD_END: Final = b"\r\n\r\n"
# A body this long is not put behind its head in one piece of memory.
JOINED_MAX_BYTES: Final = 64 * 1024
FIRST_FINAL: Final = 200  # statuses below it are 1xx: another head follows
BODILESS: Final = frozenset({204, 304})


class WorkerFailedError(Exception):
    """The worker failed before the first byte of its answer; nothing was sent to the client."""


class WorkerStalledError(Exception):
    """The worker did not begin its answer in time; nothing was sent to the client."""


class WorkerRefusedError(WorkerFailedError):
    """The worker refused because of other routers, before it did anything; a `Refusal` says why."""

    def __init__(self, refusal: str) -> None:
        super().__init__(f"it refused: {refusal}")
        self.refusal = refusal


class StaleConnectionError(WorkerFailedError):
    """A connection that was kept open was closed as it was used again; nothing came back."""


class Reader(Protocol):
    """Who asked. For each piece that comes, `content` is called for what it holds, then `wire`."""

    def head(self, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
        """The answer begins. `headers` are as they came, names in lower case.

        `length` is that of its content in bytes, None where it is not known: it is chunked, or ends
        with its connection. May raise `WorkerFailedError`: then it is not for whoever asked.
        """

    def content(self, data: bytes) -> None:
        """Some of its content."""

    def wire(self, data: bytes) -> None:
        """The bytes in which that came. Called once for what came with the head, if only empty."""

    def ended(self) -> None:
        """It is whole."""

    def failed(self, error: WorkerFailedError | WorkerStalledError) -> None:
        """It will never be whole."""


class Upstream:
    """One connection to a worker, and the answer that is under way on it, if one is.

    An asyncio.Protocol in all but its base, which a compiled class cannot have.
    """

    __slots__ = (
        "_buffered",
        "_complete",
        "_content_length",
        "_framed",
        "_headers",
        "_heads",
        "_idle_s",
        "_in_body",
        "_loop",
        "_parser",
        "_patience",
        "_pool",
        "_reader",
        "_received",
        "_reusable",
        "_transport",
        "_uses",
        "paused",
    )  # fmt: skip

    def __init__(self, pool: "UpstreamPool", loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = None
        self._reader: Reader | None = None
        self._patience = Patience(loop, self._expired)
        self._idle_s = KEEPALIVE_S
        self._uses = 0
        self.paused = False
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._buffered = b""
        self._received = False
        self._heads = 0  # how many the parser has seen the end of; 1xx count too
        self._in_body = False
        self._complete = False
        self._framed = False
        self._reusable = False
        self._content_length: int | None = None

    # For whoever asks.

    def ask(
        self,
        reader: Reader,
        head: bytes,
        body: bytes,
        *,
        first_byte_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        """Send a request; the reader is told of its answer. The connection is idle."""
        assert self._reader is None
        if self._transport is None:  # it has been closed since
            reader.failed(WorkerFailedError("it closed the connection"))
            return
        self._reader = reader
        self._uses += 1
        self._idle_s = idle_timeout_s
        self._patience.wait(first_byte_timeout_s)
        if len(body) < JOINED_MAX_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def pause(self) -> None:
        """Take no more from the worker for now: its reader's own reader is slow."""
        if self._reader is not None and not self.paused and self._transport is not None:
            self.paused = True
            self._transport.pause_reading()
            self._patience.wait(self._idle_s)

    def resume(self) -> None:
        """Go on."""
        if self.paused and self._transport is not None:
            self.paused = False
            self._transport.resume_reading()
            self._patience.wait(self._idle_s)

    def abandon(self) -> None:
        """Nobody wants the answer any more: the worker sees its connection end."""
        self._reader = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def reused(self) -> bool:
        """Whether it has been asked before."""
        return self._uses > 1

    @property
    def usable(self) -> bool:
        """Whether it can be asked, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close it, once nothing is under way."""
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close it at once; the answer that is under way fails, were its end that of the connection."""
        self._fail(WorkerFailedError("the router has closed the connection"))

    # The connection's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        # uvloop's has the methods of asyncio's, and is none.
        self._transport = cast("asyncio.Transport", transport)
        self._parser = HttpResponseParser(self)
        self._pool.made(self)

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        reader = self._reader
        if reader is None:  # nobody asked
            self.abandon()
            return
        if not self._in_body:
            self._head_received(reader, data)
            return
        self._patience.due = self._loop.time() + self._idle_s
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._fail(_malformed(error))
            return
        reader.wire(_to_its_end(data) if self._complete else data)
        if self._complete:
            self._finish()

    def _head_received(self, reader: Reader, data: bytes) -> None:
        """Bytes of a head, and perhaps more; several heads, where some of them are 1xx."""
        self._received = True
        assert self._parser is not None
        data = self._buffered + data
        while True:
            end = data.find(HEAD_END) + len(HEAD_END)
            if end < len(HEAD_END):
                if len(data) > HEAD_MAX_BYTES:
                    self._fail(WorkerFailedError(f"its head is longer than {HEAD_MAX_BYTES} bytes"))
                self._buffered = data
                return
            heads = self._heads
            try:
                self._parser.feed_data(memoryview(data)[: end - 1])
                early = self._heads != heads
                self._parser.feed_data(memoryview(data)[end - 1 : end])
            except (HttpParserError, HttpParserUpgrade) as error:
                self._fail(_malformed(error))
                return
            if early or self._heads != heads + 1:
                self._fail(WorkerFailedError("its head ends where it should not"))
                return
            data = data[end:]
            status = self._parser.get_status_code()
            if status >= FIRST_FINAL:
                break
            if not self._complete:
                self._fail(WorkerFailedError(f"its status is {status}"))
                return
            self._headers = []
            self._complete = self._framed = False
            self._content_length = None
        self._buffered = b""
        self._in_body = True
        self._patience.wait(self._idle_s)
        try:
            reader.head(status, self._headers, 0 if status in BODILESS else self._content_length)
            if data:
                self._parser.feed_data(data)
        except WorkerFailedError as error:
            self._fail(error)
            return
        except HttpParserError as error:
            self._fail(_malformed(error))
            return
        if self._reader is not None:  # its reader may have given up
            reader.wire(_to_its_end(data) if self._complete else data)
            if self._complete:
                self._finish()

    def _finish(self) -> None:
        """The answer is whole: the connection is another's."""
        reader, self._reader = self._reader, None
        assert self._parser is not None
        assert reader is not None
        reusable = self._reusable
        if self.paused:
            assert self._transport is not None
            self.paused = False
            self._transport.resume_reading()
        self._reset()
        if reusable:
            self._patience.wait(KEEPALIVE_S)
            self._pool.give_back(self)
        else:
            self.close()
        reader.ended()

    def _fail(self, error: WorkerFailedError | WorkerStalledError) -> None:
        reader = self._reader
        self.abandon()
        if reader is not None:
            reader.failed(error)

    def _expired(self) -> None:
        if self._reader is None:
            self.close()
        elif not self._in_body:
            self._fail(WorkerStalledError("it did not begin its answer in time"))
        else:
            self._fail(WorkerStalledError(f"no more of its answer in {self._idle_s:g} s"))

    def eof_received(self) -> None:
        """The worker sends no more: the connection is closed."""

    def pause_writing(self) -> None:
        """A request is bounded, and all of it is written: there is nothing to put off."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker has closed it, or it was closed here."""
        reader, self._reader = self._reader, None
        self._patience.end()
        self._pool.lost(self)
        self._transport = None
        self._parser = None  # each holds the other
        if reader is None:
            return
        if self._in_body and not self._framed and exc is None:
            reader.ended()
        elif not self._received and self.reused:
            reader.failed(StaleConnectionError("it closed the connection"))
        else:
            what = "it closed the connection" if exc is None else f"{type(exc).__name__}: {exc}"
            reader.failed(WorkerFailedError(what))

    # The parser's side.

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; one that comes after the head is a trailer's, and goes on with the wire's bytes."""
        if self._in_body:
            return
        name = name.lower()
        self._headers.append((name, value))
        if name == b"content-length":
            self._content_length = int(value)  # the parser has checked it
            self._framed = True
        elif name == b"transfer-encoding":
            if self._framed or value.lower() != b"chunked":
                raise WorkerFailedError(f"its transfer encoding is {value[:40]!r}")
            self._framed = True

    def on_headers_complete(self) -> None:
        """A head is whole."""
        assert self._parser is not None
        self._heads += 1
        self._reusable = (
            self._framed and self._parser.should_keep_alive()
        )  # no longer known at the end

    def on_message_begin(self) -> None:
        """Another answer begins; while one is not yet handed on, that is one too many."""
        if self._complete:
            raise WorkerFailedError("it sends more than its answer")

    def on_body(self, data: bytes) -> None:
        """Some content."""
        assert self._reader is not None
        self._reader.content(data)

    def on_message_complete(self) -> None:
        """The answer is whole, or was a 1xx."""
        self._complete = True


def _to_its_end(data: bytes) -> bytes:
    """The last of an answer without line ends behind it: the parser skips them.

    Chunks end with an empty line, and before it is a line that is not empty. Where the length is known
    its reader takes the content alone.
    """
    over = len(data) - len(data.rstrip(b"\r\n")) - len(HEAD_END)
    return data[:-over] if over > 0 else data


def _malformed(error: Exception) -> WorkerFailedError:
    told = error.__context__ if isinstance(error.__context__, WorkerFailedError) else error
    return WorkerFailedError(f"its answer is malformed: {told}")


class UpstreamPool:
    """The connections to one worker, at `http://host:port`, `https://host:port` or `unix:/path`.

    `router_id` is what the worker tells this router by from others.

    A pool of its own, so that a slow worker cannot take connections from the others; how many there
    are is bounded by the requests that the core sends there.
    """

    def __init__(self, address: str, token: str | None, router_id: str) -> None:
        self._socket: str | None = None
        self._host, self._port = "", 0
        self._ssl: bool | None = None
        self._connections: dict[Upstream, None] = {}
        self._idle: dict[Upstream, None] = {}
        self._closed = False
        host = "worker"
        if address.startswith("unix:"):
            self._socket = address.removeprefix("unix:")
        else:
            url = URL(address)
            self._host, self._port = url.host or "", url.port or 80
            self._ssl = True if url.scheme == "https" else None
            host = url.authority
        lines = [f"host: {host}", f"{ROUTER_HEADER}: {router_id}"]
        if token:
            lines.append(f"authorization: Bearer {token}")
        self.headers = "".join(f"{line}\r\n" for line in lines).encode()

    def idle(self) -> Upstream | None:
        """The connection that was given back last, so that those which are not needed grow old."""
        while self._idle:
            upstream, _ = self._idle.popitem()
            if upstream.usable:
                return upstream
        return None

    async def connect(self) -> Upstream:
        """A new connection. Raises `WorkerFailedError`."""
        loop = asyncio.get_running_loop()
        upstream = Upstream(self, loop)

        def protocol() -> asyncio.Protocol:
            return cast("asyncio.Protocol", upstream)

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self._socket is not None:
                    await loop.create_unix_connection(protocol, self._socket)
                else:
                    await loop.create_connection(protocol, self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            raise WorkerFailedError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise WorkerFailedError(f"{type(error).__name__}: {error}") from None
        return upstream

    def made(self, upstream: Upstream) -> None:
        """It is open."""
        self._connections[upstream] = None
        if self._closed:
            upstream.cut()

    def give_back(self, upstream: Upstream) -> None:
        """It can be asked again."""
        self._idle[upstream] = None

    def lost(self, upstream: Upstream) -> None:
        """It is closed."""
        self._idle.pop(upstream, None)
        self._connections.pop(upstream, None)

    def close(self) -> None:
        """Close all of them, now and later; answers that are under way fail."""
        self._closed = True
        for upstream in tuple(self._connections):
            upstream.cut()
