"""Give a trace's requests adapters: drawn, or in the order of a second file.

A row that names an adapter keeps it. A session keeps the adapter of its first row: a conversation
does not change its model from one turn to the next.
"""

import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from sys import intern
from typing import Final, Protocol

import msgspec

from sim.traces import Reading, TraceError, read
from sim.traces.jsonl import ADAPTER
from sim.traces.row import TraceRow
from sim.workload import AdapterDraw

# A session that so many others were seen since is taken for a new one.
SESSIONS_MAX: Final = 1 << 16
DEFAULT_BASE: Final = "base"


class AdaptersFrom(enum.StrEnum):
    """How adapters are drawn: each for itself, or with the locality of real traffic."""

    ZIPF = "zipf"
    SESSIONS = "sessions"


class Source(Protocol):
    """Whatever names the adapter of each request in turn; None is the base model alone."""

    def next(self, row: TraceRow) -> str | None:
        """The adapter of a row."""


class Independent:
    """Each request's adapter is drawn for itself, whatever its session."""

    def __init__(self, draw: AdapterDraw) -> None:
        self._draw = draw

    def next(self, row: TraceRow) -> str:  # noqa: ARG002
        """The adapter of a row."""
        return self._draw.next()


class BySession:
    """A request without a session, or the first of one, is drawn; the rest of it follows."""

    def __init__(self, draw: AdapterDraw) -> None:
        self._draw = draw
        self._adapters: OrderedDict[str, str] = OrderedDict()

    def next(self, row: TraceRow) -> str:
        """The adapter of a row."""
        if row.session_id is None:
            return self._draw.next()
        known = self._adapters.pop(row.session_id, None)
        adapter = known if known is not None else self._draw.next()
        self._adapters[row.session_id] = adapter
        if len(self._adapters) > SESSIONS_MAX:
            self._adapters.popitem(last=False)
        return adapter


class InSequence:
    """The adapters of a second file in its order, from the start again when it ends."""

    def __init__(self, adapters: list[str | None]) -> None:
        assert adapters
        self._adapters = adapters
        self.used = 0

    def next(self, row: TraceRow) -> str | None:  # noqa: ARG002
        """The adapter of a row."""
        adapter = self._adapters[self.used % len(self._adapters)]
        self.used += 1
        return adapter

    @property
    def rounds(self) -> int:
        """How often the sequence was begun."""
        return -(-self.used // len(self._adapters))


def sequence(path: Path, reading: Reading) -> InSequence:
    """The adapters that a file names: one a line, or those of a trace. Raises `TraceError`."""
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 16)
    except OSError as error:
        raise TraceError(path, 0, f"{error.strerror}; name a list of adapters or a trace") from None
    # A list of names has neither a brace nor a comma.
    is_trace = first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or b"," in first
    adapters = list(_of_trace(path, reading) if is_trace else _of_list(path))
    if not any(adapters):
        raise TraceError(path, 0, "names no adapter; a line is a name, or a row a model base:name")
    return InSequence(adapters)


def assigned(
    rows: Iterable[TraceRow], source: Source | None, base: str | None
) -> Iterator[TraceRow]:
    """The rows with `base` for their base model, and an adapter each where they have none."""
    for row in rows:
        own_base, _, adapter = (row.model or "").partition(":")
        named = adapter or (source.next(row) if source is not None else None)
        model = base or own_base or (DEFAULT_BASE if named else None)
        if named:
            model = f"{model}:{named}"
        yield row if model == row.model else msgspec.structs.replace(row, model=model)


def _of_trace(path: Path, reading: Reading) -> Iterator[str | None]:
    for row in read(path, reading):
        yield intern((row.model or "").partition(":")[2]) or None


def _of_list(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            name = line.strip().rpartition(":")[2]
            if name and not ADAPTER.fullmatch(name):
                raise TraceError(path, number, f"`{name[:80]}` is no adapter's name")
            if name:
                yield intern(name)
