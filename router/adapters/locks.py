"""Locks among processes: of files, by the kernel, which takes them back from who is killed.

A lock's file is removed by who held it alone. Whoever gets a lock therefore looks whether the file is
still the one at its path, since the lock of a removed file locks nobody out. On a file system without
locks everybody gets them: then an adapter may be fetched twice, and no harm is done.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from router.adapters.pace import Deadline

POLL_S: Final = 0.02


@contextmanager
def locked(path: Path, deadline: Deadline) -> Iterator[None]:
    """Hold a lock alone; wait for it until the deadline, then raise `TooLateError`."""
    while (descriptor := try_lock(path)) is None:
        deadline.check()
        time.sleep(POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Take a lock if it can be had at once: its open file, to be closed; else None."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def unlock_shared(descriptor: int, path: Path) -> None:
    """Give a shared lock back; its file goes with the last who shares it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass
    else:
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
