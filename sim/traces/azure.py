"""The Azure LLM inference traces of 2023 and 2024: CSV with a date, prompt and output tokens.

Dates have seven digits of a second in 2023, six or none and a zone in 2024; the multimodal trace has
a column more (`NumImages`). Time counts from the first row.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from sim.traces.columns import Columns, tokens
from sim.traces.row import RowError, TraceRow

WANTED: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
HEADER: Final = ",".join(WANTED)
SEVENTH_DIGIT: Final = re.compile(r"(\.\d{6})\d+")  # datetime takes six
DATE_2023: Final = len("2023-11-16 18:15:46.6805900")
MICROSECOND: Final = timedelta(microseconds=1)


class Rows:
    """Reads the lines below one header."""

    def __init__(self, header: str) -> None:
        self._columns = Columns(header, WANTED)
        self._first: datetime | None = None

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        date, context, generated = self._columns.cells(line)
        try:
            if len(date) == DATE_2023 and date[-8] == "." and date[-1].isdecimal():
                at = datetime.fromisoformat(date[:-1])  # the same as below, for the many
            else:
                at = datetime.fromisoformat(SEVENTH_DIGIT.sub(r"\1", date))
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        except (ValueError, OverflowError):
            raise RowError(
                "TIMESTAMP", date, "a time such as 2023-11-16 18:15:46.6805900"
            ) from None
        inputs, outputs = tokens("ContextTokens", context), tokens("GeneratedTokens", generated)
        self._first = self._first or at
        return TraceRow((at - self._first) / MICROSECOND / 1000, inputs, outputs)
