"""How each adapter was used by this process: what operators see, and what a new version is judged by.

Bounded by the adapters that exist: a name enters with its first request, and leaves with its adapter.
"""

from router.core.job import AdapterRef, AdapterUse
from router.lifecycle.judge import Tally, is_worse

VERSIONS_MAX = 8


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
        self.trials.pop(name, None)
