"""CSV: columns are found by their names, since releases of one trace add and move columns.

Only a line with a quote in it goes through the `csv` module; the rest are split, five times as fast.
"""

import csv
import math
from typing import Final

from sim.traces.row import TIME_MAX_MS, TOKENS, TOKENS_MAX, RowError

DIGITS_MAX: Final = len(str(TOKENS_MAX))


def split(text: str) -> list[str]:
    """The cells of one line. Raises `RowError`."""
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text]))
    except csv.Error as error:
        raise RowError("row", text, f"a line of CSV ({error})") from None


def names(header: str) -> list[str]:
    """The columns' names, without spaces around them."""
    return [name.strip() for name in split(header)]


class Columns:
    """The wanted columns of each line, in the order in which they were asked for."""

    def __init__(self, header: str, wanted: tuple[str, ...]) -> None:
        self._names = names(header)
        assert set(wanted) <= set(self._names)
        self._places = [self._names.index(name) for name in wanted]

    def cells(self, line: bytes) -> list[str]:
        """The wanted cells of a line. Raises `RowError` where the line has another number of them."""
        text = line.decode("utf-8", errors="replace").strip()
        cells = split(text)
        if len(cells) != len(self._names):
            expected = f"{len(self._names)} fields ({','.join(self._names)}), not {len(cells)}"
            raise RowError("row", text, expected)
        return [cells[place].strip() for place in self._places]


def tokens(field: str, cell: str) -> int:
    """A cell that counts tokens."""
    if not cell.isdecimal() or len(cell) > DIGITS_MAX or int(cell) > TOKENS_MAX:
        raise RowError(field, cell, TOKENS)
    return int(cell)


def milliseconds(field: str, cell: str) -> float:
    """A cell of seconds, as milliseconds to the microsecond."""
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds * 1000 <= TIME_MAX_MS:
        raise RowError(field, cell, f"a number of seconds, 0 to {TIME_MAX_MS / 1000:g}")
    return round(seconds * 1000, 3)
