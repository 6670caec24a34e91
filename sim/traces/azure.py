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
MICROSECOND: Final = timedelta(microseconds=1)
# What nearly every row of 2023 looks like: it is read at a fifth of the cost of the others.
PLAIN: Final = re.compile(
    rb"(\d{4}-\d\d-\d\d \d\d:\d\d):([0-5]\d)\.(\d{6})\d?,(\d{1,8}),(\d{1,8})\s*"
)


class Rows:
    """Reads the lines below one header."""

    def __init__(self, header: str) -> None:
        self._columns = Columns(header, WANTED)
        self._plain = PLAIN.fullmatch if header == HEADER else None
        self._first: datetime | None = None
        self._minute = b""  # that of the last plain row, and its microseconds since the first row
        self._minute_us = 0

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        if self._plain is not None and (found := self._plain(line)) is not None:
            minute, second, micro, context, generated = found.groups()
            if minute == self._minute or self._enter(minute, second, micro):
                since_us = self._minute_us + int(second) * 1_000_000 + int(micro)
                return TraceRow(since_us / 1000, int(context), int(generated))
        date, inputs, outputs = self._columns.cells(line)
        try:
            at = datetime.fromisoformat(SEVENTH_DIGIT.sub(r"\1", date))
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        except (ValueError, OverflowError):
            raise RowError(
                "TIMESTAMP", date, "a time such as 2023-11-16 18:15:46.6805900"
            ) from None
        return self._row(at, tokens("ContextTokens", inputs), tokens("GeneratedTokens", outputs))

    def _enter(self, minute: bytes, second: bytes, micro: bytes) -> bool:
        """A plain row of another minute than the last; False where there is no such minute."""
        try:
            begins = datetime.fromisoformat(minute.decode()).replace(tzinfo=UTC)
        except ValueError:  # the 30th of February: said by who reads the row in full
            return False
        if self._first is None:
            self._first = begins + timedelta(seconds=int(second), microseconds=int(micro))
        self._minute = minute
        self._minute_us = (begins - self._first) // MICROSECOND
        return True

    def _row(self, at: datetime, inputs: int, outputs: int) -> TraceRow:
        if self._first is None:
            self._first = at
        return TraceRow((at - self._first) // MICROSECOND / 1000, inputs, outputs)
