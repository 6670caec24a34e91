"""What the names of one model's adapters mean, on disk: one truth for all router processes of a host.

SQLite keeps it, so a change is whole or not made, survives a `kill -9`, and two processes cannot both
make one from the same state. Every change has a serial number; each process asks from time to time
whether there are new ones, which costs microseconds while there are none, and says which it has taken
in, so that whoever made one can wait until it is true everywhere.
"""

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from router.lifecycle.alias import Alias

FILE: Final = "versions.sqlite"
BUSY_TIMEOUT_S: Final = 5.0
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS alias (name TEXT PRIMARY KEY, record BLOB NOT NULL, serial INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS alias_serial ON alias (serial);
CREATE TABLE IF NOT EXISTS seen (pid INTEGER PRIMARY KEY, serial INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claim (name TEXT PRIMARY KEY, pid INTEGER NOT NULL);
"""
_decode = msgspec.json.Decoder(Alias).decode


class RegistryError(Exception):
    """The file cannot be used. The message names it."""


class Registry:
    """The aliases of one model, in a folder that its router processes share.

    `news` may be called in the event loop; what writes is for threads. `pid` is the process that has
    seen what `news` returned.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._pid = os.getpid()
        self._serial = 0
        self._data_version = -1
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            self._writer.executescript(SCHEMA)
            self._reader = self._connect()
        except (sqlite3.Error, OSError) as error:
            raise RegistryError(f"{self._path}: {error}; remove the file to begin anew") from None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        # Readers never wait for who writes, and a commit costs no flush of the disk: a power cut may
        # take the last ones back, a kill does not.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def news(self) -> dict[str, Alias]:
        """What has changed since it was last asked; all there is at first. Raises `RegistryError`."""
        try:
            (data_version,) = self._reader.execute("PRAGMA data_version").fetchone()
            if data_version == self._data_version:
                return {}
            rows = self._reader.execute(
                "SELECT name, record, serial FROM alias WHERE serial > ? ORDER BY serial",
                (self._serial,),
            ).fetchall()
            news = {name: _decode(record) for name, record, _ in rows}
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise RegistryError(f"{self._path}: {error}") from None
        self._data_version = data_version
        if rows:
            self._serial = rows[-1][2]
        return news

    def change(self, name: str, step: Callable[[Alias], Alias]) -> tuple[Alias, int]:
        """Take one step from what the name means now; returns what it means then, and its serial.

        Raises `RegistryError`, and whatever the step does: then nothing has changed.
        """
        with self._writing:
            writer = self._writer
            try:
                writer.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise RegistryError(f"{self._path}: {error}") from None
            try:
                row = writer.execute(
                    "SELECT record, serial FROM alias WHERE name = ?", (name,)
                ).fetchone()
                before = Alias() if row is None else _decode(row[0])
                after = step(before)
                serial = 0 if row is None else int(row[1])
                if after != before:
                    (last,) = writer.execute("SELECT max(serial) FROM alias").fetchone()
                    serial = (last or 0) + 1
                    writer.execute(
                        "INSERT OR REPLACE INTO alias VALUES (?, ?, ?)",
                        (name, msgspec.json.encode(after), serial),
                    )
                writer.execute("COMMIT")
            except sqlite3.Error as error:
                self._undo()
                raise RegistryError(f"{self._path}: {error}") from None
            except BaseException:
                self._undo()
                raise
            return after, serial

    def _undo(self) -> None:
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def tell_seen(self) -> None:
        """Say that this process has taken in all that `news` has returned. Raises `RegistryError`."""
        with self._writing:
            try:
                self._writer.execute(
                    "INSERT OR REPLACE INTO seen VALUES (?, ?)", (self._pid, self._serial)
                )
            except sqlite3.Error as error:
                raise RegistryError(f"{self._path}: {error}") from None

    def seen_by_all(self, serial: int) -> bool:
        """Whether every process that lives has taken a change in. Raises `RegistryError`."""
        with self._writing:
            try:
                rows = self._writer.execute(
                    "SELECT pid FROM seen WHERE serial < ?", (serial,)
                ).fetchall()
                dead = [(pid,) for (pid,) in rows if not _lives(pid)]
                self._writer.executemany("DELETE FROM seen WHERE pid = ?", dead)
            except sqlite3.Error as error:
                raise RegistryError(f"{self._path}: {error}") from None
        return len(rows) == len(dead)

    def claim(self, name: str) -> bool:
        """Whether this process is the one to see to a name, until it gives it back or ends.

        Raises `RegistryError`.
        """
        with self._writing:
            writer = self._writer
            try:
                writer.execute("BEGIN IMMEDIATE")
                row = writer.execute("SELECT pid FROM claim WHERE name = ?", (name,)).fetchone()
                free = row is None or not _lives(row[0])
                if free:
                    writer.execute("INSERT OR REPLACE INTO claim VALUES (?, ?)", (name, self._pid))
                writer.execute("COMMIT")
            except sqlite3.Error as error:
                self._undo()
                raise RegistryError(f"{self._path}: {error}") from None
        return free

    def give_back(self, name: str) -> None:
        """Others may see to the name."""
        with self._writing:
            try:
                self._writer.execute(
                    "DELETE FROM claim WHERE name = ? AND pid = ?", (name, self._pid)
                )
            except sqlite3.Error as error:
                raise RegistryError(f"{self._path}: {error}") from None

    def close(self) -> None:
        """Close the file; this process need not be waited for any more."""
        with self._writing:
            try:
                self._writer.execute("DELETE FROM seen WHERE pid = ?", (self._pid,))
                self._writer.execute("DELETE FROM claim WHERE pid = ?", (self._pid,))
            except sqlite3.Error:
                pass  # whoever looks finds that this process is gone
            self._writer.close()
            self._reader.close()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
