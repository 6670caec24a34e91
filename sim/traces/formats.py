"""Which format a trace has: told by how the file begins, never by its name.

A format is a callable that makes a row of a line; what is the same for all of them (opening, line
numbers, order of time, leaving bad rows out) is in `sim.traces`.
"""

import enum
from collections.abc import Callable
from typing import Final, assert_never

import msgspec

from sim.traces import azure, burstgpt, chats, jsonl, servegen
from sim.traces.columns import names
from sim.traces.jsonl import TimeUnit
from sim.traces.row import TraceRow

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class UnknownFormatError(Exception):
    """A file begins like none of the formats."""


class TraceFormat(enum.Enum):
    """The formats, each by the name that its readers know it by."""

    JSON_LINES = "JSON lines (Mooncake, AIPerf, vLLM timed_trace)"
    CHATS = "JSON lines with chat ids (Qwen on Bailian)"
    AZURE = "Azure CSV"
    BURSTGPT = "BurstGPT CSV"
    SERVEGEN = "ServeGen CSV"

    @property
    def has_header(self) -> bool:
        """Whether the first line names columns."""
        return self in {TraceFormat.AZURE, TraceFormat.BURSTGPT, TraceFormat.SERVEGEN}


def detect(start: bytes) -> TraceFormat:
    """The format of a file that begins so. Raises `UnknownFormatError`."""
    start = start.removeprefix(BYTE_ORDER_MARK)
    if start.lstrip().startswith(b"{"):
        first = start.lstrip().partition(b"\n")[0]
        return TraceFormat.CHATS if b'"parent_chat_id"' in first else TraceFormat.JSON_LINES
    line = start.partition(b"\n")[0]
    if servegen.CLIENT_DATA.match(line):
        raise UnknownFormatError(
            "this is ServeGen's data about one client, not a workload; make one with its "
            "`generate_workload` and `save_requests_to_csv`"
        )
    header = line.decode("utf-8", errors="replace").strip()
    columns = set(names(header))
    for wanted, found in (
        (azure.WANTED, TraceFormat.AZURE),
        (burstgpt.WANTED, TraceFormat.BURSTGPT),
    ):
        if columns.issuperset(wanted):
            return found
    if columns.issuperset(servegen.NEEDED) and columns & {servegen.PROMPT, *servegen.MULTIMODAL}:
        return TraceFormat.SERVEGEN
    raise UnknownFormatError(
        f"it begins with `{header[:80]}`; expected JSON lines ({jsonl.EXAMPLE}) or the header of "
        f"Azure's ({azure.HEADER}), BurstGPT's ({burstgpt.HEADER}) or ServeGen's CSV "
        f"({servegen.HEADER})"
    )


def parser(found: TraceFormat, header: str, unit: TimeUnit | None) -> Callable[[bytes], TraceRow]:
    """What makes a row of a line; it raises `RowError`. `unit` is for JSON lines alone."""
    match found:
        case TraceFormat.JSON_LINES:
            return jsonl.Rows(unit or TimeUnit.MILLISECONDS)
        case TraceFormat.CHATS:
            return chats.Rows()
        case TraceFormat.AZURE:
            return azure.Rows(header)
        case TraceFormat.BURSTGPT:
            return burstgpt.Rows(header)
        case TraceFormat.SERVEGEN:
            return servegen.Rows(header)
        case _:
            assert_never(found)


class Reading(msgspec.Struct, frozen=True):
    """How a trace is to be read.

    `skip_bad` leaves bad rows out, and counts them, instead of stopping at the first. `unit` is what
    the timestamps of JSON lines count, where it is not milliseconds (vLLM's `timed_trace` takes
    seconds unless told otherwise).
    """

    skip_bad: bool = False
    unit: TimeUnit | None = None
