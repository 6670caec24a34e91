"""A place that adapters are stored in: one sub-folder an adapter, two files in it that matter.

Stores are plain blocking code, since the client libraries are; the callers run them in threads and
bound their time. A store neither caches nor validates.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

import msgspec

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
NEEDED: Final = (CONFIG_FILE, WEIGHTS_FILE)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHUNK_BYTES: Final = 1 << 20


def is_name(name: str) -> bool:
    """Whether this can be an adapter's name: letters, digits, `.`, `_`, `-`, and never `..`."""
    return NAME.fullmatch(name) is not None and ".." not in name


class StoredFile(msgspec.Struct, frozen=True):
    """One file of an adapter. `tag` changes when its content does (an ETag, a time of change)."""

    name: str
    size: int
    tag: str


class StoredAdapter(msgspec.Struct, frozen=True):
    """An adapter as it is in the store now. `version` changes when any of its files does."""

    name: str
    version: str
    files: tuple[StoredFile, ...]

    def file(self, name: str) -> StoredFile | None:
        """The file of that name, if there is one."""
        return next((file for file in self.files if file.name == name), None)


def stored_adapter(store_url: str, name: str, files: Iterable[StoredFile]) -> StoredAdapter | None:
    """An adapter of these files, or None where they are none: it needs an adapter_config.json."""
    ordered = tuple(sorted(files, key=lambda file: file.name))
    if all(file.name != CONFIG_FILE for file in ordered):
        return None
    digest = hashlib.blake2b(store_url.encode(), digest_size=8)
    for file in ordered:
        if file.name in NEEDED:
            digest.update(f"\n{name}/{file.name} {file.size} {file.tag}".encode())
    return StoredAdapter(name, digest.hexdigest(), ordered)


class StoreError(Exception):
    """The store could not be read. The message says which, and what to look at."""


class AdapterGoneError(StoreError):
    """The adapter was listed, and is not there, or is another one by now."""


class AdapterStore(Protocol):
    """Lists and fetches adapters. Every method blocks, and raises `StoreError`."""

    url: str

    def list(self) -> dict[str, StoredAdapter]:
        """All adapters by name."""

    def find(self, name: str) -> StoredAdapter | None:
        """One adapter, looked up now."""

    def fetch(self, adapter: StoredAdapter, into: Path, should_stop: Callable[[], bool]) -> None:
        """Write the needed files to an empty folder, whole; give up when `should_stop`."""
