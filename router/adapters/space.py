"""The room that adapters take on a disk: bounded, least recently used out, over all processes.

A version's folder is used when its time of change says so: whoever uses it sets that. What a process
holds carries a shared lock, what is being fetched an exclusive one; neither is removed. A folder is
moved aside in one step before it is deleted, so that what is in place is always whole. Room is made,
and taken by files of the full size, under one lock for the whole disk folder: two fetches cannot both
be given the last of it.

    ROOT/MODEL/NAME@VERSION/             a version, whole
    ROOT/MODEL/.partial-NAME@VERSION/    one that is being fetched, or was until it was cut off
    ROOT/MODEL/.fetch-..., .hold-...     the locks
    ROOT/MODEL/.gone-.../                one that is being deleted
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from router.adapters.locks import locked, try_lock, unlock_shared
from router.adapters.pace import Deadline
from router.adapters.transfer import journal_of

log = logging.getLogger("lorayard.adapters")

PARTIAL: Final = ".partial-"
FETCH: Final = ".fetch-"
HOLD: Final = ".hold-"
GONE: Final = ".gone-"
ROOM: Final = ".room"
# How long a download that was cut off may be taken up again.
STALE_S: Final = 3600.0
GIB: Final = 2**30
HOLD_TRIES: Final = 100
HOLD_PAUSE_S: Final = 0.001
Locks = list[tuple[int, Path]]


class NoRoomError(Exception):
    """There is no room for an adapter, and nothing that could leave. The message says why."""


class Entry(msgspec.Struct, frozen=True):
    """A version on the disk, or the beginning of one. `used` is when it was last, in seconds."""

    place: Path
    bytes: int
    used: float
    partial: bool


def partial_of(place: Path) -> Path:
    """Where a version is fetched to, before it is moved to its place."""
    return place.with_name(f"{PARTIAL}{place.name}")


def fetch_lock_of(place: Path) -> Path:
    """The lock of who fetches a version."""
    return place.with_name(f"{FETCH}{place.name}")


class Space:
    """The folder `root` with a folder for each base model; `max_bytes` None has no bound."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._sizes: dict[Path, int] = {}
        self._held: dict[Path, tuple[int, int | None]] = {}
        self._looking = threading.Lock()
        self._bytes: dict[Path, int] = {}

    def bytes_in(self, folder: Path) -> int:
        """Bytes in a model's folder when it was last looked at: after each fetch, at the latest."""
        return self._bytes.get(folder, 0)

    def prepare(self, folder: Path) -> None:
        """Make a model's folder, and remove what processes that were killed have left in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name.startswith(GONE):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(PARTIAL):
                self._remove_stale(path)
            elif path.name.startswith((FETCH, HOLD)) and (file := try_lock(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(file)
        self.look()

    def look(self) -> list[Entry]:
        """Everything that takes room, the least recently used first."""
        with self._looking:
            found = sorted(self._entries(), key=lambda entry: (not entry.partial, entry.used))
            self._sizes = {entry.place: entry.bytes for entry in found if not entry.partial}
            self._bytes = {}
            for entry in found:
                folder = entry.place.parent
                self._bytes[folder] = self._bytes.get(folder, 0) + entry.bytes
            return found

    @contextmanager
    def room_for(self, place: Path, size: int, deadline: Deadline) -> Iterator[None]:
        """Make room for a version; its files are to be made, at full size, before this is left.

        Raises `NoRoomError`, and `TooLateError` where other processes take too long.
        """
        if self._max_bytes is None:
            yield
            return
        if size > self._max_bytes:
            raise NoRoomError(
                f"it has {size / GIB:.3g} GiB, and router.cache_max_gib is "
                f"{self._max_bytes / GIB:.3g}; raise that"
            )
        with locked(self._root / ROOM, deadline):
            entries = self.look()
            mine = partial_of(place)
            taken = sum(entry.bytes for entry in entries if entry.place not in {mine, place})
            over = taken + size - self._max_bytes
            keep = {mine, place}
            # Nothing leaves for what would find no room all the same.
            if over > 0 and (
                not self._could_remove(entries, over, keep)
                or self._remove(entries, over, keep) < over
            ):
                raise NoRoomError(
                    f"no room on disk: it needs {size / GIB:.3g} GiB, and what is in use leaves less "
                    f"of router.cache_max_gib, {self._max_bytes / GIB:.3g}; raise that"
                )
            yield

    def free(self, size: int, keep: Path) -> int:
        """Remove what is not in use until `size` bytes are freed, or nothing is left; bytes freed."""
        return self._remove(self.look(), size, keep={partial_of(keep), keep})

    def hold(self, place: Path) -> None:
        """Keep a version from being removed, until `let_go` was called as often.

        Where no lock can be had, as on a disk that is full, that is so in this process alone.
        """
        count, file = self._held.get(place, (0, None))
        if not count:
            try:
                file = self._locked_hold(place)
            except OSError as error:
                log.warning("%s: other processes may remove it: %s", place.name, error.strerror)
        self._held[place] = count + 1, file

    def _locked_hold(self, place: Path) -> int | None:
        place.parent.mkdir(parents=True, exist_ok=True)
        path = place.with_name(f"{HOLD}{place.name}")
        # Who has it alone is moving the version away, which takes an instant.
        for _ in range(HOLD_TRIES):
            if (file := try_lock(path, shared=True)) is not None:
                return file
            time.sleep(HOLD_PAUSE_S)
        return None

    def let_go(self, place: Path) -> None:
        """Undo one `hold`."""
        count, file = self._held.pop(place)
        if count > 1:
            self._held[place] = count - 1, file
        elif file is not None:
            unlock_shared(file, place.with_name(f"{HOLD}{place.name}"))

    def _entries(self) -> Iterator[Entry]:
        for folder in sorted(_folders(self._root)):
            for path in _folders(folder):
                partial = path.name.startswith(PARTIAL)
                if path.name.startswith(".") and not partial:
                    continue
                try:
                    size = self._sizes.get(path) if not partial else None
                    if size is None:
                        with os.scandir(path) as files:
                            size = sum(file.stat().st_size for file in files)
                    used = path.stat().st_mtime
                    yield Entry(path, size, used, partial)
                except FileNotFoundError:  # removed meanwhile, by another process
                    continue

    def _could_remove(self, entries: Iterable[Entry], size: int, keep: set[Path]) -> bool:
        """Whether so much is not in use now."""
        for entry in entries:
            if size <= 0:
                break
            if entry.place not in keep and (locks := self._locks_of(entry.place)) is not None:
                _give_back(locks)
                size -= entry.bytes
        return size <= 0

    def _remove(self, entries: Iterable[Entry], size: int, keep: set[Path]) -> int:
        freed = 0
        for entry in entries:
            if freed >= size:
                break
            if entry.place not in keep and self._remove_one(entry.place):
                freed += entry.bytes
        return freed

    def _remove_one(self, path: Path) -> bool:
        """Remove a version, or the beginning of one, unless it is held or fetched."""
        locks = self._locks_of(path)
        if locks is None:
            return False
        gone = path.with_name(f"{GONE}{secrets.token_hex(8)}")
        try:
            path.rename(gone)
        except FileNotFoundError:
            return False
        finally:
            _give_back(locks)
        journal_of(path).unlink(missing_ok=True)
        shutil.rmtree(gone, ignore_errors=True)
        log.debug("removed %s", path)
        return True

    def _locks_of(self, path: Path) -> Locks | None:
        """Those that keep a version, or the beginning of one, taken; None where others have one."""
        name = path.name.removeprefix(PARTIAL)
        if path.with_name(name) in self._held:
            return None
        locks: Locks = []
        for prefix in (HOLD, FETCH):
            lock = path.with_name(f"{prefix}{name}")
            descriptor = try_lock(lock)
            if descriptor is None:
                _give_back(locks)
                return None
            locks.append((descriptor, lock))
        return locks

    def _remove_stale(self, path: Path) -> None:
        try:
            newest = max(file.stat().st_mtime for file in (path, journal_of(path)) if file.exists())
        except (ValueError, FileNotFoundError):
            return
        if time.time() - newest < STALE_S:
            return
        if path.is_dir():
            self._remove_one(path)
        elif not path.with_suffix("").is_dir():
            path.unlink(missing_ok=True)


def _give_back(locks: Locks) -> None:
    for descriptor, lock in locks:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
