"""Traces: read row by row, checked row by row, whatever the format.

`scan` reads a whole file once and stops at the first bad row (or counts them, where it is told to),
before anything is simulated; `read` yields the rows, again from the file, so that a trace of a
million rows is never in memory.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from sim.kv import HASH_BLOCK_TOKENS
from sim.traces.formats import (
    BYTE_ORDER_MARK,
    Reading,
    TraceFormat,
    UnknownFormatError,
    detect,
    parser,
)
from sim.traces.jsonl import TimeUnit
from sim.traces.row import BadRows, HalfRowError, RowError, TraceError, TraceRow

__all__ = [
    "BadRows",
    "Reading",
    "TimeUnit",
    "TraceError",
    "TraceFormat",
    "TraceRow",
    "TraceSummary",
    "format_of",
    "no_rows",
    "read",
    "scan",
]

AS_WRITTEN = Reading()
LEAST_HASH_BLOCK: Final = 16  # vLLM's own


class TraceSummary(msgspec.Struct, frozen=True):
    """What a whole trace holds: counts, its span in seconds, each model id's first request.

    `hash_block_tokens` is how many prompt tokens a hash id stands for, which no format says: the least
    power of two with which every row has enough ids for its prompt.
    """

    requests: int
    span_s: float
    input_tokens: int
    output_tokens: int
    models: dict[str, int]
    bad: BadRows
    hash_block_tokens: int


def format_of(path: Path) -> TraceFormat:
    """The format of a file. Raises `TraceError`."""
    with _opened(path) as file:
        return _begun(path, file)[0]


def read(
    path: Path, reading: Reading = AS_WRITTEN, bad: BadRows | None = None
) -> Iterator[TraceRow]:
    """Yield the rows of a trace, in order of time. Half a row at the end of JSON lines is let be.

    Raises `TraceError` with the line at fault; with `reading.skip_bad`, counts it in `bad` instead.
    """
    with _opened(path) as file:
        found, header = _begun(path, file)
        parse = parser(found, header, reading.unit)
        last_ms = float("-inf")
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            if number == 1:
                if found.has_header:
                    continue
                line = line.removeprefix(BYTE_ORDER_MARK)  # noqa: PLW2901
            try:
                row = parse(line)
                if row.timestamp < last_ms:
                    raise RowError(
                        "timestamp",
                        f"{row.timestamp:g} ms",
                        f"{last_ms:g} ms or later, as in the row before; sort the trace by time",
                    )
            except RowError as error:
                if isinstance(error, HalfRowError) and last_ms >= 0:
                    return
                problem = TraceError(path, number, str(error))
                if not reading.skip_bad:
                    raise problem from None
                if bad is not None:
                    bad.add(problem)
                continue
            last_ms = row.timestamp
            yield row


def scan(path: Path, *, limit: int | None = None, reading: Reading = AS_WRITTEN) -> TraceSummary:
    """Read a trace to its end (or `limit` rows), checking every row. Raises `TraceError`."""
    requests = inputs = outputs = 0
    first_ms = last_ms = 0.0
    models: dict[str, int] = {}
    bad = BadRows()
    widest = 0.0  # tokens a hash id
    for row in read(path, reading, bad):
        if requests == 0:
            first_ms = row.timestamp
        if row.hash_ids:
            widest = max(widest, row.input_length / len(row.hash_ids))
        last_ms = row.timestamp
        requests += 1
        inputs += row.input_length
        outputs += row.output_length
        if row.model is not None:
            models.setdefault(row.model, requests)
        if requests == limit:
            break
    if not requests:
        raise no_rows(path, bad)
    return TraceSummary(
        requests,
        (last_ms - first_ms) / 1000,
        inputs,
        outputs,
        models,
        bad,
        max(LEAST_HASH_BLOCK, 1 << (math.ceil(widest) - 1).bit_length())
        if widest
        else HASH_BLOCK_TOKENS,
    )


def no_rows(path: Path, bad: BadRows) -> TraceError:
    """What to say of a trace of which nothing is left."""
    if bad.count:
        return TraceError(path, 0, f"no good row, {bad.count:,} bad; the first: {bad.first}")
    return TraceError(path, 1, "no rows; a trace has a row for each request")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise TraceError(path, 0, f"{error.strerror}; name a .jsonl or .csv trace") from None


def _begun(path: Path, file: BinaryIO) -> tuple[TraceFormat, str]:
    """The format and the first line of a file, which is left at its beginning."""
    try:
        start = file.read(65536)
        file.seek(0)
    except OSError:
        raise TraceError(path, 0, "cannot be read twice; write it to a file first") from None
    if not start.removeprefix(BYTE_ORDER_MARK).strip():
        raise TraceError(path, 1, "the file is empty; a trace has a row for each request")
    first = start.removeprefix(BYTE_ORDER_MARK).partition(b"\n")[0]
    try:
        found = detect(start)
    except (UnknownFormatError, RowError) as error:
        raise TraceError(path, 1, str(error)) from None
    return found, first.decode("utf-8", errors="replace").strip()
