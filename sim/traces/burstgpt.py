"""BurstGPT: CSV with seconds, prompt and response tokens; its third part adds session ids.

`Model` and `Log Type` are not kept: they say what was called there, and name neither a base model
of a configuration here nor an adapter. A request that failed there has no response tokens; it is
read as it stands, and the releases `BurstGPT_without_fails_*` leave such requests out.
"""

from typing import Final

from sim.traces.columns import Columns, milliseconds, names, tokens
from sim.traces.row import TraceRow

WANTED: Final = ("Timestamp", "Request tokens", "Response tokens")
HEADER: Final = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
SESSION: Final = "Session ID"


class Rows:
    """Reads the lines below one header."""

    def __init__(self, header: str) -> None:
        session = (SESSION,) if SESSION in names(header) else ()
        self._columns = Columns(header, WANTED + session)

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        at, request, response, *session = self._columns.cells(line)
        return TraceRow(
            milliseconds("Timestamp", at),
            tokens("Request tokens", request),
            tokens("Response tokens", response),
            session_id=(session[0] or None) if session else None,
        )
