"""Adapters come to this host before a worker is chosen: a slow store holds up no worker.

One fetch for each adapter, however many jobs wait for it. It is a task of the router's own, so that who
leaves does not cancel it for the others; each who waits gets an exception of its own.
"""

import asyncio
from functools import partial

from router.core.fleet import Fleet
from router.core.job import AdapterRef, Job, LoadError, LoadFault
from router.core.ports import Loader, Observer


class Fetches:
    """Those under way for one fleet."""

    def __init__(self, fleet: Fleet, loader: Loader, observer: Observer) -> None:
        self._loop = asyncio.get_running_loop()
        self._fleet = fleet
        self._loader = loader
        self.observer = observer
        self._tasks: dict[AdapterRef, asyncio.Task[None]] = {}
        self._waiters: dict[AdapterRef, dict[asyncio.Future[None], None]] = {}
        self.waiting = 0  # jobs that wait for one

    def needed(self, job: Job) -> bool:
        """Whether the job's adapter is neither on this host nor on any worker."""
        adapter, fleet = job.adapter, self._fleet
        if adapter is None or fleet.staged(adapter) or fleet.holders(adapter):
            return False
        if self._loader.staged(adapter):
            fleet.stage(adapter)
            return False
        return True

    def fetched(self, adapter: AdapterRef) -> "asyncio.Future[None]":
        """Ends when the adapter is on this host, or with `LoadError`; to be given to `left` then."""
        if adapter not in self._tasks:
            task = self._loop.create_task(self._loader.fetch(adapter))
            self._tasks[adapter] = task
            task.add_done_callback(partial(self._ended, adapter, self._loop.time()))
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiters.setdefault(adapter, {})[done] = None
        self.waiting += 1
        return done

    def waiting_for(self, adapter: AdapterRef) -> int:
        """How many wait for that one."""
        return len(self._waiters.get(adapter, ()))

    def left(self, adapter: AdapterRef, done: "asyncio.Future[None]") -> None:
        """Somebody waits no more, whether it ended or not."""
        self.waiting -= 1
        self._waiters.get(adapter, {}).pop(done, None)

    @property
    def tasks(self) -> tuple["asyncio.Task[None]", ...]:
        """Those under way."""
        return tuple(self._tasks.values())

    @property
    def pending(self) -> list["asyncio.Future[None]"]:
        """Of all who wait, what has not ended."""
        everyone = (done for waiters in self._waiters.values() for done in waiters)
        return [done for done in everyone if not done.done()]

    def _ended(self, adapter: AdapterRef, began: float, task: "asyncio.Task[None]") -> None:
        del self._tasks[adapter]
        error: LoadError | None
        if task.cancelled():
            error = LoadError(LoadFault.STORE_UNAVAILABLE, "the router is shutting down")
        elif (failure := task.exception()) is None:
            error = None
            self._fleet.stage(adapter)
        elif isinstance(failure, LoadError):
            error = failure
        else:
            error = LoadError(LoadFault.STORE_UNAVAILABLE, f"{type(failure).__name__}: {failure}")
        self.observer.fetch_ended(adapter, self._loop.time() - began, error)
        for done in self._waiters.pop(adapter, {}):
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:  # a new one for each: a shared one would gather all their tracebacks
                done.set_exception(LoadError(error.fault, str(error)))
