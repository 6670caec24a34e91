"""Adapters in a local folder. They are copied too: a file that is served must not change in place.

A listing reads no file, so that it stays cheap with many; an adapter's version is the digest of its
content, computed when it is looked up and remembered for as long as size, time of change and inode
stay. So a file that was only touched keeps its version. A symbolic link that leads out of the folder
makes its adapter none: who may write adapters there could have the router hand out any file.
"""

import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from router.adapters.checksum import Algorithm, Checksum
from router.adapters.store import (
    CHUNK_BYTES,
    TRANSFERRED,
    AdapterGoneError,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
    stored_adapter,
)

log = logging.getLogger("lorayard.adapters")

DIGESTS_MAX: Final = 65_536
# A file may change twice within one tick of its file system's clock, and then looks unchanged.
SETTLED_NS: Final = 2_000_000_000
Files = list[StoredFile]


class LocalStore:
    """One sub-folder an adapter."""

    def __init__(self, folder: str) -> None:
        self.url = folder
        self._folder = Path(folder)
        self._digests: OrderedDict[tuple[str, int, str], str] = OrderedDict()
        self._refused: dict[str, None] = {}

    def list(self) -> dict[str, StoredAdapter]:
        """Look into every sub-folder, and into no file: no `version` is known."""
        try:
            with os.scandir(self._folder) as entries:
                names = sorted(entry.name for entry in entries if is_name(entry.name))
        except OSError as error:
            raise StoreError(f"adapter folder {self.url}: {error.strerror}") from None
        found = {}
        for name in names:
            adapter = stored_adapter(name, self._files(name), exact=False)
            if adapter is not None:
                found[name] = adapter
        self._refused = {name: None for name in tuple(self._refused) if name in names}
        return found

    def find(self, name: str) -> StoredAdapter | None:
        """Look into one sub-folder, and read what is in it unless that was done before."""
        if not is_name(name):
            return None
        files = [
            msgspec.structs.replace(file, sha256=self._sha256(name, file))
            if file.name in TRANSFERRED
            else file
            for file in self._files(name)
        ]
        return stored_adapter(name, files)

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Read the file that was listed, and no other that has its name by now."""
        descriptor = self._open(adapter.name, file)
        try:
            while start < stop:
                data = os.pread(descriptor, min(CHUNK_BYTES, stop - start), start)
                if not data:
                    return
                start += len(data)
                yield data
            if _tag(os.fstat(descriptor)) != file.tag:
                raise self._changed(adapter.name)
        except OSError as error:
            raise StoreError(f"{self.url}/{adapter.name}/{file.name}: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def checksum(
        self,
        adapter: StoredAdapter,  # noqa: ARG002  (other stores need it)
        file: StoredFile,
    ) -> Checksum | None:
        """Return the digest that its version was made of."""
        return Checksum(Algorithm.SHA256, file.sha256) if file.sha256 else None

    def _files(self, name: str) -> Files:
        """All files of a sub-folder; none where it is no adapter's."""
        files = []
        try:
            folder = self._folder / name
            if folder.is_symlink() and not self._is_inside(folder):
                return self._refuse(name, folder)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_file():
                        continue
                    if entry.is_symlink() and not self._is_inside(Path(entry.path)):
                        return self._refuse(name, Path(entry.path))
                    stat = entry.stat()
                    files.append(StoredFile(entry.name, stat.st_size, _tag(stat)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"adapter folder {self.url}/{name}: {error.strerror}") from None
        return files

    def _is_inside(self, path: Path) -> bool:
        return self._leads_inside(os.path.realpath(path))

    def _leads_inside(self, path: str) -> bool:
        # The folder may be a link itself, and lead elsewhere by now: that is how releases are changed.
        return path.startswith(os.path.realpath(self._folder) + os.sep)

    def _refuse(self, name: str, link: Path) -> Files:
        if name not in self._refused:
            self._refused[name] = None
            log.warning(
                "adapter %s is left out: %s is a symbolic link that leads out of %s; "
                "copy what it links to into the folder",
                name,
                link,
                self.url,
            )
        return []

    def _open(self, name: str, file: StoredFile) -> int:
        path = os.path.realpath(self._folder / name / file.name)
        if not self._leads_inside(path):
            raise self._changed(name)
        try:
            # What a link led to was looked at above: that the last part is none now costs nothing.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._changed(name) from None
        except OSError as error:
            raise StoreError(
                f"{self.url}/{name}/{file.name}: {error.strerror}", passing=False
            ) from None
        if _tag(os.fstat(descriptor)) != file.tag:
            os.close(descriptor)
            raise self._changed(name)
        return descriptor

    def _sha256(self, name: str, file: StoredFile) -> str:
        key = (f"{name}/{file.name}", file.size, file.tag)
        if (known := self._digests.get(key)) is not None:
            return known
        descriptor = self._open(name, file)
        with open(descriptor, "rb") as content:  # noqa: PTH123  (a descriptor)
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            stat = os.fstat(descriptor)
        if _tag(stat) != file.tag:
            raise StoreError(f"{self.url}/{name}/{file.name} is being written; try again")
        if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            self._digests[key] = digest
            if len(self._digests) > DIGESTS_MAX:
                self._digests.popitem(last=False)
        return digest

    def _changed(self, name: str) -> AdapterGoneError:
        return AdapterGoneError(f"adapter {name} changed in {self.url}, or left it")


def _tag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}"
