"""A web server for a folder, as one that has WebDAV: ranges, ETags, conditions, and listings.

Its ETags are strong unless `weak`, and made of the content. `without_tags` sends times alone.
"""

import email.utils
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote, urlsplit
from xml.sax.saxutils import escape


class FileServer(ThreadingHTTPServer):
    """The server of a folder; its address is `url`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.tags = "strong"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def tag(self, path: Path) -> str | None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:20]
        return {"strong": f'"{digest}"', "weak": f'W/"{digest}"'}.get(self.tags)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    @property
    def file(self) -> Path:
        return self.server.folder / unquote(urlsplit(self.path).path).strip("/")

    def do_PROPFIND(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        top = self.file
        if not top.exists():
            return self.answer(HTTPStatus.NOT_FOUND)
        everything = [top, *sorted(top.rglob("*"))] if top.is_dir() else [top]
        responses = "".join(self.properties(path) for path in everything)
        body = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{responses}</D:multistatus>'
        return self.answer(
            HTTPStatus.MULTI_STATUS, body.encode(), {"Content-Type": "application/xml"}
        )

    def properties(self, path: Path) -> str:
        stat = path.stat()
        href = quote(f"/{path.relative_to(self.server.folder)}".replace("/.", "/"))
        kind = "<D:resourcetype/>"
        if path.is_dir():
            href, kind = f"{href}/", "<D:resourcetype><D:collection/></D:resourcetype>"
        tag = self.server.tag(path) if path.is_file() else None
        etag = f"<D:getetag>{escape(tag)}</D:getetag>" if tag else ""
        modified = email.utils.formatdate(stat.st_mtime, usegmt=True)
        return (
            f"<D:response><D:href>{href}</D:href><D:propstat><D:prop>{kind}"
            f"<D:getcontentlength>{stat.st_size}</D:getcontentlength>"
            f"<D:getlastmodified>{modified}</D:getlastmodified>{etag}"
            "</D:prop><D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self.file.is_file():
            return self.answer(HTTPStatus.NOT_FOUND)
        data = self.file.read_bytes()
        tag = self.server.tag(self.file)
        wanted = self.headers.get("if-match")
        if wanted is not None and wanted != tag:
            return self.answer(HTTPStatus.PRECONDITION_FAILED)
        modified = email.utils.formatdate(self.file.stat().st_mtime, usegmt=True)
        headers = {
            "Last-Modified": modified,
            "Accept-Ranges": "bytes",
            **({"ETag": tag} if tag else {}),
        }
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if found is None:
            return self.answer(HTTPStatus.OK, data, headers)
        start, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        return self.answer(HTTPStatus.PARTIAL_CONTENT, data[start : last + 1], headers)

    def answer(
        self, status: HTTPStatus, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[None]:
    """Run a server in a thread until the end of the block."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    with served(server):
        yield server
