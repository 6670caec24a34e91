"""A place that adapters are stored in: one sub-folder an adapter, two files in it that matter.

A store lists, finds, and reads a range of bytes of one file, only if it is still the one that was
listed. It is plain blocking code, since the client libraries are; the callers run it in threads. It
neither caches, retries, verifies nor validates: that is written once for all stores, in transfer.py
and cache.py. What its client library raises becomes `StoreError` here and nowhere else.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import msgspec

from router.adapters.checksum import Checksum

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
SUMS_FILE: Final = "SHA256SUMS"
NEEDED: Final = (CONFIG_FILE, WEIGHTS_FILE)
TRANSFERRED: Final = (*NEEDED, SUMS_FILE)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHUNK_BYTES: Final = 1 << 20
# What a call may wait for the network. No thread outlives the deadline of its transfer by more.
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 10.0
TOO_EARLY_OR_MANY: Final = frozenset({408, 425, 429})
SERVER_ERROR: Final = 500


def is_name(name: str) -> bool:
    """Whether this can be an adapter's name: letters, digits, `.`, `_`, `-`, and never `..`."""
    return NAME.fullmatch(name) is not None and ".." not in name


class StoredFile(msgspec.Struct, frozen=True):
    """One file of an adapter, of `size` bytes. `tag` changes when its content does.

    `sha256` is of its content, in hex, where the store knows it.
    """

    name: str
    size: int
    tag: str
    sha256: str = ""


class StoredAdapter(msgspec.Struct, frozen=True):
    """An adapter as it is in the store now.

    `version` names its content, in 16 hex digits; it is empty where a listing could not know it
    without reading files. `revision` is cheap: it changes whenever the content may have.
    """

    name: str
    version: str
    revision: str
    files: tuple[StoredFile, ...]

    def file(self, name: str) -> StoredFile | None:
        """The file of that name, if there is one."""
        return next((file for file in self.files if file.name == name), None)

    @property
    def transferred(self) -> tuple[StoredFile, ...]:
        """The files that are brought to a host: what engines need, and its checksums."""
        found = (self.file(name) for name in TRANSFERRED)
        return tuple(file for file in found if file is not None)


def stored_adapter(
    name: str, files: Iterable[StoredFile], *, exact: bool = True
) -> StoredAdapter | None:
    """An adapter of these files, or None where they are none: it needs an adapter_config.json.

    `exact` says that each file's `sha256`, or else its `tag`, is another one for other content.
    """
    ordered = tuple(sorted(files, key=lambda file: file.name))
    if all(file.name != CONFIG_FILE for file in ordered):
        return None
    that_matter = [file for file in ordered if file.name in TRANSFERRED]
    revision = _digest((file.name, file.size, file.tag) for file in that_matter)
    version = _digest((file.name, file.size, file.sha256 or file.tag) for file in that_matter)
    return StoredAdapter(name, version if exact else "", revision, ordered)


def _digest(rows: Iterable[tuple[str, int, str]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, size, tag in rows:
        digest.update(f"\n{name} {size} {tag}".encode())
    return digest.hexdigest()


class StoreError(Exception):
    """The store could not be read. The message says which, and what to look at.

    `passing` is whether another try may help, and `retry_after_s` how long the store asks to wait
    before it.
    """

    def __init__(self, message: str, *, passing: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.passing = passing
        self.retry_after_s = retry_after_s


class AdapterGoneError(StoreError):
    """The adapter was listed, and is not there, or is another one by now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=False)


def may_pass(status: int) -> bool:
    """Whether the same request may succeed later, by the HTTP status of its answer."""
    return status in TOO_EARLY_OR_MANY or status >= SERVER_ERROR


def seconds_of(retry_after: str | None) -> float:
    """The value of a `Retry-After` header in seconds; 0 where it has none, or a date."""
    text = (retry_after or "").strip()
    return float(text) if text.isdecimal() and len(text) <= len("86400") else 0.0


class AdapterStore(Protocol):
    """Lists and reads adapters. Every method blocks, and raises `StoreError`."""

    url: str

    def list(self) -> dict[str, StoredAdapter]:
        """All adapters by name."""

    def find(self, name: str) -> StoredAdapter | None:
        """One adapter, looked up now; its `version` is known."""

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Yield the bytes from `start` to before `stop`, in pieces.

        Raises `AdapterGoneError` where the file is not the one that was listed any more.
        """

    def checksum(self, adapter: StoredAdapter, file: StoredFile) -> Checksum | None:
        """The best checksum of the file's content that the store knows; None where it knows none."""
