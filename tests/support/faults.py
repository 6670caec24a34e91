"""A web proxy before a real store's server, which fails as networks and stores do when told to.

Faults are of GET requests whose path has a given end, and are used up in order. What passes is counted
by path: who fetched what, and how many bytes of it.
"""

import http.client
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock
from urllib.parse import unquote, urlsplit

from file_server import served

HOP = {"connection", "transfer-encoding", "content-length", "date", "server", "keep-alive"}


@dataclass
class Fault:
    """What happens to the next `times` requests for a path that ends with `path`.

    Either a `status` with `headers` and `body`; or the answer itself, after `before` was called: cut
    off or stalled after so many bytes, or with a byte of it changed.
    """

    path: str
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    stall_after: int | None = None
    corrupt: bool = False
    before: Callable[[], None] = lambda: None


class FaultProxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream)
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()  # GET, by the last part of the path
        self.bytes: Counter[str] = Counter()
        self.payers: set[str | None] = set()  # what requests said about who pays
        self.budget: int | None = None  # of bytes of weights in all, after which it stalls
        self.stalled = Event()
        self.released = Event()
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def forget(self) -> None:
        """Count anew, without faults."""
        self.faults.clear()
        self.requests.clear()
        self.bytes.clear()
        self.budget = None
        self.stalled.clear()

    def take(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return None

    def may_send(self, name: str, size: int) -> int:
        """How many of so many bytes go out; they are counted."""
        with self.lock:
            if self.budget is not None and name.endswith(".safetensors"):
                size = min(size, self.budget)
                self.budget -= size
            self.bytes[name] += size
            return size


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def forward(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition("/")[2]
        fault = None
        self.server.payers.add(self.headers.get("x-amz-request-payer"))
        sent_body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.command == "GET":
            with self.server.lock:
                self.server.requests[name] += 1
            fault = self.server.take(path)
        if fault is not None and fault.status:
            self.send(fault.status, fault.headers, len(fault.body))
            self.wfile.write(fault.body)
            return
        if fault is not None:
            fault.before()
        upstream = http.client.HTTPConnection(self.server.upstream.netloc, timeout=30)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
            upstream.request(self.command, self.path, sent_body or None, headers)
            answer = upstream.getresponse()
            body = answer.read()
            length = int(answer.headers.get("content-length", len(body)))
            self.send(answer.status, dict(answer.headers), length)
        finally:
            upstream.close()
        if self.command != "HEAD":
            self.send_body(name, body, fault)

    def send(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in HOP:
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_body(self, name: str, body: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        limits = [fault.cut_after, fault.stall_after] if fault is not None else []
        size = min([len(body), *(limit for limit in limits if limit is not None)])
        allowed = self.server.may_send(name, size)
        self.wfile.write(body[:allowed])
        self.wfile.flush()
        if allowed < size or (fault is not None and fault.stall_after is not None):
            self.server.stalled.set()
            self.server.released.wait()
            self.close_connection = True
        elif allowed < len(body):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = forward  # noqa: N815


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream)
    proxy.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    with served(proxy):
        try:
            yield proxy
        finally:
            proxy.released.set()
