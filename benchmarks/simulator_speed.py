"""How fast the simulator is: requests a second on one core, and memory, on a real trace and a long one.

The long trace is the real one again and again, one after the other, so that its load is the same.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support import ROOT, parser, report, spread
from sim.traces import read

AZURE = ROOT.parent / "shared" / "data" / "azure_llm_2023_conv.csv"


def main() -> None:
    """Replay in processes of their own, so that each reports its own memory."""
    top = parser("simulator_speed", __doc__.partition("\n")[0])
    top.add_argument("--trace", type=Path, default=AZURE)
    top.add_argument("--long", type=int, default=200_000, help="requests of the long trace")
    arguments = top.parse_args()
    rows, data = [], []
    with tempfile.TemporaryDirectory() as name:
        long = Path(name) / "long.jsonl"
        repeat(arguments.trace, long, arguments.long)
        for title, path, workers, rounds in (
            (f"{arguments.trace.name}, 8 workers", arguments.trace, 8, arguments.rounds),
            (f"{arguments.trace.name}, 4 workers", arguments.trace, 4, arguments.rounds),
            (f"the same {arguments.long:,} long, 8 workers", long, 8, 1),
        ):
            results = [replay(path, workers, Path(name)) for _ in range(rounds)]
            speed = spread([result["sim"]["requests_per_wall_s"] for result in results])
            rss = max(result["sim"]["peak_rss_mib"] for result in results)
            assert len({result["digest"] for result in results}) == 1
            rows.append(
                (
                    title,
                    f"{results[0]['requests']:,}",
                    f"{speed['median']:,.0f}",
                    f"{speed['min']:,.0f} to {speed['max']:,.0f}",
                    f"{rss:.0f} MiB",
                )
            )
            data.append(
                {
                    "case": title,
                    "requests": results[0]["requests"],
                    "requests_per_wall_s": speed,
                    "peak_rss_mib": rss,
                    "digest": results[0]["digest"],
                }
            )
    report(
        "Simulated requests a second, 200 adapters, one core",
        ("trace", "requests", "a second", "least to most", "memory"),
        rows,
        arguments.json,
        data,
    )


def replay(path: Path, workers: int, folder: Path) -> dict[str, Any]:
    """One replay in a process of its own."""
    out = folder / "out.json"
    arguments = ["--adapters", "200", "--seed", "1", "--workers", str(workers), "--json", str(out)]
    subprocess.run(
        [sys.executable, "-m", "sim", "replay", str(path), *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def repeat(trace: Path, into: Path, count: int) -> None:
    """Write `count` requests: the trace again and again."""
    rows = list(read(trace))
    span_ms = rows[-1].timestamp - rows[0].timestamp + 100
    with into.open("w") as file:
        for number in range(count):
            lap, index = divmod(number, len(rows))
            row = rows[index]
            line = {
                "timestamp": row.timestamp + lap * span_ms,
                "input_length": row.input_length,
                "output_length": row.output_length,
            }
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
