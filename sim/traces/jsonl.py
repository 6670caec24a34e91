"""JSON lines, as Mooncake, AIPerf, vLLM's `timed_trace` and this project write and read them.

A row gives its lengths in tokens and its own time. AIPerf also knows rows that do not: prompts as
text, which would need a tokenizer here, and turns that wait a `delay` after the answer before them,
which no replay at fixed times can place. Both are refused by name. Fields that other tools add are
let be.
"""

import enum
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import msgspec

from sim.traces.row import TIME_MAX_MS, TOKENS, TOKENS_MAX, HalfRowError, RowError, TraceRow

# The contract's model ids: base or base:adapter, and never `..`.
ADAPTER: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MODEL: Final = re.compile(rf"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}(:{ADAPTER.pattern})?")
Length = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
PROMPTS: Final = ("text_input", "messages", "payload")
EXAMPLE: Final = '{"timestamp": 0, "input_length": 100, "output_length": 20}'
ROW: Final = f"one JSON object a line, such as {EXAMPLE}"
EXPECTED: Final = {
    "timestamp": f"a number, 0 to {TIME_MAX_MS:g}",
    "input_length": TOKENS,
    "output_length": TOKENS,
    "hash_ids": "a list of whole numbers",
    "session_id": "a string or a whole number",
    "tenant": "a string",
    "priority": "a whole number",
    "extra": 'an object such as {"model": "base:adapter"}',
    "extra.model": "base or base:adapter",
    "chat_id": "a whole number",
    "parent_chat_id": "a whole number, -1 for the first of a conversation",
}


class TimeUnit(enum.StrEnum):
    """What a JSON row's `timestamp` counts."""

    MILLISECONDS = "ms"
    SECONDS = "s"


PER_UNIT_MS: Final = {TimeUnit.MILLISECONDS: 1, TimeUnit.SECONDS: 1000}


class _Extra(msgspec.Struct):
    model: str | None = None


class Line(msgspec.Struct):
    """A line's fields."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=TIME_MAX_MS)]
    input_length: Length
    output_length: Length
    hash_ids: tuple[int, ...] | None = None
    session_id: str | int | None = None
    tenant: str = ""
    priority: int = 0
    extra: _Extra | None = None


AnyLine = TypeVar("AnyLine", bound=Line)


class Rows:
    """Reads lines whose times count in one unit."""

    def __init__(self, unit: TimeUnit) -> None:
        self._decode = msgspec.json.Decoder(Line).decode
        self._unit_ms = PER_UNIT_MS[unit]

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        return row(decoded(self._decode, line), self._unit_ms)


def decoded(decode: Callable[[bytes], AnyLine], line: bytes) -> AnyLine:
    """A line's fields, checked. Raises `RowError`."""
    try:
        return decode(line)
    except msgspec.ValidationError as error:
        raise _explained(line, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        if not line.endswith(b"\n"):
            raise HalfRowError("row", _shown(line), ROW) from None
        raise _no_json(line) from None


def row(line: Line, unit_ms: int) -> TraceRow:
    """A row of a line whose times count `unit_ms` milliseconds. Raises `RowError`."""
    model = line.extra.model if line.extra else None
    if model is not None and not MODEL.fullmatch(model):
        raise RowError("extra.model", model, EXPECTED["extra.model"])
    return TraceRow(
        line.timestamp if unit_ms == 1 else round(line.timestamp * unit_ms, 3),
        line.input_length,
        line.output_length,
        model,
        None if line.session_id is None else str(line.session_id),
        line.tenant,
        line.priority,
        line.hash_ids or (),
    )


def _no_json(line: bytes) -> RowError:
    return RowError("row", _shown(line), ROW)


def _shown(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").strip()


def _explained(line: bytes, message: str) -> RowError:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return _no_json(line)
    if not isinstance(fields, dict):
        return RowError("row", json.dumps(fields), ROW)
    what, _, where = message.partition(" - at ")
    missing = re.match(r"Object missing required field `(.*)`", what)
    field = missing[1] if missing else where.strip("`").removeprefix("$.").partition("[")[0]
    found: Any = fields
    for key in field.split("."):
        found = found.get(key)
    expected = EXPECTED.get(field, ROW)
    prompt = next((name for name in PROMPTS if name in fields), None)
    if field == "timestamp" and found is None and fields.get("delay") is not None:
        expected += "; a `delay` counts from an answer, which a replay at fixed times does not have"
    elif field == "input_length" and found is None and prompt is not None:
        expected += f"; a prompt as `{prompt}` would need a tokenizer"
    return RowError(field, None if missing else json.dumps(found), expected)
