"""Stands in for the Hugging Face hub: the routes that huggingface_hub asks for, over a folder.

It is no copy of the hub. What it does as the hub does: a tree with git's hash of each file and the
SHA-256 of large ones, pages of it by `Link`, and large files at another server, after a redirection
that names the content by `X-Linked-Etag`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from file_server import FileServer, Handler, served

REPO = "acme/adapters"
PAGE = 1000


class HubServer(FileServer):
    def __init__(self, folder: Path, storage_url: str) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.storage_url = storage_url
        self.tags = "strong"
        self.tokens: list[str | None] = []  # those that came along to the hub


class Storage(FileServer):
    """Where large files are: it is sent no token."""

    def __init__(self, folder: Path) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), StorageHandler)
        self.folder = folder
        self.tags = "none"
        self.tokens: list[str | None] = []


class StorageHandler(Handler):
    server: Storage

    def do_GET(self) -> None:  # noqa: N802
        self.server.tokens.append(self.headers.get("authorization"))
        super().do_GET()


class HubHandler(Handler):
    server: HubServer

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        if REPO in path:  # the library asks for things of its own, too
            self.server.tokens.append(self.headers.get("authorization"))
        tree, resolve = f"/api/models/{REPO}/tree/main", f"/{REPO}/resolve/main/"
        if path == tree or path.startswith(f"{tree}/"):
            self.tree(path.removeprefix(tree).strip("/"))
        elif path.startswith(resolve):
            self.resolve(path.removeprefix(resolve))
        else:
            body = json.dumps({"error": "Repository not found"}).encode()
            self.answer(HTTPStatus.NOT_FOUND, body, {"X-Error-Code": "RepoNotFound"})

    def tree(self, below: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        top = self.server.folder / below
        if not top.is_dir():
            return self.answer(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries = [self.entry(path) for path in sorted(top.rglob("*") if deep else top.iterdir())]
        start = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            here = f"http://127.0.0.1:{self.server.server_port}{urlsplit(self.path).path}"
            again = f"recursive={deep}&cursor={start + PAGE}"
            headers["Link"] = f'<{here}?{again}>; rel="next"'
        body = json.dumps(entries[start : start + PAGE]).encode()
        return self.answer(HTTPStatus.OK, body, headers)

    def entry(self, path: Path) -> dict[str, object]:
        name = str(path.relative_to(self.server.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if is_large(path):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def resolve(self, name: str) -> None:
        path = self.server.folder / name
        if not path.is_file():
            return self.answer(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        if is_large(path):
            headers = {
                "Location": f"{self.server.storage_url}/{name}",
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            return self.answer(HTTPStatus.FOUND, b"Found", headers)
        return self.answer(HTTPStatus.OK, data, {"ETag": f'"{git_hash(data)}"'})


def is_large(path: Path) -> bool:
    return path.suffix in {".safetensors", ".bin"}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def hub_server(folder: Path) -> Iterator[tuple[HubServer, Storage]]:
    storage = Storage(folder)
    hub = HubServer(folder, storage.url)
    with ExitStack() as stack:
        stack.enter_context(served(storage))
        stack.enter_context(served(hub))
        yield hub, storage
