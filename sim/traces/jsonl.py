"""JSON lines, as Mooncake, AIPerf and other replay tools write and read them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from sim.traces.row import TraceError, TraceRow

# The contract's model ids: base or base:adapter, and never `..`.
MODEL = re.compile(
    r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,127}(:[A-Za-z0-9][A-Za-z0-9._-]{0,127})?"
)
Length = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]


class _Extra(msgspec.Struct):
    model: str | None = None


class _Line(msgspec.Struct):
    """A line's fields; others, which some tools add, are let be."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Length
    output_length: Length
    hash_ids: tuple[int, ...] = ()
    session_id: str | int | None = None
    tenant: str = ""
    priority: int = 0
    extra: _Extra | None = None


def rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, TraceRow]]:
    """Yield each row with its line number. Empty lines are let be."""
    decode = msgspec.json.Decoder(_Line).decode
    for number, raw in enumerate(file, 1):
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.ValidationError as error:
            raise TraceError(path, number, _explain(str(error))) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise TraceError(
                path,
                number,
                f"not valid JSON ({error}); expected one object a line, such as "
                '{"timestamp": 0, "input_length": 100, "output_length": 20}',
            ) from None
        session = None if line.session_id is None else str(line.session_id)
        model = line.extra.model if line.extra else None
        if model is not None and not MODEL.fullmatch(model):
            raise TraceError(
                path,
                number,
                f"extra.model: `{model[:80]}` is no model id; write base or base:adapter",
            )
        yield (
            number,
            TraceRow(
                line.timestamp,
                line.input_length,
                line.output_length,
                model,
                session,
                line.tenant,
                line.priority,
                line.hash_ids,
            ),
        )


def _explain(message: str) -> str:
    what, _, where = message.partition(" - at ")
    if missing := re.match(r"Object missing required field `(.*)`", what):
        return f"`{missing[1]}` is missing; a row needs timestamp, input_length and output_length"
    field = where.strip("`").removeprefix("$.") or "row"
    hint = "; write a whole number" if "Expected `int`" in what else ""
    return f"{field}: {what}{hint}"
