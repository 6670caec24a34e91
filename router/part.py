"""One of several router processes at one port: `python -m router.part`, which the supervisor runs.

It reads its part, one line of JSON, from its standard input, and ends at once when that closes: then
the supervisor is gone, and the workers with it. It says on its standard output, in one line, that it is
ready. Everything else is as in a process that serves alone.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec

from router.config import Config
from router.telemetry.metrics import Metrics
from router.telemetry.siblings import Siblings

STDIN: Final = 0
READ_BYTES: Final = 1 << 16
SUPERVISOR_GONE: Final = 3


class Part(msgspec.Struct, frozen=True):
    """What one process is to do. `folder` is where the processes of one supervisor find each other."""

    number: int
    count: int
    folder: str
    log_level: str
    config: Config

    @property
    def name(self) -> str:
        """What logs and metrics call it."""
        return f"r{self.number}"

    def listen(self, host: str, port: int) -> socket.socket:
        """Bind the address that the supervisor holds. Raises `OSError`."""
        return bound(host, port, shared=True)

    async def share(self, metrics: Metrics) -> None:
        """Have whoever answers `GET /metrics` answer for all, until this process ends."""
        names = [f"r{number}" for number in range(self.count)]
        await Siblings(Path(self.folder), self.name, names, metrics).start()

    def ready(self, announcement: str) -> None:
        """Tell the supervisor."""
        os.write(sys.stdout.fileno(), msgspec.json.encode(announcement) + b"\n")


class Alone:
    """What a process that serves alone does instead."""

    @staticmethod
    def ready(announcement: str) -> None:
        """Tell whoever started it."""
        print(announcement, flush=True)  # noqa: T201


def bound(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket at that address, not yet listening. Raises `OSError`.

    With `shared` others may listen there too, and the kernel deals connections out among them.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror}: {host}:{port}") from None
    return listener


def read_part() -> Part:
    """Read the first line of standard input, and follow the rest of it to its end."""
    data = b""
    while not data.endswith(b"\n"):
        more = os.read(STDIN, READ_BYTES)
        if not more:
            os._exit(SUPERVISOR_GONE)
        data += more
    threading.Thread(target=_follow, name="lifeline", daemon=True).start()
    return msgspec.json.decode(data, type=Part)


def _follow() -> None:
    while os.read(STDIN, READ_BYTES):
        pass
    os._exit(SUPERVISOR_GONE)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on uvloop, where that is to be had."""
    try:
        import uvloop  # noqa: PLC0415  (not on every platform)
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())


def main() -> int:
    """Serve as one of several; return the exit status."""
    from router.__main__ import guarded, set_up_logging  # noqa: PLC0415  (which imports this)
    from router.serve import serve  # noqa: PLC0415

    part = read_part()
    set_up_logging(part.log_level, part.name)
    return guarded(lambda: run(lambda: serve(part.config, part)))


if __name__ == "__main__":
    sys.exit(main())
