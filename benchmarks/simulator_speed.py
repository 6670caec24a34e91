"""How fast the simulator is on one core, and how much memory it takes: real traces and long ones.

The long traces are the Azure one again and again, one after the other, so that their load is the
same and the cost of a request can be compared between 10,000 and 1,000,000 of them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support import ROOT, parser, report, spread
from sim.traces import read

DATA = ROOT.parent / "shared" / "data"
AZURE = DATA / "azure_llm_2023_conv.csv"
MOONCAKE = DATA / "mooncake_conversation.jsonl"
LONG = (10_000, 100_000, 1_000_000)


class Case(NamedTuple):
    """One measurement: a trace, and how it is replayed."""

    title: str
    trace: Path
    arguments: tuple[str, ...]
    rounds: int


def main() -> None:
    """Replay in processes of their own, so that each reports its own memory."""
    top = parser("simulator_speed", __doc__.partition("\n")[0])
    arguments = top.parse_args()
    eight = ("--adapters", "200", "--workers", "8")
    rows, data = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [
            Case("Azure, 200 adapters, 8 workers", AZURE, eight, arguments.rounds),
        ]
        if next(iter(read(MOONCAKE))).hash_ids:
            mooncake = ("--workers", "4")
            title = "Mooncake, prefix caching, 4 workers"
            cases.append(Case(title, MOONCAKE, mooncake, arguments.rounds))
        else:  # whatever stands there, its figures would be called something that they are not
            print(f"left out: {MOONCAKE.name} has no hash ids, so it is not the Mooncake trace")
        for count in LONG:
            long = folder / f"long-{count}.jsonl"
            repeat(AZURE, long, count)
            rounds = 1 if count == max(LONG) else arguments.rounds
            cases.append(Case(f"Azure, {count:,} requests, 8 workers", long, eight, rounds))
        for case in cases:
            results = [replay(case, folder) for _ in range(case.rounds)]
            speed = spread([result["sim"]["requests_per_wall_s"] for result in results])
            rss = max(result["sim"]["peak_rss_mib"] for result in results)
            wall_s = spread([result["sim"]["wall_s"] for result in results])
            assert len({result["digest"] for result in results}) == 1
            rows.append(
                (
                    case.title,
                    f"{results[0]['requests']:,}",
                    f"{speed['median']:,.0f}",
                    f"{speed['min']:,.0f} to {speed['max']:,.0f}",
                    f"{wall_s['median']:.2f} s",
                    f"{rss:.0f} MiB",
                )
            )
            data.append(
                {
                    "case": case.title,
                    "requests": results[0]["requests"],
                    "requests_per_wall_s": speed,
                    "wall_s": wall_s,
                    "peak_rss_mib": rss,
                    "digest": results[0]["digest"],
                }
            )
    report(
        "Simulated requests a second, one core",
        ("trace", "requests", "a second", "least to most", "took", "memory"),
        rows,
        arguments.json,
        data,
    )


def replay(case: Case, folder: Path) -> dict[str, Any]:
    """One replay in a process of its own."""
    out = folder / "out.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "sim", "replay", str(case.trace)),
            # One policy for all time: a machine's figures stay comparable.
            *(*case.arguments, "--policy", "affinity", "--seed", "1", "--json", str(out)),
        ],
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
