"""Small traces for tests of the simulator."""

import json
from pathlib import Path
from typing import Any


def write_trace(path: Path, count: int, *, every_ms: float = 20, model: str | None = None) -> Path:
    """`count` requests, one every `every_ms`; `{}` in `model` is one of twelve numbers."""
    rows = []
    for number in range(count):
        row: dict[str, Any] = {
            "timestamp": number * every_ms,
            "input_length": 50 + number % 200,
            "output_length": 20 + number % 50,
        }
        if model:
            row["extra"] = {"model": model.format(number % 12)}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path
