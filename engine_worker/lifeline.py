"""No engine outlives its router: a guardian process that ends the engine's processes, whatever dies.

vLLM runs its engine in child processes of its own, and they survive a parent that is killed. So the
worker forks at once, before anything heavy is imported: the parent stays a guardian of a few
megabytes, the child becomes the engine in a process group of its own. Then

  - the router is gone (its end of our standard input closes): the guardian kills the group;
  - the engine's main process is gone: the guardian kills what is left of the group and exits alike;
  - the guardian is gone, or is stopped while the router goes: a thread of the child, reading a pipe
    that only the guardian holds open and the router's, kills its own group.

Each of the three needs only the kernel to close a pipe, which it does for a `kill -9` as well.
"""

import contextlib
import os
import select
import selectors
import signal
import threading
from collections.abc import Callable
from typing import Final

FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def guard(main: Callable[[], int], *, lifeline: int | None) -> int:
    """Run `main` in a guarded child process; return its exit status, 128 + n for a signal n.

    `lifeline` is a file descriptor whose end of file means that the router is gone, or None where
    the worker was started by hand. To be called before any thread is started.
    """
    guardian_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(guardian_end[1])
        status = 1
        try:
            _become_engine(guardian_end[0], lifeline)
            status = main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                os.write(2, f"error: {stop.code}\n".encode())
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001  (the status must reach the guardian, whatever it was)
            import traceback  # noqa: PLC0415  (the guardian's memory stays small)

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(guardian_end[0])
    with contextlib.suppress(OSError):  # the child does the same; whoever is first
        os.setpgid(child, child)
    return _watch(child, lifeline)


def _become_engine(guardian: int, lifeline: int | None) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    followed = [guardian]
    if lifeline is not None:
        followed.append(os.dup(lifeline))  # a stopped guardian must not keep the engine alive
    if lifeline == 0:  # the engine has no standard input
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)

    def follow() -> None:
        while True:
            ready, _, _ = select.select(followed, (), ())
            if any(not os.read(end, 64) for end in ready):
                os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, name="lifeline", daemon=True).start()


def _watch(child: int, lifeline: int | None) -> int:
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(wake_read, selectors.EVENT_READ)
        if lifeline is not None:
            selector.register(lifeline, selectors.EVENT_READ)
        while True:
            if (status := _reaped(child)) is not None:
                _kill_group(child)
                return status
            for key, _ in selector.select():
                data = os.read(key.fd, 64)
                if key.fd != wake_read:
                    if not data:
                        _kill_group(child)
                        selector.unregister(key.fd)
                    continue
                for number in FORWARDED:
                    if number in data:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(child, signal.SIGTERM)


def _reaped(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
