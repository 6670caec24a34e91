"""The copy on disk: each adapter version in a folder of its own, whole or not there at all.

A version is fetched once, however many workers want it at once, into a folder beside its place,
verified, validated, forced to the disk, and moved there in one step. What is in place is therefore
complete and sound, also after a `kill -9`, and processes may share the folder: one of them fetches,
under a lock that the kernel takes back from who is killed, and the others find it done. What was
fetched before a failure is kept for an hour, and taken up by whoever fetches the same version next.
"""

import asyncio
import errno
import logging
import os
import re
import secrets
import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from anyio import CapacityLimiter, to_thread

from router.adapters.journal import Journal
from router.adapters.locks import locked
from router.adapters.pace import Deadline
from router.adapters.space import GONE, NoRoomError, Space, fetch_lock_of, partial_of
from router.adapters.store import (
    NEEDED,
    TRANSFERRED,
    AdapterGoneError,
    AdapterStore,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
)
from router.adapters.transfer import BadContentError, Downloads, journal_of, reserve
from router.adapters.validate import (
    AdapterFacts,
    AdapterRules,
    InvalidAdapterError,
    check_files,
    check_listing,
)
from router.core.job import LoadError, LoadFault

log = logging.getLogger("lorayard.adapters")

VERSION: Final = re.compile(r"[0-9a-f]{16}")
DISK_IS_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
FETCHES_MAX: Final = 8
SOUND_MAX: Final = 65_536
# How long a version that was refused is not fetched again, however many ask for it.
REFUSED_S: Final = 30.0
REFUSED_MAX: Final = 4096


def default_cache_dir() -> Path:
    """Where adapters are kept if the configuration does not say: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorayard"


class _Sound(msgspec.Struct, frozen=True):
    """A version that was found sound by the rules that hold now."""

    adapter: StoredAdapter
    facts: AdapterFacts


class AdapterCache:
    """Adapters of one store on this machine's disk.

    `timeout_s` bounds a whole fetch, with all its tries and pauses, of which each part has
    `max_tries`. `downloads` and `space` are shared with the caches of other base models.
    """

    def __init__(
        self,
        store: AdapterStore,
        folder: Path,
        rules: AdapterRules,
        *,
        timeout_s: float,
        max_tries: int,
        downloads: Downloads,
        space: Space,
    ) -> None:
        self._store = store
        self._folder = folder
        self._rules = rules
        self._timeout_s = timeout_s
        self._max_tries = max_tries
        self._downloads = downloads
        self._space = space
        # What another run left on disk is checked again, so it is not among these.
        self._sound: OrderedDict[str, _Sound] = OrderedDict()
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()
        # Of its own, so that neither a slow store nor the listing can take the other's threads.
        self._threads = CapacityLimiter(FETCHES_MAX)

    def prepare(self) -> None:
        """Make the folder, and remove what processes that were killed have left in it. Blocks."""
        self._space.prepare(self._folder)

    @property
    def bytes(self) -> int:
        """What the adapters take on disk, those included that other processes fetched."""
        return self._space.bytes_in(self._folder)

    def has(self, adapter: StoredAdapter) -> bool:
        """Whether the adapter was found sound and whole here, so that nothing need be fetched."""
        name = f"{adapter.name}@{adapter.version}"
        return name in self._sound and name not in self._fetching

    def facts(self, adapter: StoredAdapter) -> AdapterFacts | None:
        """What was found out about an adapter when it was found sound; None if it was not yet."""
        sound = self._sound.get(f"{adapter.name}@{adapter.version}")
        return None if sound is None else sound.facts

    def find(self, name: str, version: str) -> StoredAdapter | None:
        """A version that is whole on this disk, though the store may have another one by now."""
        if not is_name(name) or not VERSION.fullmatch(version):
            return None
        place = self._place(name, version)
        if (sound := self._sound.get(place.name)) is not None:
            return sound.adapter if _is_whole(place) else None
        try:
            sizes = {file: (place / file).stat().st_size for file in NEEDED}
        except OSError:
            return None
        files = tuple(StoredFile(file, size, "") for file, size in sizes.items())
        return StoredAdapter(name, version, "", files)

    def hold(self, name: str, version: str) -> None:
        """Keep a version from being removed to make room, by any process, until it is let go.

        It need not be here yet. Whoever holds it several times lets it go as often.
        """
        self._space.hold(self._place(name, version))

    def let_go(self, name: str, version: str) -> None:
        """Undo one `hold`."""
        self._space.let_go(self._place(name, version))

    async def folder_of(self, adapter: StoredAdapter) -> Path:
        """The folder with the adapter's files, fetched now if need be. Raises `LoadError`.

        Its `version` must be known. Without a `hold` it may be removed as soon as others need the room.
        """
        assert adapter.version, f"{adapter.name} was not looked up"
        place = self._place(adapter.name, adapter.version)
        task = self._fetching.get(place.name)
        if task is None:
            if place.name in self._sound and _is_whole(place):
                _use(place)
                return place
            until, why = self._refused.get(place.name, (0.0, ""))
            if asyncio.get_running_loop().time() < until:
                raise LoadError(LoadFault.ADAPTER_INVALID, why)
            task = asyncio.create_task(self._fetch(adapter, place))
            self._fetching[place.name] = task
            task.add_done_callback(lambda _: self._fetching.pop(place.name, None))
        # Shielded: who leaves must not end the download that others wait for.
        return await asyncio.shield(task)

    def _place(self, name: str, version: str) -> Path:
        return self._folder / f"{name}@{version}"

    async def _fetch(self, adapter: StoredAdapter, place: Path) -> Path:
        deadline = Deadline(self._timeout_s)
        try:
            check_listing(adapter, self._rules)
            async with asyncio.timeout(self._timeout_s):
                facts = await to_thread.run_sync(
                    self._fetch_alone,
                    adapter,
                    place,
                    deadline,
                    abandon_on_cancel=True,  # it sees the deadline, and cleans up after itself
                    limiter=self._threads,
                )
        except TimeoutError:
            raise _error(adapter, LoadFault.STORE_UNAVAILABLE, deadline.error()) from None
        except AdapterGoneError as error:
            raise LoadError(LoadFault.ADAPTER_CHANGED, str(error)) from None
        except InvalidAdapterError as error:
            self._refuse(place, str(error))
            raise LoadError(LoadFault.ADAPTER_INVALID, str(error)) from None
        except BadContentError as error:
            raise _error(adapter, LoadFault.ADAPTER_INVALID, error) from None
        except (StoreError, NoRoomError) as error:
            raise _error(adapter, LoadFault.STORE_UNAVAILABLE, error) from None
        except OSError as error:
            problem = f"{self._folder}: {error.strerror or error}"
            raise _error(adapter, LoadFault.STORE_UNAVAILABLE, problem) from None
        finally:
            deadline.give_up()
        self._sound[place.name] = _Sound(adapter, facts)
        if len(self._sound) > SOUND_MAX:
            self._sound.popitem(last=False)
        return place

    def _refuse(self, place: Path, why: str) -> None:
        self._refused[place.name] = asyncio.get_running_loop().time() + REFUSED_S, why
        self._refused.move_to_end(place.name)
        if len(self._refused) > REFUSED_MAX:
            self._refused.popitem(last=False)

    def _fetch_alone(self, adapter: StoredAdapter, place: Path, deadline: Deadline) -> AdapterFacts:
        with locked(fetch_lock_of(place), deadline):
            if place.is_dir():
                try:
                    facts = check_files(adapter.name, place, self._rules)
                except InvalidAdapterError:
                    pass  # the copy may be damaged: the store has the last word
                else:
                    # Of who was killed right after it had moved the version here.
                    journal_of(partial_of(place)).unlink(missing_ok=True)
                    _use(place)
                    return facts
            if not adapter.revision:
                raise AdapterGoneError(
                    f"{adapter.name}@{adapter.version} is no longer on this disk, and the store "
                    "may have another version"
                )
            facts = self._bring(adapter, place, deadline)
        self._space.look()
        return facts

    def _bring(self, adapter: StoredAdapter, place: Path, deadline: Deadline) -> AdapterFacts:
        """Download to beside the place, validate, and move. The lock is held."""
        partial = partial_of(place)
        resumable = False
        try:
            while True:
                try:
                    self._download(adapter, place, partial, deadline)
                    break
                except OSError as error:
                    self._make_disk_less_full(error, adapter, place)
            facts = check_files(adapter.name, partial, self._rules)
            _move(partial, place)
        except (AdapterGoneError, InvalidAdapterError, BadContentError, NoRoomError):
            raise
        except BaseException:
            resumable = True
            raise
        finally:
            if not (resumable and _has_parts(adapter, partial)):
                shutil.rmtree(partial, ignore_errors=True)
                journal_of(partial).unlink(missing_ok=True)
        return facts

    def _download(
        self, adapter: StoredAdapter, place: Path, partial: Path, deadline: Deadline
    ) -> None:
        size = sum(file.size for file in adapter.transferred)
        with self._space.room_for(place, size, deadline):
            reserve(adapter, partial)
        self._downloads.fetch(self._store, adapter, partial, deadline, max_tries=self._max_tries)

    def _make_disk_less_full(self, error: OSError, adapter: StoredAdapter, place: Path) -> None:
        """Remove what nobody uses, if that was the matter; raise where it does not help."""
        if error.errno not in DISK_IS_FULL:
            raise error
        size = sum(file.size for file in adapter.transferred)
        if not self._space.free(size, place):
            raise NoRoomError(
                f"the disk of {self._folder} is full ({error.strerror}), and no adapter on it is "
                f"out of use; it needs {size:,} bytes: make room, or set cache_dir to another disk"
            ) from None
        log.warning("%s: the disk is full; adapters that were not in use are removed", place.name)


def _error(adapter: StoredAdapter, fault: LoadFault, problem: object) -> LoadError:
    return LoadError(fault, f"adapter {adapter.name}: {problem}")


def _is_whole(place: Path) -> bool:
    return all((place / name).is_file() for name in NEEDED)


def _use(place: Path) -> None:
    """Note that a version is used now: the least recently used ones are removed first."""
    with suppress(FileNotFoundError):  # removed this instant, and then it is not used either
        os.utime(place)


def _has_parts(adapter: StoredAdapter, partial: Path) -> bool:
    """Whether there is anything that a later try can begin with."""
    if not journal_of(partial).is_file():
        return False
    journal = Journal(journal_of(partial), adapter, adapter.transferred)
    journal.close()
    return not journal.is_empty


def _move(partial: Path, place: Path) -> None:
    """Move what was fetched to its place, in one step, and all of it on the disk before.

    What is in place already was refused, by damage, or by rules of ours that it meets now.
    """
    for name in TRANSFERRED:
        if (path := partial / name).is_file():
            _force_to_disk(path)
    partial.chmod(0o755)
    _force_to_disk(partial)
    gone = place.with_name(f"{GONE}{secrets.token_hex(8)}")
    if place.is_dir():
        place.rename(gone)
    partial.rename(place)
    _force_to_disk(place.parent)
    journal_of(partial).unlink(missing_ok=True)
    _use(place)
    shutil.rmtree(gone, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
