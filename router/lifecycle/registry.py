"""What operators and the store have decided, on disk: one truth for all router processes of a host.

What each adapter's name means, and which workers get nothing new. SQLite keeps it, so a change is whole
or not made, survives a `kill -9`, and two processes cannot both make one from the same state. Every
change has a serial number; each process asks from time to time whether there are new ones, which costs
microseconds while there are none, and says which it has taken in, so that whoever made one can wait
until it is true everywhere. A process lives while the kernel keeps its lock: by numbers alone one that
was killed could not be told from whoever has its number now, which in a container is its successor.
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from router.adapters.locks import locked, try_lock
from router.adapters.pace import Deadline, TooLateError
from router.lifecycle.alias import Alias
from router.lifecycle.usage import UsageRecord

FILE: Final = "versions.sqlite"
OPENING: Final = ".versions-opening"
PROCESS: Final = ".router-"
BUSY_TIMEOUT_S: Final = 5.0
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entry (
    kind TEXT NOT NULL, name TEXT NOT NULL, record BLOB NOT NULL, serial INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
);
CREATE INDEX IF NOT EXISTS entry_serial ON entry (serial);
CREATE TABLE IF NOT EXISTS process (id TEXT PRIMARY KEY, seen INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claim (name TEXT PRIMARY KEY, process TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS usage (
    name TEXT NOT NULL, process TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (name, process)
) WITHOUT ROWID;
"""
ALIAS: Final = "alias"
WORKER: Final = "worker"
_decode_alias = msgspec.json.Decoder(Alias).decode
_decode_usage = msgspec.msgpack.Decoder(UsageRecord).decode
_decode_bool = msgspec.json.Decoder(bool).decode


class News(msgspec.Struct, frozen=True):
    """What has changed: what names mean now, and whether workers are drained, by their ids."""

    aliases: dict[str, Alias] = {}
    draining: dict[str, bool] = {}

    def __bool__(self) -> bool:
        return bool(self.aliases or self.draining)


class RegistryError(Exception):
    """The file cannot be used. The message names it."""


class Registry:
    """What was decided for one model, in a folder that its router processes share.

    `news` may be called in the event loop; what writes is for threads. From when it is made on, every
    change waits for this process too.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._id = secrets.token_hex(8)
        self._serial = 0
        self._data_version = -1
        self._writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        # Made one after another: SQLite waits for no other process while it changes the journal's kind.
        with self._translated(), locked(folder / OPENING, Deadline(BUSY_TIMEOUT_S)):
            self._writer = self._connect()
            self._writer.executescript(SCHEMA)
            self._reader = self._connect()
        self._lock = try_lock(self._lock_of(self._id))
        with self._transaction() as writer:
            rows = writer.execute("SELECT id FROM process").fetchall()
            self._forget_dead(writer, [process for (process,) in rows])
            writer.execute("INSERT INTO process VALUES (?, 0)", (self._id,))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        # Readers never wait for who writes, and a commit costs no flush of the disk: a power cut may
        # take the last ones back, a kill does not.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def news(self) -> News:
        """What has changed since it was last asked; all there is at first. Raises `RegistryError`."""
        news = News()
        with self._translated():
            (data_version,) = self._reader.execute("PRAGMA data_version").fetchone()
            if data_version == self._data_version:
                return news
            rows = self._reader.execute(
                "SELECT kind, name, record, serial FROM entry WHERE serial > ? ORDER BY serial",
                (self._serial,),
            ).fetchall()
            for kind, name, record, _ in rows:
                if kind == ALIAS:
                    news.aliases[name] = _decode_alias(record)
                else:
                    news.draining[name] = _decode_bool(record)
        self._data_version = data_version
        if rows:
            self._serial = rows[-1][3]
        return news

    def change(self, name: str, step: Callable[[Alias], Alias]) -> tuple[Alias, int]:
        """Take one step from what the name means now; returns what it means then, and its serial.

        Raises `RegistryError`, and whatever the step does: then nothing has changed.
        """
        with self._transaction() as writer:
            row = writer.execute(
                "SELECT record, serial FROM entry WHERE kind = ? AND name = ?", (ALIAS, name)
            ).fetchone()
            before = Alias() if row is None else _decode_alias(row[0])
            after = step(before)
            if after != before:
                return after, self._write(writer, ALIAS, name, msgspec.json.encode(after))
            return after, 0 if row is None else int(row[1])

    def drain(self, worker_id: str, *, draining: bool) -> int:
        """Keep that a worker is drained, or is not; returns the change's serial.

        Raises `RegistryError`.
        """
        with self._transaction() as writer:
            return self._write(writer, WORKER, worker_id, msgspec.json.encode(draining))

    @staticmethod
    def _write(writer: sqlite3.Connection, kind: str, name: str, record: bytes) -> int:
        (last,) = writer.execute("SELECT max(serial) FROM entry").fetchone()
        serial = int(last or 0) + 1
        writer.execute(
            "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", (kind, name, record, serial)
        )
        return serial

    def tell_seen(self) -> None:
        """Say that this process has taken in all that `news` has returned. Raises `RegistryError`."""
        with self._transaction() as writer:
            writer.execute("UPDATE process SET seen = ? WHERE id = ?", (self._serial, self._id))

    def seen_by_all(self, serial: int) -> bool:
        """Whether every process that lives has taken a change in. Raises `RegistryError`."""
        with self._transaction() as writer:
            rows = writer.execute("SELECT id FROM process WHERE seen < ?", (serial,)).fetchall()
            dead = self._forget_dead(writer, [process for (process,) in rows])
        return len(rows) == dead

    def _forget_dead(self, writer: sqlite3.Connection, processes: Sequence[str]) -> int:
        """Of these, forget those that have ended, and whatever is theirs; how many there were."""
        dead = [process for process in processes if not self._lives(process)]
        for process in dead:
            self._forget(writer, process)
        return len(dead)

    @staticmethod
    def _forget(writer: sqlite3.Connection, process: str) -> None:
        writer.execute("DELETE FROM process WHERE id = ?", (process,))
        writer.execute("DELETE FROM claim WHERE process = ?", (process,))
        writer.execute("DELETE FROM usage WHERE process = ?", (process,))

    def claim(self, name: str) -> bool:
        """Whether this process is the one to see to a name, until it gives it back or ends.

        Raises `RegistryError`.
        """
        with self._transaction() as writer:
            row = writer.execute("SELECT process FROM claim WHERE name = ?", (name,)).fetchone()
            free = row is None or row[0] == self._id or not self._lives(row[0])
            if free:
                writer.execute("INSERT OR REPLACE INTO claim VALUES (?, ?)", (name, self._id))
        return free

    def give_back(self, name: str) -> None:
        """Others may see to the name. Raises `RegistryError`."""
        with self._transaction() as writer:
            writer.execute("DELETE FROM claim WHERE name = ? AND process = ?", (name, self._id))

    def tell_usage(self, records: Mapping[str, UsageRecord]) -> None:
        """Let the other processes know how often adapters were used here. Raises `RegistryError`."""
        rows = [(name, self._id, msgspec.msgpack.encode(one)) for name, one in records.items()]
        with self._transaction() as writer:
            writer.executemany("INSERT OR REPLACE INTO usage VALUES (?, ?, ?)", rows)

    def usage_elsewhere(self, names: Sequence[str]) -> dict[str, list[UsageRecord]]:
        """What the other processes that live have told. Raises `RegistryError`."""
        found: dict[str, list[UsageRecord]] = {}
        alive: dict[str, bool] = {self._id: False}  # its own is known better
        with self._translated():
            for name in names:
                for process, record in self._reader.execute(
                    "SELECT process, record FROM usage WHERE name = ?", (name,)
                ):
                    if process not in alive:
                        alive[process] = self._lives(process)
                    if alive[process]:
                        found.setdefault(name, []).append(_decode_usage(record))
        return found

    def close(self) -> None:
        """Close the file; this process need not be waited for any more."""
        try:
            with self._transaction() as writer:
                self._forget(writer, self._id)
        except RegistryError:
            pass  # whoever looks finds that this process is gone
        self._writer.close()
        self._reader.close()
        if self._lock is not None:
            self._lock_of(self._id).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _lock_of(self, process: str) -> Path:
        return self._path.with_name(PROCESS + process)

    def _lives(self, process: str) -> bool:
        """Whether the process has its lock still."""
        if process == self._id:
            return True
        path = self._lock_of(process)
        if (lock := try_lock(path)) is None:
            return True
        path.unlink(missing_ok=True)
        os.close(lock)
        return False

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it, or nothing. Raises `RegistryError`."""
        with self._writing, self._translated():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # busy, full, not to be written
            raise RegistryError(f"{self._path}: {error}; look at its disk") from None
        except TooLateError:
            message = f"{self._path}: other processes have been opening it for {BUSY_TIMEOUT_S:g} s"
            raise RegistryError(message) from None
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise RegistryError(f"{self._path}: {error}; remove the file to begin anew") from None
