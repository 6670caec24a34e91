"""No engine process outlives its router, its guardian, or its own main process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deployment import alive, wait_until

# The "engine": a main process that has started a process of its own, as vLLM does.
ENGINE = """
import os, subprocess, sys, time
from engine_worker.lifeline import guard

def engine():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(os.getpid(), child.pid, flush=True)
    {then}
    return 7

sys.exit(guard(engine, lifeline={lifeline}))
"""
ROOT = Path(__file__).parents[2]


class Guarded:
    def __init__(self, *, then: str = "time.sleep(600)", lifeline: int | None = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE.format(then=then, lifeline=lifeline)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.engine, self.grandchild = map(int, self.process.stdout.readline().split())

    def end(self) -> None:
        for pid in alive([self.process.pid, self.engine, self.grandchild]):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def assert_gone(guarded: Guarded) -> None:
    pids = [guarded.engine, guarded.grandchild]
    wait_until(lambda: not alive(pids), f"{pids} ended", 5)


@pytest.mark.parametrize("what", ["router", "guardian", "engine"])
def test_whatever_is_killed_all_of_it_ends(what: str) -> None:
    guarded = Guarded()
    try:
        if what == "router":
            assert guarded.process.stdin is not None
            guarded.process.stdin.close()  # as the kernel does when the router is killed
        elif what == "guardian":
            guarded.process.kill()
        else:
            os.kill(guarded.engine, signal.SIGKILL)
        assert_gone(guarded)
        expected = -signal.SIGKILL if what == "guardian" else 128 + signal.SIGKILL
        assert guarded.process.wait(5) == expected
    finally:
        guarded.end()


def test_a_stopped_guardian_does_not_keep_the_engine_when_the_router_goes() -> None:
    guarded = Guarded()
    try:
        guarded.process.send_signal(signal.SIGSTOP)
        assert guarded.process.stdin is not None
        guarded.process.stdin.close()
        assert_gone(guarded)
    finally:
        guarded.process.send_signal(signal.SIGCONT)
        guarded.end()


def test_an_engine_that_ends_leaves_nothing_and_its_status_is_kept() -> None:
    guarded = Guarded(then="pass")
    try:
        assert guarded.process.wait(5) == 7
        assert_gone(guarded)
    finally:
        guarded.end()


def test_sigterm_reaches_the_engine() -> None:
    guarded = Guarded(
        then="import signal; signal.sigwait({signal.SIGTERM}); print('drained', flush=True)"
    )
    try:
        assert guarded.process.stdout is not None
        # The signal may come before the engine waits for it; then it ends by it, which is as good.
        guarded.process.terminate()
        assert guarded.process.wait(5) in {7, 128 + signal.SIGTERM}
        assert_gone(guarded)
    finally:
        guarded.end()


def test_without_a_lifeline_standard_input_may_close() -> None:
    guarded = Guarded(lifeline=None)
    try:
        assert guarded.process.stdin is not None
        guarded.process.stdin.close()
        assert alive([guarded.engine]) == [guarded.engine]
        guarded.process.terminate()
        guarded.process.wait(5)
        assert_gone(guarded)
    finally:
        guarded.end()
