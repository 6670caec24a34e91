"""A recording's file: whole rows only, and never anybody else's file.

A recording that is there is continued, so that a router that was killed goes on when it is started
again: half a row at its end is cut off, and the time in between is a pause in the trace. A file that
is no recording is refused, and so is one that another router writes to.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec

BLOCK_BYTES: Final = 65536
ROW_START: Final = re.compile(rb'\{"timestamp":[0-9.e+-]+,"input_length":')
MIB: Final = 2**20


class RecordError(Exception):
    """The file cannot be recorded into. The message says why, and what to write instead."""


class Stop(StrEnum):
    """Why a row is not in the file: the label `reason` of `lorayard_record_dropped_total`."""

    MAX_MIB = "max_mib"
    DISK_FAILED = "disk_failed"
    DISK_SLOW = "disk_slow"


class Appended(msgspec.Struct, frozen=True):
    """How many rows are in the file now, and why the rest and all that follow cannot be."""

    rows: int
    stop: Stop | None = None
    message: str = ""


class RowSink(Protocol):
    """Takes rows, in a thread that may block."""

    def append(self, rows: Sequence[bytes]) -> Appended:
        """Write rows, each with its line's end. Does not raise what the disk does."""

    def close(self) -> None:
        """Write no more."""


class _Extra(msgspec.Struct):
    e2e_s: float


class _Row(msgspec.Struct):
    """What tells a row of a recording from one of any other trace."""

    timestamp: float
    extra: _Extra


class _Found(msgspec.Struct, frozen=True):
    """A recording as it is found: the bytes of its whole rows, its last row's time, its pause."""

    size: int = 0
    last_ms: float = 0.0
    pause_ms: float = 0.0


class RecordFile:
    """A file that is recorded into. Made by `open`; `begins_ms` is the time of a row that comes now."""

    def __init__(self, path: Path, descriptor: int, found: _Found, max_bytes: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = found.size
        self._max_bytes = max_bytes
        self.begins_ms = found.last_ms + found.pause_ms

    @classmethod
    def open(cls, path: Path, *, max_mib: int) -> Self:
        """Make the file, or continue the recording that it holds. Raises `RecordError`."""
        _check_place(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(
                    f"another router records into {path}; name another file"
                ) from None
            found = _read_end(path, descriptor)
            if os.fstat(descriptor).st_size > found.size:
                os.ftruncate(descriptor, found.size)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(path, error) from None
        except RecordError:
            os.close(descriptor)
            raise
        return cls(path, descriptor, found, max_mib * MIB)

    def append(self, rows: Sequence[bytes]) -> Appended:
        """Write the rows that fit, and say what stopped the rest."""
        fitting, size = 0, self._size
        for row in rows:
            if size + len(row) > self._max_bytes:
                break
            size += len(row)
            fitting += 1
        data = memoryview(b"".join(rows[:fitting]))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            return self._cut_back(rows, done, error)
        self._size = size
        if fitting == len(rows):
            return Appended(fitting)
        limit = f"{self._path} has reached max_mib, {self._max_bytes // MIB:,} MiB"
        return Appended(fitting, Stop.MAX_MIB, limit)

    def _cut_back(self, rows: Sequence[bytes], done: int, error: OSError) -> Appended:
        """Leave whole rows only, `done` bytes of which came to be written."""
        whole = count = 0
        for row in rows:
            if whole + len(row) > done:
                break
            whole += len(row)
            count += 1
        self._size += whole
        with contextlib.suppress(OSError):  # a reader lets half a row at the end be
            os.ftruncate(self._descriptor, self._size)
        return Appended(count, Stop.DISK_FAILED, f"{self._path}: {error.strerror}")

    def close(self) -> None:
        """Close the file, and let another router have it."""
        os.close(self._descriptor)


def check_path(path: Path) -> None:
    """Whether a file can be recorded into, as far as can be known without touching it.

    Raises `RecordError`.
    """
    _check_place(path)
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _read_end(path, descriptor)
    finally:
        os.close(descriptor)


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise RecordError(f"cannot record into {path}: there is no folder {path.parent}; make it")
    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise RecordError(f"cannot record into {path}: the folder cannot be written to")
        return
    if not path.is_file():
        raise RecordError(f"cannot record into {path}: it is no file; name one")
    if not os.access(path, os.R_OK | os.W_OK):
        raise RecordError(f"cannot record into {path}: it cannot be read and written")


def _unusable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"cannot record into {path}: {error.strerror}; name a file on another disk")


def _read_end(path: Path, descriptor: int) -> _Found:
    """What is there already. Raises `RecordError` where it is no recording."""
    status = os.fstat(descriptor)
    if not status.st_size:
        return _Found()
    end, row = _last_row(descriptor, status.st_size)
    try:
        last = msgspec.json.decode(row, type=_Row)
    except (msgspec.DecodeError, RecursionError) as error:
        cut_off = end == 0 and not isinstance(error, msgspec.ValidationError)
        if cut_off and ROW_START.match(row):  # killed within its first row
            return _Found()
        raise RecordError(
            f"{path} is there and is no recording, so it is let be; name a file that is not there"
        ) from None
    return _Found(end, last.timestamp, max(0.0, time.time() - status.st_mtime) * 1000)


def _last_row(descriptor: int, size: int) -> tuple[int, bytes]:
    """Where the last whole line ends, and the line; 0 and all there is where there is none."""
    data, start = b"", size
    while start > 0:
        length = min(start, max(BLOCK_BYTES, len(data)))  # doubling: a row may hold a prompt
        start -= length
        data = os.pread(descriptor, length, start) + data
        end = data.rfind(b"\n")
        before = data.rfind(b"\n", 0, max(end, 0))
        if end >= 0 and (before >= 0 or start == 0):
            return start + end + 1, data[before + 1 : end]
    return 0, data
