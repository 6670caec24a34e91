"""How a process is told to stop: a first signal asks for it, a second one for haste."""

import asyncio
import signal
from collections.abc import Awaitable
from typing import Any


def listen_for_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Two events: SIGTERM or SIGINT has come, and has come again. Inside a running loop."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop, hurry


async def until_started(*parts: Awaitable[object], stop: asyncio.Event) -> None:
    """Return when all parts have started, or `stop` is set; raise what the first failure raised."""
    starting = asyncio.gather(*parts)
    stopping = asyncio.ensure_future(stop.wait())
    ends: tuple[asyncio.Future[Any], ...] = (starting, stopping)
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
    finally:
        stopping.cancel()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
