"""What the names of a model's adapters mean in this process: which version a request gets.

A name means what its alias says, and without one the version that it was first asked for here. Whenever
that changes, the core is told: a version that serves no more is retired, one that serves is restored.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from router.core.job import AdapterRef
from router.core.router import Router
from router.lifecycle.alias import Alias
from router.lifecycle.share import Share
from router.lifecycle.usage import Usages

NO_ALIAS = Alias()


class Names:
    """Names of one model. To be made inside a running loop; `routed` before anything serves."""

    def __init__(self, model_id: str, usages: Usages) -> None:
        self.model_id = model_id
        self._usages = usages
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._router: Router | None = None
        self._aliases: dict[str, Alias] = {}
        self._serving: dict[str, AdapterRef] = {}
        self._shares: dict[str, Share] = {}

    def routed(self, router: Router) -> None:
        """This is who is to be told."""
        self._router = router

    @property
    def router(self) -> Router:
        """Who routes to what they mean."""
        assert self._router is not None, "not started"
        return self._router

    def __iter__(self) -> Iterator[str]:
        """Those that serve."""
        return iter(tuple(self._serving))

    def __contains__(self, name: str) -> bool:
        return name in self._serving

    def ref(self, name: str, version: str) -> AdapterRef:
        """A version of an adapter."""
        return AdapterRef(self.model_id, name, version)

    def id(self, name: str) -> str:
        """The id that clients ask for."""
        return f"{self.model_id}:{name}"

    def alias(self, name: str) -> Alias:
        """What was decided of a name."""
        return self._aliases.get(name, NO_ALIAS)

    @property
    def aliases(self) -> Mapping[str, Alias]:
        """All that was decided."""
        return self._aliases

    def pinned(self) -> dict[str, None]:
        """The names that operators have pinned."""
        return {name: None for name, alias in self._aliases.items() if alias.pinned}

    def serving(self, name: str) -> AdapterRef | None:
        """The version that serves."""
        return self._serving.get(name)

    def named(self, name: str, user: str) -> AdapterRef | None:
        """What a name means to a user; None where it has not been asked for yet."""
        if self._shares and (share := self._shares.get(name)) is not None and share.takes(user):
            return share.candidate
        return self._serving.get(name)

    def serve(self, name: str, version: str) -> None:
        """A name means a version from now on."""
        before = self._serving.get(name)
        if before is not None and before.version == version:
            return
        now = self._serving[name] = self.ref(name, version)
        self.router.restore(now)
        if before is not None and before.version not in self.alias(name).versions:
            self.router.retire(before)

    def unserve(self, name: str) -> None:
        """A name means nothing any more."""
        share = self._shares.pop(name, None)
        for adapter in (self._serving.pop(name, None), share.candidate if share else None):
            if adapter is not None:
                self.router.retire(adapter)
        self._usages.forget(name)

    def take_in(self, aliases: Mapping[str, Alias]) -> None:
        """This was decided."""
        for name, alias in aliases.items():
            before = self.alias(name)
            if alias.says_nothing:
                self._aliases.pop(name, None)
            else:
                self._aliases[name] = alias
            self._apply(name, before, alias)

    def _apply(self, name: str, before: Alias, alias: Alias) -> None:
        router = self.router
        served = self._serving.get(name)
        # Of a name that nothing was decided of the first to follow is on trial too.
        was = before.serving or (served.version if served is not None else "")
        for version in alias.versions:
            router.restore(self.ref(name, version))
        if alias.serving:
            self.serve(name, alias.serving)
        if alias.candidate and alias.weight:
            self._shares[name] = Share(self.ref(name, alias.candidate), alias.weight)
        else:
            self._shares.pop(name, None)
        for version in before.versions:
            if version not in alias.versions:
                router.retire(self.ref(name, version))
        self._put_on_trial(name, was, alias)

    def _put_on_trial(self, name: str, was: str, alias: Alias) -> None:
        trials = self._usages.trials
        if alias.candidate and alias.weight:
            self._usages.try_out(name, alias.candidate, self._now())
        elif alias.previous and was and alias.serving != was:
            self._usages.settle(name)  # as a candidate, if it was one: now it is to serve all
            self._usages.try_out(name, alias.serving, self._now())
        elif (trial := trials.get(name)) is not None and trial.version not in alias.versions:
            self._usages.settle(name)
