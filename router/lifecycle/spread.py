"""A decision made in one router process becomes true in all of them, and stays so.

Whoever decides writes it to the registry and waits until every process that lives has taken it in; each
process looks there every `POLL_S` and applies what is new, its own decisions too. One that does not
answer for `SPREAD_S` is not waited for: it applies what is new when it can.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from anyio import CapacityLimiter, to_thread

from router.lifecycle.alias import Alias
from router.lifecycle.registry import News, Registry, RegistryError
from router.lifecycle.usage import UsageRecord

log = logging.getLogger("lorayard.lifecycle")

POLL_S: Final = 0.1
SPREAD_S: Final = 2.0
T = TypeVar("T")


class Spread:
    """The decisions of one model. To be made inside a running loop; raises `RegistryError`, `OSError`.

    What is new goes to whoever listens, in this process's event loop. `alone` says that there are no
    other processes.
    """

    def __init__(self, model_id: str, folder: Path, *, alone: bool) -> None:
        self.alone = alone
        self._model_id = model_id
        self._registry = Registry(folder)
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[News], None]] = []
        self._threads = CapacityLimiter(1)
        self._following: asyncio.Task[None] | None = None

    def listen(self, listener: Callable[[News], None]) -> None:
        """Tell it what is new; to be called before `start`."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Take in all there is, and from now on what is new. Raises `RegistryError`."""
        self._take_news()
        self._following = self._loop.create_task(self._follow())

    async def stop(self) -> None:
        """End that."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._in_thread(self._registry.close)

    async def change(self, name: str, step: Callable[[Alias], Alias]) -> Alias:
        """Change what a name means; returns what it means when all processes know.

        Raises `RegistryError`, and what the step does.
        """
        alias, serial = await self._in_thread(lambda: self._registry.change(name, step))
        await self._everywhere(serial)
        return alias

    async def drain(self, worker_id: str, *, draining: bool) -> None:
        """Have all processes send a worker nothing new, or work again. Raises `RegistryError`."""
        serial = await self._in_thread(lambda: self._registry.drain(worker_id, draining=draining))
        await self._everywhere(serial)

    async def claim(self, name: str) -> bool:
        """Whether this process sees to a name, until `give_back`. Raises `RegistryError`."""
        return await self._in_thread(lambda: self._registry.claim(name))

    async def give_back(self, name: str) -> None:
        """Others may see to it. Raises `RegistryError`."""
        await self._in_thread(lambda: self._registry.give_back(name))

    async def tell_usage(self, records: Mapping[str, UsageRecord]) -> None:
        """Let the other processes know how often adapters were used here. Raises `RegistryError`."""
        await self._in_thread(lambda: self._registry.tell_usage(records))

    def usage_elsewhere(self, names: Sequence[str]) -> Mapping[str, Sequence[UsageRecord]]:
        """What the other processes have told of it. Raises `RegistryError`."""
        return {} if self.alone else self._registry.usage_elsewhere(names)

    async def _everywhere(self, serial: int) -> None:
        """Apply what was decided here, and wait for the others."""
        self._take_news()
        await self._in_thread(self._registry.tell_seen)
        until = self._loop.time() + SPREAD_S
        while not await self._in_thread(lambda: self._registry.seen_by_all(serial)):
            if self._loop.time() > until:
                log.warning("%s: a router process has not taken a change in yet", self._model_id)
                return
            await asyncio.sleep(POLL_S / 2)

    def _take_news(self) -> bool:
        news = self._registry.news()
        if not news:
            return False
        for listener in self._listeners:
            listener(news)
        return True

    async def _follow(self) -> None:
        """Take in what other processes decide, for ever."""
        failing = told = False
        while True:
            try:
                if self._take_news():
                    told = False
                if not told:
                    await self._in_thread(self._registry.tell_seen)
                    told = True
                failing = False
            except RegistryError as error:
                if not failing:
                    log.warning("what other router processes decide is not known: %s", error)
                failing = True
            except Exception:  # this must not end while the router runs
                log.exception("%s: a change was not taken in", self._model_id)
            await asyncio.sleep(POLL_S)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # Shielded by anyio: what is begun is done, whoever is cancelled.
        return await to_thread.run_sync(work, limiter=self._threads)
