"""What operators and the store have decided, on disk: one truth for all router processes of a host.

What each adapter's name means, and which workers get nothing new. SQLite keeps it, so a change is whole
or not made, survives a `kill -9`, and two processes cannot both make one from the same state. Every
change has a serial number; each process asks from time to time whether there are new ones, which costs
microseconds while there are none, and says which it has taken in, so that whoever made one can wait
until it is true everywhere.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from router.lifecycle.alias import Alias
from router.lifecycle.usage import UsageRecord

FILE: Final = "versions.sqlite"
BUSY_TIMEOUT_S: Final = 5.0
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entry (
    kind TEXT NOT NULL, name TEXT NOT NULL, record BLOB NOT NULL, serial INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
);
CREATE INDEX IF NOT EXISTS entry_serial ON entry (serial);
CREATE TABLE IF NOT EXISTS seen (pid INTEGER PRIMARY KEY, serial INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claim (name TEXT PRIMARY KEY, pid INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS usage (
    name TEXT NOT NULL, pid INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY (name, pid)
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

    `news` may be called in the event loop; what writes is for threads.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._pid = os.getpid()
        self._serial = 0
        self._data_version = -1
        self._writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        with self._translated():
            self._writer = self._connect()
            self._writer.executescript(SCHEMA)
            self._reader = self._connect()

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
            writer.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (self._pid, self._serial))

    def seen_by_all(self, serial: int) -> bool:
        """Whether every process that lives has taken a change in. Raises `RegistryError`."""
        with self._transaction() as writer:
            rows = writer.execute("SELECT pid FROM seen WHERE serial < ?", (serial,)).fetchall()
            dead = [(pid,) for (pid,) in rows if not _lives(pid)]
            writer.executemany("DELETE FROM seen WHERE pid = ?", dead)
        return len(rows) == len(dead)

    def claim(self, name: str) -> bool:
        """Whether this process is the one to see to a name, until it gives it back or ends.

        Raises `RegistryError`.
        """
        with self._transaction() as writer:
            row = writer.execute("SELECT pid FROM claim WHERE name = ?", (name,)).fetchone()
            free = row is None or not _lives(row[0])
            if free:
                writer.execute("INSERT OR REPLACE INTO claim VALUES (?, ?)", (name, self._pid))
        return free

    def give_back(self, name: str) -> None:
        """Others may see to the name. Raises `RegistryError`."""
        with self._transaction() as writer:
            writer.execute("DELETE FROM claim WHERE name = ? AND pid = ?", (name, self._pid))

    def tell_usage(self, records: Mapping[str, UsageRecord]) -> None:
        """Let the other processes know how often adapters were used here. Raises `RegistryError`."""
        rows = [(name, self._pid, msgspec.msgpack.encode(one)) for name, one in records.items()]
        with self._transaction() as writer:
            writer.executemany("INSERT OR REPLACE INTO usage VALUES (?, ?, ?)", rows)

    def usage_elsewhere(self, names: Sequence[str]) -> dict[str, list[UsageRecord]]:
        """What the other processes that live have told. Raises `RegistryError`."""
        found: dict[str, list[UsageRecord]] = {}
        alive: dict[int, bool] = {self._pid: False}  # its own is known better
        with self._translated():
            for name in names:
                for pid, record in self._reader.execute(
                    "SELECT pid, record FROM usage WHERE name = ?", (name,)
                ):
                    if pid not in alive:
                        alive[pid] = _lives(pid)
                    if alive[pid]:
                        found.setdefault(name, []).append(_decode_usage(record))
        return found

    def close(self) -> None:
        """Close the file; this process need not be waited for any more."""
        try:
            with self._transaction() as writer:
                writer.execute("DELETE FROM seen WHERE pid = ?", (self._pid,))
                writer.execute("DELETE FROM claim WHERE pid = ?", (self._pid,))
                writer.execute("DELETE FROM usage WHERE pid = ?", (self._pid,))
        except RegistryError:
            pass  # whoever looks finds that this process is gone
        self._writer.close()
        self._reader.close()

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
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise RegistryError(f"{self._path}: {error}; remove the file to begin anew") from None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
