"""Traces: read row by row, checked row by row, whatever the format.

`scan` reads a whole file once and stops at the first bad row, before anything is simulated;
`read` yields the rows, again from the file, so that a trace of a million rows is never in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sim.traces import azure, jsonl
from sim.traces.row import TraceError, TraceRow

__all__ = ["TraceError", "TraceRow", "TraceSummary", "read", "scan"]


class TraceSummary(msgspec.Struct, frozen=True):
    """What a whole trace holds: counts, its span in seconds, each model id's first request."""

    requests: int
    span_s: float
    input_tokens: int
    output_tokens: int
    models: dict[str, int]


def read(path: Path) -> Iterator[TraceRow]:
    """Yield the rows of a trace, in order of time. Raises `TraceError` with the line at fault."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise TraceError(path, 0, f"{error.strerror}; name a .jsonl or .csv trace") from None
    with file:
        try:
            start = file.read(65536).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
        except OSError:
            raise TraceError(path, 0, "cannot be read twice; write it to a file first") from None
        if not start:
            raise TraceError(path, 1, "the file is empty; a trace has a row for each request")
        if start.startswith(b"{"):
            rows = jsonl.rows(path, file)
        elif start.upper().startswith(b"TIMESTAMP,"):
            rows = azure.rows(path, file)
        else:
            raise TraceError(
                path,
                1,
                'neither JSON lines ({"timestamp": ms, "input_length": n, ...}) nor Azure\'s CSV '
                "(TIMESTAMP,ContextTokens,GeneratedTokens)",
            )
        last_ms = float("-inf")
        for line, row in rows:
            if row.timestamp < last_ms:
                raise TraceError(
                    path,
                    line,
                    f"timestamp {row.timestamp:g} ms is earlier than the row before "
                    f"({last_ms:g} ms); sort the trace by timestamp",
                )
            last_ms = row.timestamp
            yield row


def scan(path: Path, *, limit: int | None = None) -> TraceSummary:
    """Read a trace to its end (or `limit` rows), checking every row. Raises `TraceError`."""
    requests = inputs = outputs = 0
    first_ms = last_ms = 0.0
    models: dict[str, int] = {}
    for row in read(path):
        if requests == 0:
            first_ms = row.timestamp
        last_ms = row.timestamp
        requests += 1
        inputs += row.input_length
        outputs += row.output_length
        if row.model is not None:
            models.setdefault(row.model, requests)
        if requests == limit:
            break
    if not requests:
        raise TraceError(path, 1, "no rows; a trace has a row for each request")
    return TraceSummary(requests, (last_ms - first_ms) / 1000, inputs, outputs, models)
