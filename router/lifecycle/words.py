"""What is said of adapters to operators, and what operators may ask for: the words of `/admin/v1`."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, Protocol

import msgspec


class Residence(StrEnum):
    """Where on one worker an adapter is."""

    RESIDENT = "resident"
    LOADING = "loading"
    HOST = "host"


class VersionState(StrEnum):
    """What one version of an adapter is to those who ask for its name."""

    SERVING = "serving"
    CANDIDATE = "candidate"
    PREVIOUS = "previous"
    RETIRED = "retired"


class VersionStatus(msgspec.Struct, frozen=True):
    """One version. `weight` is its share of requests, `workers` those that have it."""

    version: str
    state: VersionState
    weight: float
    on_disk: bool
    requests: int
    failures: int
    workers: dict[str, Residence]


class AdapterStatus(msgspec.Struct, frozen=True):
    """One adapter. `version` is the serving one, empty where it was never asked for.

    `tier` is the nearest place that has it: gpu, host, disk or store. `rank` and `bytes` are known of
    what was fetched. `last_used_s` is how many seconds ago. Counts are since the router was started.
    `message` is what went on with it last.
    """

    id: str
    name: str
    version: str
    tier: Literal["gpu", "host", "disk", "store"]
    rank: int | None
    bytes: int | None
    source: str
    pinned: bool
    hits: int
    cold_loads: int
    requests: int
    last_used_s: float | None
    versions: tuple[VersionStatus, ...]
    message: str = ""


class WorkerStatus(msgspec.Struct, frozen=True):
    """One worker. `adapters` are the ids in its slots."""

    id: str
    accepting: bool
    draining: bool
    ongoing: int
    max_ongoing: int
    slots: int
    adapters: tuple[str, ...]


class Change(msgspec.Struct, frozen=True):
    """What an operation did; `workers` says what became of each, where it went to some."""

    id: str
    message: str
    workers: dict[str, str] = {}


Problem = Literal["unknown", "invalid", "conflict", "unavailable"]


class LifecycleError(Exception):
    """An operation cannot be done, and nothing was changed. The message says what to do instead."""

    def __init__(self, kind: Problem, message: str) -> None:
        super().__init__(message)
        self.kind: Problem = kind


class Lifecycle(Protocol):
    """The adapters of one base model, for operators. Everything raises `LifecycleError`."""

    model_id: str

    def list(
        self, prefix: str = "", *, after: str = "", limit: int | None = None
    ) -> Sequence[AdapterStatus]:
        """Those that are listed and begin so, by name: at most `limit`, those after `after`."""

    def show(self, name: str) -> AdapterStatus | None:
        """One of them."""

    async def load(self, name: str, *, workers: int | None = None) -> Change:
        """Bring it to this many workers, 1 unless given, and return when it is there."""

    async def unload(self, name: str) -> Change:
        """Drop it from every worker as soon as nobody uses it there."""

    async def warm(self, name: str) -> Change:
        """Bring it to this host's disk."""

    async def pin(self, name: str, *, pinned: bool) -> Change:
        """Never evict it from where it is or comes to be, or evict it again as any other."""

    async def refresh(self, name: str | None = None) -> Change:
        """Look into the store now."""

    async def rollout(self, name: str, version: str, weight: float) -> Change:
        """Give another version a share of the requests."""

    async def promote(self, name: str, version: str | None = None) -> Change:
        """Have the candidate, or the version that is named, serve all."""

    async def rollback(self, name: str) -> Change:
        """Drop the candidate; without one, go back to the previous version."""

    async def register(self, name: str, source: str) -> Change:
        """Take in an adapter that is in a place of its own, not in the store."""

    async def unregister(self, name: str) -> Change:
        """Forget that place."""

    def workers(self) -> Sequence[WorkerStatus]:
        """All of them."""

    async def drain(self, worker_id: str, *, draining: bool) -> Change:
        """Send a worker nothing new, or send it work again."""
