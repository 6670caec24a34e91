"""Write a trace: the contract's JSON lines, and the whole file or none of it.

Times are milliseconds to the microsecond, whole where they can be, since some tools read no other.
Fields that say nothing are left out. The file appears under its name only when its last row is on
disk: a replay never meets half a trace.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

import msgspec

from sim.traces.row import TraceRow


class _Extra(msgspec.Struct, omit_defaults=True):
    model: str | None = None
    generated: Mapping[str, object] | None = None


class _Line(msgspec.Struct, omit_defaults=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    session_id: str | None = None
    tenant: str = ""
    priority: int = 0
    extra: _Extra | None = None


def write(
    path: Path, rows: Iterable[TraceRow], *, generated: Mapping[str, object] | None = None
) -> None:
    """Write rows to a file. `generated` goes into the first row's `extra`. Raises `OSError`."""
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    encode = msgspec.json.Encoder().encode
    try:
        with partial.open("xb") as file:
            for row in rows:
                file.write(encode(_line(row, generated)))
                file.write(b"\n")
                generated = None
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _line(row: TraceRow, generated: Mapping[str, object] | None) -> _Line:
    at = round(float(row.timestamp), 3)
    return _Line(
        int(at) if at.is_integer() else at,
        row.input_length,
        row.output_length,
        row.hash_ids,
        row.session_id,
        row.tenant,
        row.priority,
        _Extra(row.model, generated) if row.model or generated else None,
    )
