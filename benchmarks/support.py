"""What the benchmarks share: processes, CPU time, a load generator, the table and the file."""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    top = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text)
    top.add_argument("--rounds", type=int, default=5, help="rounds to take the median of")
    top.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", metavar="FILE")
    return top


def free_port() -> int:
    """A port that the system has free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], url: str, log: Path, timeout_s: float = 600
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server process that answers at `url`, stopped at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  (loopback)
            return bool(answer.status == 200)
    except OSError:
        return False


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class Load:
    """What one run of requests took. Latencies in seconds, sorted."""

    def __init__(self, wall_s: float, latencies: list[float], chunks: int) -> None:
        self.wall_s = wall_s
        self.latencies = sorted(latencies)
        self.chunks = chunks

    @property
    def median_s(self) -> float:
        """The median latency."""
        return statistics.median(self.latencies)

    @property
    def per_s(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.wall_s


async def drive(url: str, bodies: Sequence[dict[str, Any]], *, clients: int) -> Load:
    """Send all bodies as chat requests, `clients` at a time; every answer must be 200."""
    waiting = iter([msgspec.json.encode(body) for body in bodies])
    latencies: list[float] = []
    chunks = 0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def client() -> None:
            nonlocal chunks
            for body in waiting:
                started = time.perf_counter()
                async with session.post(
                    f"{url}/v1/chat/completions",
                    data=body,
                    headers={"Content-Type": "application/json"},
                ) as answer:
                    if answer.status != 200:
                        raise SystemExit(f"{answer.status}: {await answer.text()}")
                    async for _ in answer.content.iter_any():
                        chunks += 1
                latencies.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        wall_s = time.perf_counter() - started
    return Load(wall_s, latencies, chunks)


def chat(model: str, tokens: int, *, stream: bool = False) -> dict[str, Any]:
    """A chat request of a known length."""
    messages = [{"role": "user", "content": "Say something."}]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": tokens,
        "stream": stream,
        "temperature": 0,
        "ignore_eos": True,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    path: Path,
    data: Any,  # noqa: ANN401
) -> None:
    """Print the table and write the file, with the machine and the date."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "benchmark": title,
        "command": f"python -m {' '.join([_module(), *sys.argv[1:]])}",
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
    path.write_text(json.dumps({**head, "results": data}, indent=2) + "\n")
    Console().print(f"written to {path}", highlight=False)


def _module() -> str:
    """What was run, as `python -m` takes it."""
    spec = sys.modules["__main__"].__spec__
    name = Path(sys.argv[0]).stem if spec is None else spec.name
    return name.removesuffix(".__main__")
