"""Adapters in a repository of the Hugging Face hub, through huggingface_hub.

One repository is one store, with a sub-folder an adapter: its listing is one request, and its files'
hashes are part of it. A repository, or a folder, that is itself an adapter, as most of them are, is a
store of one, by its own name. Endpoint and token are found as every tool of the hub finds them.

The library downloads whole files into a cache of its own; what is needed here are ranges. So it lists,
and says where a file is and what to send along; the bytes come over urllib3, which boto3 has too.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from router.adapters.checksum import Algorithm, Checksum
from router.adapters.store import (
    CHUNK_BYTES,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    AdapterGoneError,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
    may_pass,
    seconds_of,
    stored_adapter,
)
from router.config import CONNECTIONS_MAX

try:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import EntryNotFoundError, build_hf_headers
except ImportError:
    raise StoreError(
        "hf:// needs the package huggingface_hub; run `pip install 'lorayard[stores]'`",
        passing=False,
    ) from None

REDIRECTS_MAX: Final = 5
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
DENIED: Final = "access denied, or no such repository; set HF_TOKEN to a token that may read it"
DENIALS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
GONE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED})


class HubStore:
    """`hf://ORG/REPO[/folder][@revision]`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        path, _, revision = self.url.removeprefix("hf://").partition("@")
        parts = path.split("/")
        self._repo = "/".join(parts[:2])
        self._folder = "/".join(parts[2:])
        self._revision = revision or "main"
        # What a repository or folder is called that is one adapter itself.
        self._own_name = parts[-1]
        self._is_adapter: bool | None = None
        # Read now, since the library reads it only when it is imported.
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="lorayard")
        self._pools: dict[str, urllib3.PoolManager] = {}  # by the proxy that they go through

    def list(self) -> dict[str, StoredAdapter]:
        """List the whole folder."""
        files: dict[str, list[StoredFile]] = {}
        for name, file in self._files(self._folder, deep=True):
            files.setdefault(name, []).append(file)
        own = stored_adapter(self._own_name, files.pop("", ()))
        self._is_adapter = own is not None and is_name(own.name)
        if own is not None and self._is_adapter:
            return {own.name: own}
        found = (stored_adapter(name, files[name]) for name in sorted(files) if is_name(name))
        return {adapter.name: adapter for adapter in found if adapter is not None}

    def find(self, name: str) -> StoredAdapter | None:
        """List one adapter's sub-folder."""
        if not is_name(name):
            return None
        if self._is_adapter is None:
            self.list()
        if self._is_adapter and name != self._own_name:
            return None
        files = self._files(self._folder_of(name), deep=False)
        return stored_adapter(name, [file for _, file in files])

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Get a range, only if the file is still the one that was listed."""
        what = f"{self.url}/{adapter.name}/{file.name}"
        with self._translated(what):
            answer = self._get(
                what,
                f"{self._folder_of(adapter.name)}/{file.name}".lstrip("/"),
                file.tag,
                start,
                stop,
            )
            with closing(answer):
                left = stop - start
                if answer.status == HTTPStatus.OK:  # whole: small files come as they are
                    skip = start
                    while skip and (chunk := answer.read(min(CHUNK_BYTES, skip))):
                        skip -= len(chunk)
                while left and (chunk := answer.read(min(CHUNK_BYTES, left))):
                    left -= len(chunk)
                    yield chunk

    def checksum(
        self,
        adapter: StoredAdapter,  # noqa: ARG002  (other stores need it)
        file: StoredFile,
    ) -> Checksum | None:
        """Return what git names the content by: SHA-256 if it is large, else git's own hash."""
        if file.sha256:
            return Checksum(Algorithm.SHA256, file.sha256)
        return Checksum(Algorithm.GIT_BLOB, file.tag)

    def _folder_of(self, name: str) -> str:
        return self._folder if self._is_adapter else f"{self._folder}/{name}".lstrip("/")

    def _files(self, folder: str, *, deep: bool) -> Iterator[tuple[str, StoredFile]]:
        """Yield (sub-folder, file) for files in `folder`, and in its sub-folders if `deep`."""
        with self._translated(self.url):
            try:
                entries = list(
                    self._api.list_repo_tree(
                        self._repo, folder or None, recursive=deep, revision=self._revision
                    )
                )
            except EntryNotFoundError:
                return
        for entry in entries:
            if not isinstance(entry, RepoFile):
                continue
            path = entry.path.removeprefix(f"{folder}/") if folder else entry.path
            name, _, file = path.rpartition("/")
            sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
            yield name, StoredFile(file, entry.size, sha256 or entry.blob_id, sha256)

    def _get(self, what: str, path: str, tag: str, start: int, stop: int) -> Any:  # noqa: ANN401
        """The answer with the range, after the redirections to where large files are."""
        url = hf_hub_url(self._repo, path, revision=self._revision, endpoint=self._api.endpoint)
        token = build_hf_headers(library_name="lorayard")
        seen = ""
        for _ in range(REDIRECTS_MAX):
            headers = {**token, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            answer = self._pool(url).request(
                "GET", url, headers=headers, preload_content=False, redirect=False
            )
            # The hub itself names the content; where it redirects to need not.
            seen = seen or _tag(answer.headers)
            location = answer.headers.get("location")
            if location is None or answer.status not in REDIRECTS:
                break
            answer.drain_conn()
            answer.release_conn()
            target = urljoin(url, location)
            if urlsplit(target).netloc != urlsplit(url).netloc:
                token = {"user-agent": token.get("user-agent", "lorayard")}
            url = target
        if answer.status in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT} and seen == tag:
            return answer
        answer.close()
        status = answer.status
        if status in GONE or (status < HTTPStatus.BAD_REQUEST and seen != tag):
            raise AdapterGoneError(f"{what}: changed or gone since it was listed")
        raise StoreError(
            f"{what}: {DENIED if status in DENIALS else f'the hub answered {status}'}",
            passing=may_pass(status),
            retry_after_s=seconds_of(answer.headers.get("retry-after")),
        )

    def _pool(self, url: str) -> urllib3.PoolManager:
        """The connections for a URL: as the library's, through the proxy of the environment, if any."""
        parts = urlsplit(url)
        proxies = {} if proxy_bypass(parts.netloc) else getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
        pool = self._pools.get(proxy)
        if pool is None:
            pool = self._pools.setdefault(proxy, _pool_through(proxy))
        return pool

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn the library's exceptions, and those of its HTTP client, into ours, once."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  (httpx's or httpx2's, by the library's version)
            raise self._error(what, error) from None

    def _error(self, what: str, error: Exception) -> StoreError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in {*DENIALS, HTTPStatus.NOT_FOUND}:
            return StoreError(f"{what}: {DENIED}", passing=False)
        text = str(error).partition("\n")[0] or type(error).__name__
        return StoreError(f"{what}: {text}", passing=status is None or may_pass(status))


def _pool_through(proxy: str) -> urllib3.PoolManager:
    options: dict[str, Any] = {
        "maxsize": CONNECTIONS_MAX,
        "retries": False,
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
    }
    if not proxy:
        return urllib3.PoolManager(**options)
    user = urllib3.util.parse_url(proxy).auth
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)


def _tag(headers: Any) -> str:  # noqa: ANN401
    """What the hub names the content by, of which only its own answers tell."""
    tag: str = headers.get("x-linked-etag") or headers.get("etag") or ""
    return tag.removeprefix("W/").strip('"')
