"""An asyncio event loop whose clock is a SimPy environment: the router waits in virtual time.

The rule: run every callback that is ready, then let the environment take one step; never look at a
real clock. `time()` is `env.now`, a timer is a moment of it, and an idle loop steps the environment.
So `asyncio.timeout`, `loop.call_at` and SimPy processes share one order of events, and two runs of
one program give the same order.

There is no I/O: sockets, subprocesses, signals and threads raise NotImplementedError, as
`asyncio.AbstractEventLoop` does. An exception in a callback ends the run: in a simulation
nothing may fail quietly.
"""

import asyncio
from asyncio import events
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from heapq import heapify, heappop
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack, cast

import simpy

from sim.environment import Environment, Moment

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


CANCELLED_MIN: Final = 1024


class RanDryError(RuntimeError):
    """Nothing is left to happen, and what was waited for has not happened: a deadlock."""


class _Handle(asyncio.Handle):
    """A callback that is ready, at less cost than asyncio's own: there is no debug mode here."""

    __slots__ = ()

    # Never set on one of them.
    _repr = None
    _source_traceback = None

    def cancel(self) -> None:
        """Let it not be called."""
        self._cancelled = True
        self._callback = None
        self._args = ()


_new_handle: Final[Callable[[type[_Handle]], Any]] = _Handle.__new__


class SimLoop(asyncio.AbstractEventLoop):
    """Runs coroutines in the virtual time of `env`. Use `run`, or `run_until_complete`."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self._ready: deque[asyncio.Handle] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._cancelled = 0  # timers, since they were last taken out

    # The clock and the callbacks.

    def time(self) -> float:
        """The virtual time, in seconds."""
        return float(self.env.now)

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Call back before the clock moves."""
        # As its __init__ would, less a call into Python.
        handle = _new_handle(_Handle)
        handle._context = context if context is not None else copy_context()  # noqa: SLF001
        handle._callback = callback  # noqa: SLF001
        handle._args = args  # noqa: SLF001
        handle._cancelled = False  # noqa: SLF001
        self._ready.append(handle)
        return handle  # type: ignore[no-any-return]  # Any, for its private parts

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call back `delay` virtual seconds from now."""
        return self.call_at(self.env.now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call back at the virtual time `when`, or now where that is past."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.env.at(max(when, self.env.now), self._fire, value=handle)
        return handle

    def _fire(self, timeout: Moment) -> None:
        handle = timeout.value
        assert isinstance(handle, asyncio.TimerHandle)
        if not handle.cancelled():
            self._ready.append(handle)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:  # noqa: ARG002
        """A cancelled timer's event does nothing; where they become many, they are taken out.

        Else a long timeout that is hardly ever reached would keep an event for each request there was.
        """
        self._cancelled += 1
        queue = self.env._queue  # noqa: SLF001
        if self._cancelled > CANCELLED_MIN and self._cancelled * 2 > len(queue):
            # In place: the loop that is running holds the list. Keys are unique: the order stays.
            queue[:] = [entry for entry in queue if not _is_cancelled(entry[3])]
            heapify(queue)
            self._cancelled = 0

    # Futures and tasks.

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]  # the base's overloads differ between versions
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> "asyncio.Task[T]":
        """A task of this loop."""
        return asyncio.Task(coro, loop=self, name=name, context=context)

    async def happens(self, event: simpy.Event) -> Any:  # noqa: ANN401  (a SimPy event's value is anything)
        """Wait for a SimPy event; return its value."""
        if event.processed:
            return _outcome(event)
        future = self.create_future()

        def happened(done: simpy.Event) -> None:
            if not future.done():
                future.set_result(None)
                done.defused = True

        event.callbacks.append(happened)
        await future
        return _outcome(event)

    # Running.

    def run_until_complete(self, future: "Generator[Any, None, T] | Awaitable[T]") -> T:
        """Run until the future is done. Raises `RanDryError` where it never will be."""
        if events._get_running_loop() is not None:  # noqa: SLF001
            raise RuntimeError("a simulation cannot be run inside a running event loop")
        main: asyncio.Future[T] = asyncio.ensure_future(cast("Awaitable[T]", future), loop=self)
        env = self.env
        ready, scheduled = self._ready, cast("list[Any]", env._queue)  # noqa: SLF001
        done, next_ready = main.done, ready.popleft
        events._set_running_loop(self)  # noqa: SLF001  (the one way to be the running loop)
        try:
            while True:
                while ready:
                    handle: Any = next_ready()
                    if not handle._cancelled:  # noqa: SLF001
                        # What it raises ends the run.
                        handle._context.run(handle._callback, *handle._args)  # noqa: SLF001
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                if done():
                    break
                if not scheduled:
                    raise RanDryError(f"nothing is left to happen at {self.time()} s")
                if type(scheduled[0][3]) is Moment:  # as `env.step` does, less a call
                    env._now, _, _, happens = heappop(scheduled)  # noqa: SLF001
                    happens.callback(happens)
                else:
                    env.step()
        finally:
            events._set_running_loop(None)  # noqa: SLF001
        return main.result()

    def is_running(self) -> bool:
        """Whether this loop is the running one."""
        return events._get_running_loop() is self  # noqa: SLF001

    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Forget what is still ready; the environment is the caller's."""
        self._ready.clear()
        self._closed = True

    def get_debug(self) -> bool:
        """Never: asyncio's debug mode reads the real clock."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep the first failure; the run ends with it."""
        if self._failure is None:
            self._failure = context.get("exception") or RuntimeError(context["message"])

    async def shutdown_asyncgens(self) -> None:
        """Nothing to do: generators of a simulation hold nothing outside it."""


def run(env: Environment, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the virtual time of `env`; then cancel the tasks that it left."""
    loop = SimLoop(env)  # type: ignore[abstract]  # sockets and processes are left out on purpose
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        # In the order in which they were made: names are Task-1, Task-2, ..., Task-10.
        for task in sorted(left, key=lambda task: (len(task.get_name()), task.get_name())):
            task.cancel()
        if left:
            gathered = _gather(left)
            loop.run_until_complete(gathered)
        loop.close()


def _is_cancelled(event: object) -> bool:
    if not isinstance(event, Moment):
        return False
    handle = event.value
    return isinstance(handle, asyncio.TimerHandle) and handle.cancelled()


def _outcome(event: simpy.Event) -> Any:  # noqa: ANN401
    """An event's value; a failed one's exception is raised."""
    if event.ok:
        return event.value
    assert isinstance(event.value, BaseException)
    raise event.value


async def _gather(tasks: "set[asyncio.Task[Any]]") -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
