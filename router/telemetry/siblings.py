"""The metrics of all router processes at one port, as one page: whoever is asked asks the others.

Each series gets the label `process`. Nothing is added up here, as the right sum is not the same for
all: counters and what waits are summed over processes, while a worker's gauges are each process's word
on one and the same thing. A process that does not answer in time is left out of the page, and
`lorayard_processes` says how many are in it.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from router.telemetry.metrics import Metrics

TIMEOUT_S: Final = 1.0
HELP: Final = "# HELP "


class Siblings:
    """The processes `names`, of which this is `name`, each at a socket in `folder`."""

    def __init__(self, folder: Path, name: str, names: Sequence[str], metrics: Metrics) -> None:
        self._folder = folder
        self._name = name
        self._names = names
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Answer the others, and for all."""
        path = self._folder / f"{self._name}.sock"
        path.unlink(missing_ok=True)  # of one that was killed
        self._server = await asyncio.start_unix_server(self._answer, path)
        self._metrics.scrape = self.page

    async def page(self) -> bytes:
        """The text of `GET /metrics`."""
        pages = await asyncio.gather(*map(self._page_of, self._names))
        found = [(name, page) for name, page in zip(self._names, pages, strict=True) if page]
        return await asyncio.to_thread(merged, found)

    async def _page_of(self, name: str) -> bytes:
        if name == self._name:
            return self._metrics.page()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._folder / f"{name}.sock")
                try:
                    return await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return b""

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(self._metrics.page())
            await writer.drain()
        writer.close()

    def close(self) -> None:
        """Answer the others no more."""
        if self._server is not None:
            self._server.close()


def merged(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """Pages of Prometheus' text format as one, each sample with the label `process`."""
    families: dict[str, list[str]] = {}
    count = 0
    for process, page in pages:
        count += 1
        family: list[str] = []
        fresh = False
        label = f'process="{process}"'
        for line in page.decode().splitlines():
            if line.startswith(HELP):
                name = line.split(" ", 3)[2]
                fresh = name not in families
                family = families.setdefault(name, [])
            if not line.startswith("#"):
                family.append(_labelled(line, label))
            elif fresh:
                family.append(line)
    lines = [
        "# HELP lorayard_processes Router processes that are in this page.",
        "# TYPE lorayard_processes gauge",
        f"lorayard_processes {count}.0",
    ]
    for family in families.values():
        lines += family
    return "\n".join((*lines, "")).encode()


def _labelled(sample: str, label: str) -> str:
    brace, space = sample.find("{"), sample.find(" ")
    if 0 <= brace < space:
        return f"{sample[: brace + 1]}{label},{sample[brace + 1 :]}"
    return f"{sample[:space]}{{{label}}}{sample[space:]}"
