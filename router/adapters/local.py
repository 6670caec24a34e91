"""Adapters in a local folder. They are copied too: a file that is served must not change in place."""

import os
from collections.abc import Callable
from pathlib import Path

from router.adapters.store import (
    CHUNK_BYTES,
    NEEDED,
    AdapterGoneError,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
    stored_adapter,
)


class LocalStore:
    """One sub-folder an adapter."""

    def __init__(self, folder: str) -> None:
        self.url = folder
        self._folder = Path(folder)

    def list(self) -> dict[str, StoredAdapter]:
        """Look into every sub-folder."""
        try:
            with os.scandir(self._folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            raise StoreError(f"adapter folder {self.url}: {error.strerror}") from None
        found = (self.find(name) for name in names)
        return {adapter.name: adapter for adapter in found if adapter is not None}

    def find(self, name: str) -> StoredAdapter | None:
        """Look into one sub-folder."""
        if not is_name(name):
            return None
        files = []
        try:
            with os.scandir(self._folder / name) as entries:
                for entry in entries:
                    if entry.is_file():
                        stat = entry.stat()
                        tag = f"{stat.st_mtime_ns}"
                        files.append(StoredFile(entry.name, stat.st_size, tag))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"adapter folder {self.url}/{name}: {error.strerror}") from None
        return stored_adapter(self.url, name, files)

    def fetch(self, adapter: StoredAdapter, into: Path, should_stop: Callable[[], bool]) -> None:
        """Copy the needed files, then make sure that they did not change meanwhile."""
        for name in NEEDED:
            if adapter.file(name) is None:
                continue
            try:
                with (
                    (self._folder / adapter.name / name).open("rb") as source,
                    (into / name).open("wb") as target,
                ):
                    while chunk := source.read(CHUNK_BYTES):
                        if should_stop():
                            raise StoreError(f"copying {adapter.name} took too long")
                        target.write(chunk)
            except FileNotFoundError:
                raise AdapterGoneError(f"{adapter.name} is no longer in {self.url}") from None
            except OSError as error:
                raise StoreError(f"copying {adapter.name}/{name}: {error.strerror}") from None
        now = self.find(adapter.name)
        if now is None or now.version != adapter.version:
            raise AdapterGoneError(f"{adapter.name} changed in {self.url} while it was copied")
