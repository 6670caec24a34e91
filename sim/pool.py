"""Run many replays over all cores: the same results in the same order, whatever ends first.

Replays share nothing, so each is one task of a process pool; a trace is read by every process for
itself, since sending a million rows costs more than parsing them. Processes are spawned, not
forked: a fork copies the threads' locks of its parent. At most a few tasks wait in the pool at any
time, and what comes back of one is bounded: figures, a curve of fixed length, a timeline.

An interrupt reaches the parent alone. It raises a flag that every replay looks at, so that each
process ends by itself, in milliseconds, and nothing is left behind.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from router.config import Config, ConfigError
from sim.fleet import EngineArgumentError
from sim.latency import CalibrationError
from sim.replay import Options, Replay, UnknownModelError
from sim.report.summary import curve
from sim.report.timeline import Sampler, Timeline
from sim.traces import Reading, TraceError, read

POLL_S: Final = 0.1
QUEUED_PER_JOB: Final = 2
REFUSALS: Final = (
    ConfigError,
    TraceError,
    CalibrationError,
    EngineArgumentError,
    UnknownModelError,
    OSError,
)


class PoolError(Exception):
    """A replay could not be run; the message is the user's, as the replay alone would give it."""


class Workload(msgspec.Struct, frozen=True):
    """The trace that every replay of a pool runs, and what is known of it: its span in seconds."""

    trace: Path
    limit: int | None
    requests: int
    span_s: float
    models: tuple[str, ...] = ()
    reading: Reading = Reading()


class Task(msgspec.Struct, frozen=True):
    """One replay. `sample` asks for a timeline; an `optional` one may be refused by the engine."""

    config: Config
    options: Options
    sample: bool = False
    optional: bool = False


class Run(msgspec.Struct, frozen=True):
    """What came of a task: the contract's result, or why the engine model refuses the settings.

    The curves are those of `sim.report.summary.curve`.
    """

    result: dict[str, Any]
    ttft_curve: tuple[float | None, ...] = ()
    e2e_curve: tuple[float | None, ...] = ()
    timeline: Timeline | None = None
    refused: str | None = None


class _Failure(msgspec.Struct, frozen=True):
    """A user's error, as text: not every exception survives its way between processes."""

    message: str


class _StoppedError(Exception):
    """The parent was interrupted."""


def replay(workload: Workload, task: Task, ended: Callable[[int], None]) -> Run:
    """Run one task here. `ended` is told how many requests have ended so far."""
    sampler = Sampler(workload.span_s / task.options.speed) if task.sample else None
    rows = itertools.islice(read(workload.trace, workload.reading), workload.limit)
    try:
        simulation = Replay(
            task.config,
            rows,
            task.options,
            models=workload.models,
            progress=ended,
            sampler=sampler,
        )
        result = simulation.run()
    except (CalibrationError, EngineArgumentError) as error:
        if not task.optional:
            raise
        return Run({}, refused=str(error))
    latencies, offered = simulation.latencies, result["requests"]
    return Run(
        result,
        curve(latencies.ttft_s, offered),
        curve(latencies.e2e_s, offered),
        sampler.timeline() if sampler else None,
    )


# In the processes of the pool.


class _Process:
    """What a process of the pool is told at its start."""

    def __init__(self, workload: Workload, done: Any, stop: Any) -> None:  # noqa: ANN401  (ctypes)
        self.workload = workload
        self.done = done
        self.stop = stop

    def replay(self, task: Task) -> Run:
        counted = 0

        def ended(count: int) -> None:
            nonlocal counted
            if self.stop.value:
                raise _StoppedError
            with self.done.get_lock():
                self.done.value += count - counted
            counted = count

        return replay(self.workload, task, ended)


_process: _Process | None = None


def _initialize(workload: Workload, done: Any, stop: Any) -> None:  # noqa: ANN401  (ctypes)
    global _process  # noqa: PLW0603  (a process of the pool has no other place for it)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _process = _Process(workload, done, stop)


def _run(task: Task) -> Run | _Failure:
    assert _process is not None
    try:
        return _process.replay(task)
    except REFUSALS as error:
        return _Failure(str(error))


# In the parent.


class Pool:
    """Replays over `jobs` processes; with one, in this process. `progress` is told ended requests.

    Use as a context: the processes live from the first batch to the end of the block.
    """

    def __init__(
        self, workload: Workload, *, jobs: int, progress: Callable[[int], None] | None = None
    ) -> None:
        self.workload = workload
        self.jobs = jobs
        self._progress = progress or (lambda _: None)
        self._ended = 0
        self._executor: ProcessPoolExecutor | None = None
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            self._done = spawn.Value("q", 0)
            self._stop = spawn.Value("b", 0)
            self._executor = ProcessPoolExecutor(
                jobs,
                mp_context=spawn,
                initializer=_initialize,
                initargs=(workload, self._done, self._stop),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._stop.value = 1
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Task]) -> list[Run]:
        """Run a batch; the results are in the order of the tasks. Raises `PoolError`."""
        if self._executor is None:
            return [self._run_here(task) for task in tasks]
        try:
            return self._run_spread(self._executor, tasks)
        except BrokenProcessPool:
            raise PoolError(
                "a process of the pool was ended from outside, perhaps for want of memory; "
                f"use fewer than --jobs {self.jobs}"
            ) from None

    def _run_here(self, task: Task) -> Run:
        before = self._ended

        def ended(count: int) -> None:
            self._ended = before + count
            self._progress(self._ended)

        try:
            return replay(self.workload, task, ended)
        except REFUSALS as error:
            raise PoolError(str(error)) from None

    def _run_spread(self, executor: ProcessPoolExecutor, tasks: Sequence[Task]) -> list[Run]:
        runs: dict[int, Run] = {}
        failures: dict[int, _Failure] = {}
        under_way: dict[Future[Run | _Failure], int] = {}
        left: Iterator[tuple[int, Task]] = iter(enumerate(tasks))
        while True:
            # After a failure no new task is begun, but earlier ones may fail earlier in the order.
            room = 0 if failures else QUEUED_PER_JOB * self.jobs - len(under_way)
            with _interrupts_held():
                for index, task in itertools.islice(left, room):
                    under_way[executor.submit(_run, task)] = index
            if not under_way:
                break
            ended, _ = wait(under_way, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in ended:
                index = under_way.pop(future)
                outcome = future.result()
                if isinstance(outcome, _Failure):
                    failures[index] = outcome
                else:
                    runs[index] = outcome
            self._progress(self._done.value)
        if failures:
            raise PoolError(failures[min(failures)].message)
        return [runs[index] for index in range(len(tasks))]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes with SIGINT blocked, as they then stay: one while they import is a traceback.

    Here it is only put off to the end of the block. The mask is this thread's, and another thread
    (that of a progress bar) may take the signal: its handler would run here, in the middle of a
    start, and so is held too.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if here else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if here:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def all_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
