"""Several traces as one. Time counts from 0, at the first row.

Ids of blocks and sessions are each file's own: where there are several files they are told apart,
or two unrelated requests would share a prefix.
"""

import enum
import heapq
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import assert_never

import msgspec

from sim.traces.row import TraceRow


class Join(enum.StrEnum):
    """How several traces lie in time."""

    OVERLAY = "overlay"
    APPEND = "append"


def joined(traces: Sequence[Iterable[TraceRow]], how: Join) -> Iterator[TraceRow]:
    """The rows of all traces in order of time: all from 0 at once, or each after the one before."""
    parts = [_from_zero(_told_apart(rows, n, len(traces))) for n, rows in enumerate(traces)]
    match how:
        case Join.OVERLAY:
            return heapq.merge(*parts, key=attrgetter("timestamp"))
        case Join.APPEND:
            return _appended(parts)
        case _:
            assert_never(how)


def faster(rows: Iterable[TraceRow], speed: float) -> Iterator[TraceRow]:
    """The same rows, which count from 0, in `speed` times shorter time."""
    for row in rows:
        yield _at(row, row.timestamp / speed)


def _at(row: TraceRow, at_ms: float) -> TraceRow:
    return row if at_ms == row.timestamp else msgspec.structs.replace(row, timestamp=at_ms)


def _from_zero(rows: Iterable[TraceRow]) -> Iterator[TraceRow]:
    first_ms: float | None = None
    for row in rows:
        if first_ms is None:
            first_ms = row.timestamp
        yield _at(row, row.timestamp - first_ms)


def _appended(parts: Iterable[Iterable[TraceRow]]) -> Iterator[TraceRow]:
    ended_ms = last_ms = 0.0
    for rows in parts:
        for row in rows:
            last_ms = ended_ms + row.timestamp
            yield _at(row, last_ms)
        ended_ms = last_ms


def _told_apart(rows: Iterable[TraceRow], number: int, count: int) -> Iterator[TraceRow]:
    if count == 1:
        yield from rows
        return
    for row in rows:
        yield msgspec.structs.replace(
            row,
            hash_ids=tuple(block * count + number for block in row.hash_ids),
            session_id=row.session_id and f"{number}:{row.session_id}",
        )
