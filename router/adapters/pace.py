"""How long a transfer may go on, and how fast all of them together may go.

A deadline is a moment of the monotonic clock, so that what waits for the network, for a pause or for
its share of the bandwidth waits for the same moment. The bandwidth is one bucket of tokens for a
process: who takes more than there is waits for as long as the debt lasts, in order of coming.
"""

import threading
import time
from concurrent.futures import Future
from typing import Final

from router.adapters.store import StoreError

MIB: Final = 2**20
BURST_S: Final = 0.25


class TooLateError(StoreError):
    """The deadline has passed, or would before the next thing that could help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=False)


class Deadline:
    """The end of a transfer: `seconds` from now, or when it is given up before."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds
        # A future, so that one wait can be for this and for the parts of a transfer.
        self.given_up: Future[None] = Future()

    @property
    def left_s(self) -> float:
        """The time that is left, in seconds; 0 once it has passed."""
        return max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether it has passed, or was given up."""
        return self.given_up.done() or not self.left_s

    def give_up(self) -> None:
        """Nobody waits for the transfer any more: end it now."""
        if not self.given_up.done():
            self.given_up.set_result(None)

    def check(self) -> None:
        """Raise `TooLateError` if it has passed."""
        if self.passed:
            raise self.error()

    def error(self, why: str = "") -> TooLateError:
        """The error for what did not come in time."""
        return TooLateError(
            f"not here after {self._seconds:g} s (download_timeout_s){f': {why}' if why else ''}"
        )


class Bandwidth:
    """Tokens for bytes; `mib_per_s` None has no limit."""

    def __init__(self, mib_per_s: float | None = None) -> None:
        self._bytes_per_s = mib_per_s * MIB if mib_per_s is not None else None
        self._paid_until = 0.0
        self._lock = threading.Lock()

    def take(self, size: int) -> float:
        """Take tokens for `size` bytes; returns the seconds to wait before their next use."""
        if self._bytes_per_s is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            # What was not used is saved up, for a short while only.
            self._paid_until = max(self._paid_until, now - BURST_S) + size / self._bytes_per_s
            return max(0.0, self._paid_until - now)
