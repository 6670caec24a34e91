"""Which parts of an unfinished download are on disk: a line for each, with its checksum.

A line is written after its part. Neither is forced to the disk: whoever resumes reads the part and
compares, so a line that survived a part, or a part that was damaged, costs that part and nothing else.
The head says what is being downloaded, and a journal of anything else counts for nothing.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from router.adapters.store import StoredAdapter, StoredFile

KIND: Final = "lorayard parts 1"
FIELDS: Final = 4
Part = tuple[str, int, int]  # a file's name, first byte, byte after the last


class Journal:
    """The journal at `path`, taken up if it is of this download. To be closed."""

    def __init__(self, path: Path, adapter: StoredAdapter, files: Iterable[StoredFile]) -> None:
        head = f"{KIND} {adapter.version} " + " ".join(f"{file.name}:{file.size}" for file in files)
        self._lock = threading.Lock()
        self._done = _read(path, head)
        # What stands there is written anew: a line that was cut off must not join the next.
        lines = [head, *(_line(part, crc) for part, crc in self._done.items())]
        fresh = path.with_name(f"{path.name}~")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file, and keep it."""
        os.close(self._file)

    @property
    def is_empty(self) -> bool:
        """Whether no part is done."""
        return not self._done

    def crc_of(self, part: Part) -> int | None:
        """The CRC-32 that the part had when it was done; None if it is not."""
        return self._done.get(part)

    def add(self, part: Part, crc: int) -> None:
        """The part is on disk, whole."""
        with self._lock:
            self._done[part] = crc
            os.write(self._file, f"{_line(part, crc)}\n".encode())

    def drop(self, part: Part) -> None:
        """What is on disk is not that part. Its next line counts, so none need be removed."""
        with self._lock:
            self._done.pop(part, None)


def _line(part: Part, crc: int) -> str:
    name, start, stop = part
    return f"{start} {stop} {crc:08x} {name}"


def _read(path: Path, head: str) -> dict[Part, int]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    done: dict[Part, int] = {}
    # The last element is what follows the last end of line: a line that was cut off, or nothing.
    for line in lines[1:-1] if lines[0] == head else ():
        fields = line.split(" ", FIELDS - 1)
        try:
            start, stop, crc, name = int(fields[0]), int(fields[1]), int(fields[2], 16), fields[3]
        except (ValueError, IndexError):
            continue
        done[name, start, stop] = crc
    return done
