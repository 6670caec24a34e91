"""The copy on disk: each adapter version in a folder of its own, whole or not there at all.

A version is fetched once, however many workers want it at once, into a temporary folder beside its
place, checked, and moved there in one step. What is in place is therefore complete and sound, also
after a `kill -9`, and processes may share the folder: one of them fetches, under a lock that the kernel
takes back from who is killed, and the others find it done.
"""

import asyncio
import fcntl
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from anyio import CapacityLimiter, to_thread

from router.adapters.store import (
    NEEDED,
    AdapterGoneError,
    AdapterStore,
    StoredAdapter,
    StoreError,
)
from router.adapters.validate import (
    AdapterRules,
    InvalidAdapterError,
    check_files,
    check_listing,
)
from router.core.job import LoadError, LoadFault

PARTIAL: Final = ".partial-"
LOCK: Final = ".lock-"
LOCK_POLL_S: Final = 0.02
STALE_S: Final = 3600.0
BACKOFF_S: Final = 0.2
FETCHES_MAX: Final = 8


def default_cache_dir() -> Path:
    """Where adapters are kept if the configuration does not say: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorayard"


class AdapterCache:
    """Adapters of one store on this machine's disk."""

    def __init__(
        self,
        store: AdapterStore,
        folder: Path,
        rules: AdapterRules,
        *,
        timeout_s: float,
        max_tries: int,
    ) -> None:
        self._store = store
        self._folder = folder
        self._rules = rules
        self._timeout_s = timeout_s
        self._max_tries = max_tries
        # Found sound by the rules that hold now; what another run left on disk is checked again.
        self._sound: dict[str, None] = {}
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        # Of its own, so that neither a slow store nor the listing can take the other's threads.
        self._threads = CapacityLimiter(FETCHES_MAX)

    def prepare(self) -> None:
        """Make the folder, and remove what downloads that were cut off have left in it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"{PARTIAL}*"):
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)

    def has(self, adapter: StoredAdapter) -> bool:
        """Whether the adapter was found sound and whole here, so that nothing need be fetched."""
        name = f"{adapter.name}@{adapter.version}"
        return name in self._sound and name not in self._fetching

    async def folder_of(self, adapter: StoredAdapter) -> Path:
        """The folder with the adapter's files, fetched now if need be. Raises `LoadError`."""
        place = self._folder / f"{adapter.name}@{adapter.version}"
        task = self._fetching.get(place.name)
        if task is None:
            if place.name in self._sound and all((place / name).is_file() for name in NEEDED):
                return place
            task = asyncio.create_task(self._fetch(adapter, place))
            self._fetching[place.name] = task
            task.add_done_callback(lambda _: self._fetching.pop(place.name, None))
        # Shielded: who leaves must not end the download that others wait for.
        return await asyncio.shield(task)

    async def _fetch(self, adapter: StoredAdapter, place: Path) -> Path:
        try:
            check_listing(adapter)
        except InvalidAdapterError as error:
            raise LoadError(LoadFault.ADAPTER_INVALID, str(error)) from None
        last = ""
        for attempt in range(self._max_tries):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0))
            stop = threading.Event()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await to_thread.run_sync(
                        self._fetch_once,
                        adapter,
                        place,
                        stop,
                        abandon_on_cancel=True,  # it sees `stop`, and cleans up after itself
                        limiter=self._threads,
                    )
            except TimeoutError:
                last = f"not here after {self._timeout_s:g} s (download_timeout_s)"
            except AdapterGoneError as error:
                raise LoadError(LoadFault.ADAPTER_CHANGED, str(error)) from None
            except InvalidAdapterError as error:
                raise LoadError(LoadFault.ADAPTER_INVALID, str(error)) from None
            except StoreError as error:
                last = str(error)
            except OSError as error:
                last = f"{self._folder}: {error.strerror}"
            else:
                self._sound[place.name] = None
                return place
            finally:
                stop.set()
        tries = "1 try" if self._max_tries == 1 else f"{self._max_tries} tries"
        raise LoadError(
            LoadFault.STORE_UNAVAILABLE, f"adapter {adapter.name}: {last}, after {tries}"
        )

    def _fetch_once(self, adapter: StoredAdapter, place: Path, stop: threading.Event) -> None:
        with _locked(place.with_name(f"{LOCK}{place.name}"), stop.is_set):
            self._fetch_alone(adapter, place, stop)

    def _fetch_alone(self, adapter: StoredAdapter, place: Path, stop: threading.Event) -> None:
        refused = False
        if place.is_dir():
            try:
                check_files(adapter.name, place, self._rules)
            except InvalidAdapterError:
                refused = True  # the copy may be damaged: the store has the last word
            else:
                return
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self._folder))
        try:
            self._store.fetch(adapter, partial, stop.is_set)
            check_files(adapter.name, partial, self._rules)
            partial.chmod(0o755)
            if refused:  # only now: refused by our rules alone, it may be another router's to use
                shutil.rmtree(place)
            try:
                partial.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock among processes, or none once `stopped`: who fetches then only does it twice."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            while not (held := _try_lock(file)) and not stopped():
                time.sleep(LOCK_POLL_S)
            # Whoever held it has removed the file, and the lock of a removed file locks nobody out.
            if held and not _is_at(file, path):
                continue
            try:
                yield
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
