"""Adapters in Google Cloud Storage, in Azure, and on a WebDAV server, through obstore.

Credentials are found as each cloud's tools find them, in the environment or from the machine's role.
obstore's own retries are off, since one bound holds for the whole download. What it answers is looked
at again here: that it is the version which was listed, since not every server honours `If-Match`.

A tag of Google's is the MD5 of the content, and the same in any bucket. One of Azure's or of a web
server's need not depend on the content at all (nginx makes it of time and size), so it is good at its
own URL alone, and the URL becomes part of it.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

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
    stored_adapter,
)

try:
    import obstore
    import obstore.exceptions
    from obstore.store import ObjectStore, from_url
except ImportError:
    raise StoreError(
        "gs://, az:// and https:// need the package obstore; run `pip install 'lorayard[stores]'`",
        passing=False,
    ) from None

CLIENT: Final[dict[str, Any]] = {
    "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
    "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
    # A request's whole time, which its transfer's deadline bounds; obstore's default is 30 s.
    "timeout": timedelta(days=1),
}
LISTED_AT_ONCE: Final = 1000
MD5_HEX: Final = re.compile(r"[0-9a-f]{32}")
MD5_BYTES: Final = 16
STATUS: Final = re.compile(r"status code: (\d{3})")
DENIED: Final = {
    "gs": "access denied; the credentials (GOOGLE_APPLICATION_CREDENTIALS, or the machine's role) "
    "need storage.objects.list and storage.objects.get",
    "az": "access denied; the credentials (AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY "
    "or AZURE_STORAGE_SAS_TOKEN, or the machine's role) need Storage Blob Data Reader",
    "https": "access denied; the server must let this machine read without a key",
    "http": "access denied; the server must let this machine read without a key",
}


class ObjectsStore:
    """`gs://bucket/prefix`, `az://container/prefix` or `https://host/path`: a sub-folder an adapter.

    A web server must list folders by WebDAV (PROPFIND with `Depth: infinity`).
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme = url.partition("://")[0]
        options = dict(CLIENT)
        if self._scheme == "http" or self._scheme in {"gs", "az"}:
            # Of a cloud's endpoints the environment can name one without TLS, an emulator's.
            options["allow_http"] = True
        top = self.url
        self._prefix = ""
        if self._scheme in {"https", "http"}:
            # WebDAV lists by the whole path, so obstore is given none to begin with.
            parts = urlsplit(self.url)
            top = f"{self._scheme}://{parts.netloc}"
            self._prefix = f"{unquote(parts.path).strip('/')}/".lstrip("/")
        with self._translated(self.url):
            self._store: ObjectStore = from_url(
                top,
                client_options=cast("Any", options),
                retry_config={"max_retries": 0},
            )

    def list(self) -> dict[str, StoredAdapter]:
        """List the whole prefix, page by page."""
        files: dict[str, list[StoredFile]] = {}
        for name, file in self._objects(""):
            files.setdefault(name, []).append(file)
        found = (stored_adapter(name, files[name]) for name in sorted(files))
        return {adapter.name: adapter for adapter in found if adapter is not None}

    def find(self, name: str) -> StoredAdapter | None:
        """List one adapter's sub-folder."""
        if not is_name(name):
            return None
        return stored_adapter(name, [file for where, file in self._objects(name) if where == name])

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Get a range, only if the object is still the one that was listed."""
        what = f"{self.url}/{adapter.name}/{file.name}"
        options: dict[str, Any] = {"range": (start, stop)}
        tag = file.tag.removeprefix(f"{self.url} ")
        if not tag.startswith("modified "):
            options["if_match"] = f'"{tag}"'
        with self._translated(what):
            result = obstore.get(
                self._store,
                f"{self._prefix}{adapter.name}/{file.name}",
                options=cast("Any", options),
            )
            meta = cast("dict[str, Any]", result.meta)
            if (self._tag(meta), meta["size"]) != (file.tag, file.size):
                raise AdapterGoneError(f"{what}: changed or gone since it was listed")
            for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def checksum(
        self,
        adapter: StoredAdapter,  # noqa: ARG002  (other stores need it)
        file: StoredFile,
    ) -> Checksum | None:
        """Return Google's MD5; of the others obstore hands on none."""
        if self._scheme == "gs" and MD5_HEX.fullmatch(file.tag):
            return Checksum(Algorithm.MD5, file.tag)
        return None

    def _objects(self, name: str) -> Iterator[tuple[str, StoredFile]]:
        """Yield (adapter's name, file) for every object two levels under the store's prefix."""
        with self._translated(self.url):
            below = f"{self._prefix}{name}".rstrip("/") or None
            for page in obstore.list(self._store, below, chunk_size=LISTED_AT_ONCE):
                for entry in page:
                    folder, _, file = entry["path"].removeprefix(self._prefix).partition("/")
                    if file and "/" not in file and is_name(folder):
                        tag = self._tag(cast("dict[str, Any]", entry))
                        yield folder, StoredFile(file, entry["size"], tag)

    def _tag(self, meta: dict[str, Any]) -> str:
        """The tag of an object's content, the same of a listing as of a download."""
        # Servers differ, and some with themselves, in whether they put it into quotes.
        tag = (meta["e_tag"] or "").strip('"')
        if self._scheme == "gs" and (md5 := _md5(tag)):
            return md5
        if not tag or tag.startswith("W/"):
            # A weak one says that two contents are alike, not that they are the same.
            tag = f"modified {meta['last_modified'].isoformat()} {tag}".rstrip()
        return f"{self.url} {tag}"

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn obstore's exceptions into ours, once."""
        try:
            yield
        except (obstore.exceptions.PreconditionError, FileNotFoundError):
            if what == self.url:
                raise StoreError(
                    f"{what}: not found; check dynamic_lora_loading_path", passing=False
                ) from None
            raise AdapterGoneError(f"{what}: changed or gone since it was listed") from None
        except (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
        ):
            raise StoreError(f"{what}: {DENIED[self._scheme]}", passing=False) from None
        except (obstore.exceptions.BaseError, ValueError, OSError) as error:
            text = str(error).partition("\n")[0]
            status = STATUS.search(text)
            raise StoreError(
                f"{what}: {text}", passing=status is None or may_pass(int(status[1]))
            ) from None


def _md5(tag: str) -> str:
    """A tag as the MD5 in hex that it is; empty where it is none."""
    if MD5_HEX.fullmatch(tag.lower()):
        return tag.lower()
    try:
        raw = base64.b64decode(tag, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return raw.hex() if len(raw) == MD5_BYTES else ""
