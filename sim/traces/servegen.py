"""ServeGen: the CSV that its `save_requests_to_csv` writes, with seconds.

A language or reasoning workload has `input_tokens`. A multimodal one has `text_tokens` and, for
images, audio and video, a list of the tokens of each: a prompt is the sum of all of them.
"""

import re
from typing import Final

from sim.traces.columns import Columns, milliseconds, names, tokens
from sim.traces.row import RowError, TraceRow

HEADER: Final = "request_id,timestamp,input_tokens,output_tokens"
NEEDED: Final = ("request_id", "timestamp", "output_tokens")
PROMPT: Final = "input_tokens"
MULTIMODAL: Final = ("text_tokens", "image_tokens", "audio_tokens", "video_tokens")
LIST: Final = re.compile(r"\[\s*(\d{1,9}(\s*,\s*\d{1,9})*)?\s*\]")
# ServeGen's own data: window, rate, coefficient of variation, distribution and its parameters.
CLIENT_DATA: Final = re.compile(rb"\d+,[\d.e+-]+,[\d.e+-]*,(Gamma|Weibull|Pareto|Exponential)?,")


class Rows:
    """Reads the lines below one header."""

    def __init__(self, header: str) -> None:
        present = names(header)
        self._parts = tuple(name for name in (PROMPT, *MULTIMODAL) if name in present)
        self._columns = Columns(header, ("timestamp", "output_tokens", *self._parts))

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        at, outputs, *parts = self._columns.cells(line)
        inputs = sum(_counted(*part) for part in zip(self._parts, parts, strict=True))
        return TraceRow(milliseconds("timestamp", at), inputs, tokens("output_tokens", outputs))


def _counted(field: str, cell: str) -> int:
    if not cell.startswith("["):
        return tokens(field, cell)
    if not LIST.fullmatch(cell):
        raise RowError(field, cell, "a list of tokens such as [712, 689]")
    return sum(int(number) for number in re.findall(r"\d+", cell))
