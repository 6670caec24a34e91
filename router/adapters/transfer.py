"""Bringing an adapter's files to a folder: in parts, in parallel, resumed, verified, by a deadline.

Each part is a range of a file, tried again by itself and from where it ended. One thread walks through
the parts in order, hashes them as they come, and so knows soon after the last byte whether all is what
the store says it is; a file that is not is brought once more, afresh. What is in the folder when that
fails, or the process is killed, is where the next try begins (journal.py).

Connections and bandwidth are bounded for a whole process, by one `Downloads` that all caches share.
Nothing waits without the deadline: a part in the middle of its body is left behind, and its thread ends
at its socket's timeout without touching the folder again.
"""

import os
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from math import inf
from pathlib import Path
from typing import Any, Final

from router.adapters.checksum import SUMS_MAX_BYTES, Checksum, SumsError, hasher, read_sums
from router.adapters.journal import Journal, Part
from router.adapters.pace import Bandwidth, Deadline
from router.adapters.store import (
    SUMS_FILE,
    AdapterStore,
    StoredAdapter,
    StoredFile,
    StoreError,
)
from router.config import CONNECTIONS

PART_BYTES: Final = 8 * 2**20
BACKOFF_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0


class BadContentError(StoreError):
    """What the store sends is not what it should be. The message gives both digests."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=False)


class Downloads:
    """What all transfers of a process share: `connections` at once, `mib_per_s` together."""

    def __init__(
        self,
        connections: int = CONNECTIONS,
        mib_per_s: float | None = None,
        *,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.connections = connections
        self.part_bytes = part_bytes
        self.bandwidth = Bandwidth(mib_per_s)
        self.threads = ThreadPoolExecutor(connections, thread_name_prefix="download")

    def fetch(
        self,
        store: AdapterStore,
        adapter: StoredAdapter,
        folder: Path,
        deadline: Deadline,
        *,
        max_tries: int,
    ) -> None:
        """Bring the adapter's files into a folder that `reserve` has made; blocks.

        Raises `StoreError`, of which `TooLateError` and `BadContentError` are kinds, and `OSError`
        where the disk fails or is full.
        """
        transfer = _Transfer(self, store, adapter, folder, deadline, max_tries)
        try:
            transfer.run()
        finally:
            transfer.close()


def journal_of(folder: Path) -> Path:
    """The journal of the download into `folder`: beside it, so that the folder moves as it is."""
    return folder.with_name(f"{folder.name}.journal")


def reserve(adapter: StoredAdapter, folder: Path) -> None:
    """Make the folder and its files, each as large as it will be, so that the disk has room for them.

    What an earlier download left there stays. Raises `OSError` where there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in adapter.transferred:
        descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size != file.size:
                os.ftruncate(descriptor, file.size)
            if file.size:
                os.posix_fallocate(descriptor, 0, file.size)
        finally:
            os.close(descriptor)


class _Range:
    """One part while it is brought: `position` is how far it is, `crc` of what came so far."""

    def __init__(self, file: StoredFile, start: int, stop: int) -> None:
        self.file = file
        self.start = start
        self.stop = stop
        self.position = start
        self.crc = 0
        self.tries = 0
        # Held while the part writes: who closes the transfer waits for that, and for no more.
        self.writing = threading.Lock()

    @property
    def part(self) -> Part:
        return self.file.name, self.start, self.stop


class _Question:
    """What the store knows of a file's content, while it is asked."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.tries = 0


class _Transfer:
    def __init__(
        self,
        downloads: Downloads,
        store: AdapterStore,
        adapter: StoredAdapter,
        folder: Path,
        deadline: Deadline,
        max_tries: int,
    ) -> None:
        self._downloads = downloads
        self._store = store
        self._adapter = adapter
        self._folder = folder
        self._deadline = deadline
        self._max_tries = max_tries
        self._journal = Journal(journal_of(folder), adapter, adapter.transferred)
        self._waiting: deque[_Range | _Question] = deque()
        self._running: dict[Future[float | None], _Range | _Question] = {}
        self._paused: list[tuple[float, _Range | _Question]] = []  # until when, which
        self._known: dict[StoredFile, Checksum | None] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        """End what still runs: nothing is written any more once this returns."""
        self._closed.set()
        for future, one in self._running.items():
            future.cancel()
            if isinstance(one, _Range):
                with one.writing:
                    pass
        self._journal.close()

    def run(self) -> None:
        """Bring the files; first SHA256SUMS, which says what the others must be."""
        adapter = self._adapter
        sums = adapter.file(SUMS_FILE)
        expected: dict[str, Checksum] = {}
        if sums is not None:
            where = f"{adapter.name}/{SUMS_FILE}"
            if sums.size > SUMS_MAX_BYTES:
                raise BadContentError(f"{where} is larger than {SUMS_MAX_BYTES:,} bytes")
            self._bring([sums], {})
            try:
                expected = read_sums((self._folder / SUMS_FILE).read_bytes())
            except SumsError as error:
                raise BadContentError(f"{where} {error}") from None
        self._bring([file for file in adapter.transferred if file is not sums], expected)

    def _bring(self, files: Sequence[StoredFile], expected: Mapping[str, Checksum]) -> None:
        """Bring files and verify them; those that are not as they should be once more."""
        self._waiting.extend(map(_Question, files))
        wrong: dict[StoredFile, str] = dict.fromkeys(files, "")
        for _ in range(2):
            ranges = {file: list(self._ranges(file)) for file in wrong}
            self._waiting.extend(
                one for of_file in ranges.values() for one in of_file if not self._is_done(one)
            )
            found = {
                file: self._verify(file, of_file, expected.get(file.name))
                for file, of_file in ranges.items()
            }
            wrong = {file: problem for file, problem in found.items() if problem}
            for file in wrong:
                for one in ranges[file]:
                    self._journal.drop(one.part)
        if wrong:
            raise BadContentError("; ".join(wrong.values()))

    def _ranges(self, file: StoredFile) -> Iterator[_Range]:
        for start in range(0, file.size, self._downloads.part_bytes):
            yield _Range(file, start, min(file.size, start + self._downloads.part_bytes))

    def _is_done(self, one: _Range) -> bool:
        return self._journal.crc_of(one.part) is not None

    def _verify(self, file: StoredFile, ranges: Sequence[_Range], expected: Checksum | None) -> str:
        """Follow a file's parts in order; what is wrong with the whole, or nothing."""
        from_before = {one.part for one in ranges if self._is_done(one)}
        self._go_on_until(lambda: file in self._known)
        sums = [sum_ for sum_ in (self._known[file], expected) if sum_ is not None]
        hashers = [hasher(sum_.algorithm, file.size) for sum_ in sums]
        with (self._folder / file.name).open("rb") as content:
            for one in ranges:
                self._go_on_until(lambda one=one: self._is_done(one))  # type: ignore[misc]
                if not hashers and one.part not in from_before:
                    continue
                data = _read(content.fileno(), one)
                if one.part in from_before and zlib.crc32(data) != self._journal.crc_of(one.part):
                    self._journal.drop(one.part)
                    self._waiting.appendleft(one)
                    self._go_on_until(lambda one=one: self._is_done(one))  # type: ignore[misc]
                    data = _read(content.fileno(), one)
                for one_hasher in hashers:
                    one_hasher.update(data)
        for checksum, one_hasher in zip(sums, hashers, strict=True):
            if (is_ := one_hasher.hexdigest()) != checksum.value:
                source = SUMS_FILE if checksum is expected else "the store"
                return (
                    f"{self._adapter.name}/{file.name} has the {checksum.algorithm} {is_}, but "
                    f"{source} says {checksum.value}"
                )
        return ""

    def _go_on_until(self, is_true: Callable[[], bool]) -> None:
        """Keep parts going until a condition holds; raises what a part, or the deadline, does."""
        while not is_true():
            self._deadline.check()
            due_s = self._take_up_paused()
            while self._waiting and len(self._running) < self._downloads.connections:
                one = self._waiting.popleft()
                self._running[self._downloads.threads.submit(self._try, one)] = one
            awaited: set[Future[Any]] = {*self._running, self._deadline.given_up}
            ended, _ = wait(awaited, min(self._deadline.left_s, due_s), FIRST_COMPLETED)
            for future in [future for future in self._running if future in ended]:
                one = self._running.pop(future)
                if (pause_s := future.result()) is not None:
                    self._paused.append((time.monotonic() + pause_s, one))

    def _take_up_paused(self) -> float:
        """Have those wait for a connection whose pause is over; how long the next has to go."""
        now = time.monotonic()
        self._waiting.extendleft(one for due, one in self._paused if due <= now)
        self._paused = [(due, one) for due, one in self._paused if due > now]
        return min((due - now for due, _ in self._paused), default=inf)

    # In the threads of all transfers.

    def _try(self, one: _Range | _Question) -> float | None:
        """Do it, or say for how long to pause, with full jitter or as the store asks, before the next.

        The pause is not made here: others have a use for the thread, and for its connection.
        """
        one.tries += 1
        try:
            if isinstance(one, _Range):
                self._get(one)
            else:
                self._known[one.file] = self._store.checksum(self._adapter, one.file)
        except StoreError as error:
            if not error.passing:
                raise
            if one.tries == self._max_tries:
                tries = "1 try" if one.tries == 1 else f"{one.tries} tries"
                raise StoreError(f"{error}, after {tries}") from None
            jitter_s = random.uniform(0, min(BACKOFF_MAX_S, BACKOFF_S * 2**one.tries))
            pause_s = max(jitter_s, error.retry_after_s)
            if pause_s >= self._deadline.left_s:
                raise self._deadline.error(f"{error}") from None
            return pause_s
        return None

    def _get(self, one: _Range) -> None:
        target = os.open(self._folder / one.file.name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for chunk in self._store.read(self._adapter, one.file, one.position, one.stop):
                if one.position + len(chunk) > one.stop:
                    raise StoreError(f"{self._where(one)}: got more bytes than were asked for")
                pause_s = self._downloads.bandwidth.take(len(chunk))
                if pause_s and self._closed.wait(pause_s):
                    raise self._deadline.error()
                self._put(target, one, chunk)
        finally:
            os.close(target)
        if one.position < one.stop:
            raise StoreError(
                f"{self._where(one)}: the answer ended {one.stop - one.position:,} bytes short"
            )
        with one.writing:
            if not self._closed.is_set():
                self._journal.add(one.part, one.crc)

    def _put(self, target: int, one: _Range, chunk: bytes) -> None:
        crc = zlib.crc32(chunk, one.crc)
        with one.writing:
            if self._closed.is_set():
                raise self._deadline.error()
            view = memoryview(chunk)
            while view:
                written = os.pwrite(target, view, one.position)
                one.position += written
                view = view[written:]
            one.crc = crc

    def _where(self, one: _Range) -> str:
        return f"{self._store.url}/{self._adapter.name}/{one.file.name}"


def _read(descriptor: int, one: _Range) -> bytes:
    """A part's bytes from the disk; fewer if the file has become shorter, which is then noticed."""
    pieces = []
    position = one.start
    while position < one.stop:
        piece = os.pread(descriptor, one.stop - position, position)
        if not piece:
            break
        pieces.append(piece)
        position += len(piece)
    return b"".join(pieces)
