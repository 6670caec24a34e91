"""How each adapter was used by this process: what operators see, and what a new version is judged by.

Bounded by the adapters that exist: a name enters with its first request, and leaves with its adapter.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from router.core.job import AdapterRef, AdapterUse
from router.lifecycle.judge import Tally, is_worse

VERSIONS_MAX: Final = 8


class UsageRecord(msgspec.Struct, frozen=True, array_like=True):
    """One adapter's requests as told to other processes. Versions have requests and failures.

    `last_used_at` is in seconds since the epoch, 0 for never.
    """

    requests: int = 0
    hits: int = 0
    cold_loads: int = 0
    last_used_at: float = 0.0
    versions: dict[str, tuple[int, int]] = {}


def together(records: Iterable[UsageRecord]) -> UsageRecord:
    """What several processes have seen of one adapter."""
    requests = hits = cold_loads = 0
    last_used_at = 0.0
    versions: dict[str, tuple[int, int]] = {}
    for one in records:
        requests += one.requests
        hits += one.hits
        cold_loads += one.cold_loads
        last_used_at = max(last_used_at, one.last_used_at)
        for version, (count, failures) in one.versions.items():
            before = versions.get(version, (0, 0))
            versions[version] = (before[0] + count, before[1] + failures)
    return UsageRecord(requests, hits, cold_loads, last_used_at, versions)


class Usage:
    """One adapter's requests. `last_used_at` is the loop's time, None before the first."""

    __slots__ = ("cold_loads", "hits", "last_used_at", "requests", "versions")

    def __init__(self) -> None:
        self.requests = 0
        self.hits = 0
        self.cold_loads = 0
        self.last_used_at: float | None = None
        self.versions: dict[str, Tally] = {}

    def add(self, version: str, use: AdapterUse | None, *, failed: bool, now: float) -> None:
        """Count a request that ended; `use` is None where it was placed on no worker."""
        self.requests += 1
        self.hits += use is AdapterUse.HIT
        self.cold_loads += use is AdapterUse.COLD
        self.last_used_at = now
        tally = self.versions.get(version)
        if tally is None:
            if len(self.versions) >= VERSIONS_MAX:
                del self.versions[next(iter(self.versions))]
            tally = self.versions[version] = Tally()
        tally.add(failed=failed)

    def record(self, ago: float) -> UsageRecord:
        """The same for other processes. `ago` is how much later the epoch's time is than the loop's."""
        last = 0.0 if self.last_used_at is None else self.last_used_at + ago
        versions = {name: (one.requests, one.failures) for name, one in self.versions.items()}
        return UsageRecord(self.requests, self.hits, self.cold_loads, last, versions)


class Trial:
    """A new version on trial since `began`, beside everything else that is served."""

    __slots__ = ("_before", "_total", "began", "new", "version")

    def __init__(self, version: str, began: float, total: Tally) -> None:
        self.version = version
        self.began = began
        self.new = Tally()
        self._total = total
        self._before = (total.requests, total.failures)

    @property
    def failed(self) -> bool:
        """Whether it is worse than the rest."""
        rest = Tally()
        rest.requests = self._total.requests - self._before[0] - self.new.requests
        rest.failures = self._total.failures - self._before[1] - self.new.failures
        return is_worse(self.new, rest)


class Usages:
    """All adapters of one model, and the trials that are under way."""

    def __init__(self) -> None:
        self.by_name: dict[str, Usage] = {}
        self.trials: dict[str, Trial] = {}
        self.changed: dict[str, None] = {}  # since whoever tells others of it has emptied it
        self._total = Tally()

    def ended(
        self, adapter: AdapterRef | None, use: AdapterUse | None, *, failed: bool, now: float
    ) -> Trial | None:
        """Count a request. Returns the trial that its version has now lost, if it has."""
        self._total.add(failed=failed)
        if adapter is None:
            return None
        usage = self.by_name.get(adapter.name)
        if usage is None:
            usage = self.by_name[adapter.name] = Usage()
        usage.add(adapter.version, use, failed=failed, now=now)
        self.changed[adapter.name] = None
        trial = self.trials.get(adapter.name)
        if trial is None or trial.version != adapter.version:
            return None
        trial.new.add(failed=failed)
        return trial if failed and trial.failed else None

    def try_out(self, name: str, version: str, now: float) -> None:
        """Put a version on trial, unless it is."""
        trial = self.trials.get(name)
        if trial is None or trial.version != version:
            self.trials[name] = Trial(version, now, self._total)

    def settle(self, name: str) -> None:
        """Its trial is over."""
        self.trials.pop(name, None)

    def forget(self, name: str) -> None:
        """The adapter is gone."""
        self.by_name.pop(name, None)
        self.changed.pop(name, None)
        self.trials.pop(name, None)
