"""Drive a SimPy environment by a real event loop's clock: the second driver of the engine model.

Virtual time follows `loop.time()`: what is due is run when it is due, or at once where the loop
comes late. Whoever changes the model from outside calls `catch_up` first and `arm` after, so that
the change happens at the virtual time that it happened at.
"""

import asyncio

from sim.environment import Environment


class Pacer:
    """Runs `env` in step with the running loop's clock, from the moment it is made."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self._loop = asyncio.get_running_loop()
        self._origin = self._loop.time() - float(env.now)
        self._timer: asyncio.TimerHandle | None = None

    def catch_up(self) -> None:
        """Let everything happen that is due by now."""
        now = self._loop.time() - self._origin
        if now > self.env.now:
            self.env.run(until=now)

    def arm(self) -> None:
        """Wake when the next event is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.env.peek()
        if due != float("inf"):
            self._timer = self._loop.call_at(self._origin + due, self._wake)

    def _wake(self) -> None:
        self._timer = None
        try:
            # A due event is not run by `run(until=...)` of exactly its own time.
            while self.env.peek() <= self._loop.time() - self._origin:
                self.env.step()
        finally:
            self.arm()

    def close(self) -> None:
        """Stop waking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
