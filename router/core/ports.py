"""What the core needs of the outside, as protocols: production and simulation each fill them in."""

from typing import Protocol

from router.core.fleet import Worker
from router.core.job import AdapterRef, Job, LoadError
from router.core.placement import Decision


class Loader(Protocol):
    """Brings adapters to this host, and from there to workers."""

    def staged(self, adapter: AdapterRef) -> bool:
        """Whether the adapter is on this host, so that a load need not fetch it. Must be cheap."""

    async def fetch(self, adapter: AdapterRef) -> None:
        """Bring the adapter to this host. Raises `LoadError`. Bounded in time by its implementer."""

    async def load(self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None) -> int:
        """Make the adapter resident on the worker, then drop `evict` from it; fetch it if need be.

        Returns the number of the worker's state that includes the load (see `Report.seq`).
        Raises `LoadError`, and then nothing has been dropped. Bounded in time by its implementer.
        """

    async def unload(self, worker: Worker, adapter: AdapterRef) -> int:
        """Drop the adapter from the worker; that it is not there is as good.

        Returns the number of the worker's state that has it no more. Raises `LoadError`, and then it
        is there still: `LoadRefusedError` where another router uses it. Bounded in time likewise.
        """


class Observer(Protocol):
    """Is told what the core does, as it does it. Must return at once and must not raise."""

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        """A job was placed; `evicting` is what its load will replace, if it begins one."""

    def waits(self, job: Job, decision: Decision) -> None:
        """A job has to wait; the decision says why."""

    def fetch_ended(self, adapter: AdapterRef, fetch_s: float, error: LoadError | None) -> None:
        """An adapter came to this host, or not, `fetch_s` seconds after it was first wanted."""

    def load_ended(
        self, worker: Worker, adapter: AdapterRef, load_s: float, error: LoadError | None
    ) -> None:
        """A load ended, well or not, `load_s` seconds after its decision."""

    def evicted(self, worker: Worker, adapter: AdapterRef) -> None:
        """An adapter has left a worker for another one."""

    def unload_ended(self, worker: Worker, adapter: AdapterRef, error: LoadError | None) -> None:
        """An adapter that was to leave a worker has left it, or not."""


class NoObserver:
    """Watches nothing."""

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        """Do nothing."""

    def waits(self, job: Job, decision: Decision) -> None:
        """Do nothing."""

    def fetch_ended(self, adapter: AdapterRef, fetch_s: float, error: LoadError | None) -> None:
        """Do nothing."""

    def load_ended(
        self, worker: Worker, adapter: AdapterRef, load_s: float, error: LoadError | None
    ) -> None:
        """Do nothing."""

    def evicted(self, worker: Worker, adapter: AdapterRef) -> None:
        """Do nothing."""

    def unload_ended(self, worker: Worker, adapter: AdapterRef, error: LoadError | None) -> None:
        """Do nothing."""
