"""The Azure LLM inference traces of 2023 and 2024: CSV with a date, prompt and output tokens."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

from sim.traces.row import TraceError, TraceRow

HEADER: Final = "TIMESTAMP,ContextTokens,GeneratedTokens"
FIELDS: Final = 3
DIGITS_MAX: Final = 9
SEVENTH_DIGIT: Final = re.compile(r"(\.\d{6})\d+")
MICROSECOND: Final = timedelta(microseconds=1)


def rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, TraceRow]]:
    """Yield each row with its line number; time counts from the first row."""
    first: datetime | None = None
    for number, raw in enumerate(file, 1):
        text = raw.decode("utf-8", errors="replace").strip().removeprefix("\ufeff")
        if number == 1:
            if text != HEADER:
                raise TraceError(path, 1, f"the header is `{text}`, not `{HEADER}`")
            continue
        if not text:
            continue
        fields = text.split(",")
        if len(fields) != FIELDS:
            raise TraceError(path, number, f"{len(fields)} fields, expected {FIELDS}: {HEADER}")
        try:
            # Seven digits of a second in 2023, where datetime takes six; a zone in 2024.
            at = datetime.fromisoformat(SEVENTH_DIGIT.sub(r"\1", fields[0]))
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        except (ValueError, OverflowError):
            raise TraceError(
                path, number, f"TIMESTAMP `{fields[0]}` is no time such as 2023-11-16 18:15:46.68"
            ) from None
        lengths = []
        for name, value in zip(("ContextTokens", "GeneratedTokens"), fields[1:], strict=True):
            if not value.strip().isdecimal() or len(value) > DIGITS_MAX:
                raise TraceError(path, number, f"{name} `{value}` is no number of tokens")
            lengths.append(int(value))
        first = first or at
        yield number, TraceRow((at - first) / MICROSECOND / 1000, lengths[0], lengths[1])
