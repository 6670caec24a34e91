"""One row of a trace, and what is wrong with a bad one."""

from pathlib import Path

import msgspec


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


class TraceError(Exception):
    """A trace cannot be read. The message names file, line, what is wrong and what is right."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        where = f"{path}:{line}" if line else str(path)
        super().__init__(f"{where}: {message}")
        self.line = line
