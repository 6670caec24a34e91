"""One engine worker process: launched, waited for, stopped, and never left behind.

The worker holds the reading end of a pipe that is its standard input, and ends itself and its
engine when that closes (`engine_worker.lifeline`). So whatever ends this process, a `kill -9`
included, ends the worker; there is nothing to clean up that could be forgotten.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from engine_worker.protocol import TOKEN_ENV
from router.config import LLMConfig
from router.workers.client import is_healthy, open_session

POLL_S: Final = 0.1
KILL_GRACE_S: Final = 5.0
TAIL_LINES: Final = 15
TAIL_BYTES: Final = 64 * 1024


class WorkerStartError(Exception):
    """A worker did not come up. The message ends with the last lines of its log."""


def _make_room(log_file: Path) -> None:
    """One start a file, and the one before it is kept."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".log.1"))


class WorkerProcess:
    """A launched worker, listening on a Unix socket that only this user can reach."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        worker_id: str,
        socket: Path,
        log_file: Path,
        token: str,
    ) -> None:
        self._process = process
        self._id = worker_id
        self._token = token
        self.log_file = log_file
        self.address = f"unix:{socket}"

    @classmethod
    async def launch(
        cls,
        llm: LLMConfig,
        worker_id: str,
        *,
        folder: Path,
        log_file: Path,
        token: str,
        drain_timeout_s: float,
        withheld: frozenset[str],
        given: Mapping[str, str],
        limited: bool = False,
    ) -> "WorkerProcess":
        """Start it; `folder` is this run's own, for the socket.

        `withheld` are environment variables that are not its business, `given` are set for it. With
        `limited` it refuses what is beyond `max_ongoing_requests`. Raises `OSError`.
        """
        socket = cls.socket_of(folder, worker_id)
        command = [
            *(sys.executable, "-m", "engine_worker"),
            *("--engine", llm.engine, "--exit-with-stdin", "--uds", str(socket)),
            *("--model", llm.model_loading_config.source, "--model-id", llm.model_id),
            *("--engine-kwargs", json.dumps(llm.engine_arguments())),
            *("--drain-timeout-s", str(drain_timeout_s)),
        ]
        if limited:
            limit = llm.deployment_config.max_ongoing_requests
            command += ["--max-ongoing-requests", str(limit)]
        if llm.calibration:
            command += ["--calibration", llm.calibration]
        _make_room(log_file)
        kept = {name: value for name, value in os.environ.items() if name not in withheld}
        with log_file.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**kept, **given, TOKEN_ENV: token, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal is the router's to handle
            )
        return cls(process, worker_id, socket, log_file, token)

    @staticmethod
    def socket_of(folder: Path, worker_id: str) -> Path:
        """Where a worker listens."""
        return folder / f"{worker_id.replace('/', '-')[-32:]}.sock"

    @property
    def pid(self) -> int:
        """The guardian's process id."""
        return self._process.pid

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when it can serve. Raises `WorkerStartError`."""
        session, url = open_session(self.address, self._token)
        try:
            async with asyncio.timeout(timeout_s):
                while not await is_healthy(session, url):
                    if self._process.returncode is not None:
                        raise WorkerStartError(
                            f"worker {self._id} ended with status {self._process.returncode} "
                            f"before it could serve; the end of {self.log_file}:\n{self.log_tail()}"
                        )
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WorkerStartError(
                f"worker {self._id} was not ready after {timeout_s:g} s (boot_timeout_s); "
                f"the end of {self.log_file}:\n{self.log_tail()}"
            ) from None
        finally:
            await session.close()

    async def wait(self) -> int:
        """Return its exit status when it has ended."""
        return await self._process.wait()

    async def stop(self, timeout_s: float, *, kill: bool = False) -> None:
        """Let it finish what runs, for `timeout_s` at most; then end it, and its engine, at once."""
        if kill:
            self.kill()
        elif self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(timeout_s + KILL_GRACE_S):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        await self.end()

    async def end(self) -> None:
        """End it at once and wait until it has ended; a guardian that is stopped is killed itself."""
        self.kill()
        try:
            async with asyncio.timeout(KILL_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End it at once: its lifeline closes, and the guardian kills the engine's processes."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines that it wrote."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
