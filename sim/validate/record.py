"""What a recording says of each request: what was asked for, and what became of it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sim.traces import TraceRow


class _Extra(msgspec.Struct):
    model: str
    outcome: str = ""
    worker: str = ""
    adapter_use: str = "none"
    queued_s: float = 0.0
    load_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float | None = None


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    extra: _Extra
    session_id: str = ""


class Served(msgspec.Struct, frozen=True):
    """One request and its end, real or simulated. Times in seconds; None where it has none."""

    label: str
    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    model: str
    worker: str
    use: str
    completed: bool
    ttft_s: float | None
    e2e_s: float | None

    @property
    def row(self) -> TraceRow:
        """What was asked for, as a trace's row."""
        return TraceRow(self.timestamp_ms, self.input_tokens, self.output_tokens, self.model)

    @property
    def itl_s(self) -> float | None:
        """The mean time between two of its tokens."""
        if self.ttft_s is None or self.e2e_s is None or self.output_tokens < 2:  # noqa: PLR2004
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def read_record(path: Path) -> Iterator[Served]:
    """The requests of a recording, in order of arrival."""
    decode = msgspec.json.Decoder(_Line).decode
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            row = decode(line)
            extra = row.extra
            yield Served(
                row.session_id,
                row.timestamp,
                row.input_length,
                row.output_length,
                extra.model,
                extra.worker,
                extra.adapter_use,
                extra.outcome == "completed",
                extra.ttft_s,
                extra.e2e_s,
            )
