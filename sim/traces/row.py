"""One row of a trace, and what is wrong with a bad one.

A bad row is told in four facts, since whoever has to mend a file of a million rows has nothing else:
its line, the field, what stands there and what should.
"""

from pathlib import Path
from typing import Final

import msgspec

TOKENS_MAX: Final = 100_000_000
TIME_MAX_MS: Final = 1e14  # the year 5138 by Unix time; beyond, sums of seconds lose milliseconds
TOKENS: Final = f"a whole number of tokens, 0 to {TOKENS_MAX:,}"
FOUND_CHARACTERS: Final = 80


class TraceRow(msgspec.Struct, frozen=True, gc=False):
    """One request: when it comes (`timestamp`, in milliseconds) and how long it is, in tokens."""

    timestamp: float
    input_length: int
    output_length: int
    model: str | None = None
    session_id: str | None = None
    tenant: str = ""
    priority: int = 0
    hash_ids: tuple[int, ...] = ()


class RowError(Exception):
    """A row is bad. `found` is None where the field is missing."""

    def __init__(self, field: str, found: str | None, expected: str) -> None:
        is_what = "is missing" if found is None else f"is `{_short(found)}`"
        super().__init__(f"{field} {is_what}; expected {expected}")


class HalfRowError(RowError):
    """The file ends within a row: whoever wrote it was killed. The rows before it are a whole trace."""


class TraceError(Exception):
    """A trace cannot be read. The message names file, line, what is wrong and what is right."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        where = f"{path}:{line}" if line else str(path)
        super().__init__(f"{where}: {message}")
        self.line = line


class BadRows(msgspec.Struct):
    """The rows that were left out: how many, and what is wrong with the first."""

    count: int = 0
    first: str = ""

    def add(self, error: TraceError) -> None:
        """Count one."""
        if not self.count:
            self.first = str(error)
        self.count += 1


def _short(text: str) -> str:
    return text if len(text) <= FOUND_CHARACTERS else f"{text[: FOUND_CHARACTERS - 3]}..."
