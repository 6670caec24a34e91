"""Processes on cores of their own: started, measured, and ended whatever happens.

Each is started in a session of its own, so that an interrupt at the terminal reaches the benchmark
alone, which then ends what it started and nothing else.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import msgspec

from benchmarks.data_plane.loads import Answers, Seen, Streams
from benchmarks.support import ROOT, TICKS_PER_S, answers

START_S: Final = 60.0
STOP_S: Final = 10.0
SAMPLE_S: Final = 0.1
PAGE_KIB: Final = os.sysconf("SC_PAGE_SIZE") // 1024


class StartError(Exception):
    """A process did not start; the message has the end of its log."""


class Cores(msgspec.Struct, frozen=True):
    """Where a router runs, and where engines and clients do."""

    router: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """The last core for the router, the others for the rest; one for both if there is but one."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[-1:]), frozenset(cores[:-1] or cores))


@contextmanager
def started(
    command: Sequence[str],
    cores: frozenset[int],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    piped: bool = False,
) -> Iterator["subprocess.Popen[str]"]:
    """A process on its cores; ended when the block is left, at first gently."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited, by its threads too
    try:
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else out,
                stderr=out,
                text=True,
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and those that it started."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session's, so nobody else's
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def wait_for(
    url: str, process: "subprocess.Popen[str]", log: Path, timeout_s: float = START_S
) -> None:
    """Return when a GET gives 200. Raises `StartError`."""
    deadline = time.monotonic() + timeout_s
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            why = "ended" if process.poll() is not None else f"is not ready after {timeout_s:g} s"
            text = log.read_text(errors="replace")[-1500:]
            raise StartError(f"{' '.join(map(str, process.args))} {why}:\n{text}")  # type: ignore[arg-type]
        time.sleep(0.05)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        try:
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds, in user and kernel, of a process and all below it, those that ended too."""
    ticks = 0
    for one in tree(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_S


def rss_kib(pid: int) -> int:
    """Memory that a process and all below it have resident, in KiB."""
    pages = 0
    for one in tree(pid):
        try:
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * PAGE_KIB


class ClientProcess:
    """The process that drives; see `clients`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, load: Answers | Streams, on_ran: Callable[[], None] = lambda: None) -> Seen:
        """Run a load; `on_ran` is called when it has run and nothing was looked at yet."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(load).decode() + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "ran\n":
            raise StartError("the client process has ended")
        on_ran()
        line = process.stdout.readline()
        if not line:
            raise StartError("the client process has ended")
        return msgspec.json.decode(line, type=Seen)


@contextmanager
def client_process(cores: Cores, folder: Path) -> Iterator[ClientProcess]:
    """A process to drive with."""
    command = [sys.executable, "-m", "benchmarks.data_plane.clients"]
    with started(command, cores.others, folder / "clients.log", piped=True) as process:
        yield ClientProcess(process)


@contextmanager
def engine_process(count: int, cores: Cores, folder: Path) -> Iterator[list[int]]:
    """The ports of `count` engines, in one process."""
    command = [sys.executable, "-m", "benchmarks.data_plane.engines", str(count)]
    log = folder / "engines.log"
    with started(command, cores.others, log, piped=True) as process:
        assert process.stdout is not None
        ports = [int(port) for port in process.stdout.readline().split()]
        if len(ports) != count:
            raise StartError(f"the engines did not start:\n{log.read_text()[-1500:]}")
        yield ports


class Watch:
    """The most memory that a process and all below it had, sampled while the block runs. KiB."""

    def __init__(self, pid: int) -> None:
        self.peak_kib = rss_kib(pid)
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.peak_kib = max(self.peak_kib, rss_kib(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
