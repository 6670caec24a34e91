"""One engine among several routers: who may enter, who may load, and what each is told of the others.

A router decides by what it knows, and of other routers it knows what was true a moment ago. Here all of
it meets, so here three bounds are kept, and what would break one is refused by name before any work is
done, leaving everything as it was:
  1. no more requests are in flight than the worker was started with, whichever routers they come from;
  2. there are no more adapters than slots, those on their way counted in;
  3. what another router uses, or has just loaded for a request that is not here yet, is neither evicted
     nor unloaded; who has waited too long has it closed to new requests, and evicts it when those here
     are over.
A router's own adapters are its own affair: it counts its requests before they are here.
Pure: it counts, and reads the clock that it is given. Whoever waits is in service.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from engine_worker.protocol import AdapterId, Occupancy, Refusal

# How long what was loaded waits for the request that it was loaded for.
CLAIM_S: Final = 1.0
LOADS_NAMED_MAX: Final = 4096  # adapters whose loads are counted by name
OTHER: Final = "other"


class RefusedError(Exception):
    """One of the bounds would be broken. Nothing has changed."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


class Arbiter:
    """The counts of one worker. `slots` is how many adapters it holds; `max_ongoing` 0 for no limit."""

    def __init__(self, slots: int, max_ongoing: int, now: Callable[[], float]) -> None:
        self._slots = slots
        self._max_ongoing = max_ongoing
        self._now = now
        self._held: dict[AdapterId, str] = {}  # with the folder that each came from
        self._coming: dict[AdapterId, str] = {}  # with the router that loads it
        self._leaving: dict[AdapterId, None] = {}  # for a successor, which has their slot
        self._unloading: dict[AdapterId, None] = {}  # for none: their slot is not free yet
        self._requests: dict[str, int] = {}  # by router
        self._users: dict[AdapterId, dict[str, int]] = {}
        self._claims: dict[AdapterId, dict[str, float]] = {}
        self._ongoing = 0
        self._ongoing_peak = 0
        self._loads: dict[str, int] = {}
        self._refused = dict.fromkeys(Refusal, 0)

    # Requests.

    def enter(self, router: str, adapter: AdapterId | None) -> None:
        """Count a request in. Raises `RefusedError`."""
        if self._max_ongoing and self._ongoing >= self._max_ongoing:
            raise self._refuse(
                Refusal.FULL, f"{self._ongoing} requests are in flight, as many as may be"
            )
        if adapter is not None:
            if not self.holds(adapter) and adapter not in self._coming:
                raise self._refuse(Refusal.ADAPTER_GONE, f"{adapter.name} is not held here")
            users = self._users.setdefault(adapter, {})
            users[router] = users.get(router, 0) + 1
            self._unclaim(adapter, router)
        self._requests[router] = self._requests.get(router, 0) + 1
        self._ongoing += 1
        self._ongoing_peak = max(self._ongoing_peak, self._ongoing)

    def leave(self, router: str, adapter: AdapterId | None) -> None:
        """Count it out."""
        self._ongoing -= 1
        _one_less(self._requests, router)
        if adapter is not None:
            _one_less(self._users[adapter], router)
            if not self._users[adapter]:
                del self._users[adapter]

    def holds(self, adapter: AdapterId) -> bool:
        """Whether the adapter is held, and not about to leave."""
        return (
            adapter in self._held
            and adapter not in self._leaving
            and adapter not in self._unloading
        )

    def gone(self, adapter: AdapterId) -> RefusedError:
        """The refusal for a request that waited for a load which failed."""
        return self._refuse(Refusal.ADAPTER_GONE, f"the load of {adapter.name} failed")

    def kept(self, adapter: AdapterId) -> RefusedError:
        """The refusal for a load whose victim was used for too long."""
        message = f"no slot for {adapter.name}: what was to leave for it is still in use"
        return self._refuse(Refusal.NO_SLOT, message)

    # Loads.

    def has_loaded(self, adapter: AdapterId, path: str) -> bool:
        """Whether the adapter is held already, from that folder, so that there is nothing to load."""
        return self.holds(adapter) and self._held[adapter] == path

    def begin_load(
        self, router: str, adapter: AdapterId, evict: Sequence[AdapterId], *, drain: bool = False
    ) -> tuple[AdapterId, ...]:
        """Promise the adapter a slot; returns who leaves for it. Raises `RefusedError`.

        One of `evict` that is not held, leaves already or is another router's stays out of it, and the
        load is refused only where a slot is lacking without it. With `drain` another router's leaves
        too, once `used` says that nobody has a request for it any more.
        """
        if adapter in self._leaving:
            raise self._refuse(Refusal.NO_SLOT, f"{adapter.name} is about to leave for another")
        leaves = tuple(
            victim
            for victim in evict
            if victim != adapter
            and self.holds(victim)
            and (drain or not self.used_beside(router, victim))
        )
        taken = len(self._held) + len(self._coming) - len(self._leaving)
        if adapter not in self._held and taken + 1 - len(leaves) > self._slots:
            raise self._refuse(
                Refusal.NO_SLOT, f"no slot for {adapter.name}: {taken} of {self._slots} are taken"
            )
        if adapter not in self._held:
            self._coming[adapter] = router
        self._leaving.update(dict.fromkeys(leaves))
        return leaves

    def end_load(
        self, adapter: AdapterId, path: str, leaves: Iterable[AdapterId], *, loaded: bool
    ) -> None:
        """The load has ended; where it failed, nobody has left."""
        self._coming.pop(adapter, None)
        for victim in leaves:
            self._leaving.pop(victim, None)
            if loaded:
                self._held.pop(victim, None)
                self._claims.pop(victim, None)
        if loaded:
            self._held[adapter] = path
            named = adapter.name in self._loads or len(self._loads) < LOADS_NAMED_MAX
            name = adapter.name if named else OTHER
            self._loads[name] = self._loads.get(name, 0) + 1

    def used(self, adapters: Iterable[AdapterId]) -> bool:
        """Whether a request for one of them is in flight."""
        return any(adapter in self._users for adapter in adapters)

    def claim(self, router: str, adapter: AdapterId) -> None:
        """The router was told that its load is done: its request is on the way."""
        self._claims.setdefault(adapter, {})[router] = self._now() + CLAIM_S

    def _unclaim(self, adapter: AdapterId, router: str) -> None:
        claims = self._claims.get(adapter)
        if claims is not None:
            claims.pop(router, None)
            if not claims:
                del self._claims[adapter]

    # Unloads.

    def begin_unload(self, router: str, adapter: AdapterId) -> None:
        """Let nobody enter for the adapter, which is about to leave. Raises `RefusedError`."""
        if self.used_beside(router, adapter):
            raise self._refuse(Refusal.IN_USE, f"{adapter.name} is in use by another router")
        self._unloading[adapter] = None

    def used_still(self, adapter: AdapterId) -> RefusedError:
        """The refusal for an unload that waited for too long until nobody used it."""
        return self._refuse(Refusal.IN_USE, f"{adapter.name} is still in use")

    def end_unload(self, adapter: AdapterId, *, unloaded: bool) -> None:
        """It has left, or it has not and may be used again."""
        self._unloading.pop(adapter, None)
        if unloaded:
            self.drop((adapter,))

    def drop(self, adapters: Iterable[AdapterId]) -> None:
        """They are not held any more."""
        for adapter in adapters:
            self._held.pop(adapter, None)
            self._claims.pop(adapter, None)

    # What a router is told.

    @property
    def held(self) -> tuple[AdapterId, ...]:
        """Who is held."""
        return tuple(self._held)

    @property
    def coming(self) -> tuple[AdapterId, ...]:
        """Who is on the way."""
        return tuple(self._coming)

    @property
    def leaving(self) -> tuple[AdapterId, ...]:
        """Who leaves: when its successor has come, or when the engine has dropped it."""
        return (*self._leaving, *self._unloading)

    def others(self, router: str) -> int:
        """How many requests of other routers are in flight."""
        return self._ongoing - self._requests.get(router, 0)

    def used_beside(self, router: str, adapter: AdapterId) -> bool:
        """Whether another router uses the adapter, loads it, or has just loaded it for a request."""
        if self._coming.get(adapter, router) != router:
            return True
        users = self._users.get(adapter)
        if users is not None and (len(users) > 1 or router not in users):
            return True
        claims = self._claims.get(adapter)
        if claims is None:
            return False
        now = self._now()
        return any(until > now for other, until in claims.items() if other != router)

    def used_by_others(self, router: str) -> tuple[AdapterId, ...]:
        """The adapters for which that is so."""
        candidates = dict.fromkeys((*self._users, *self._coming, *self._claims))
        return tuple(adapter for adapter in candidates if self.used_beside(router, adapter))

    def occupancy(self) -> Occupancy:
        """All counts, for whoever looks from outside."""
        return Occupancy(
            max_ongoing=self._max_ongoing,
            ongoing=self._ongoing,
            ongoing_peak=self._ongoing_peak,
            routers=len(self._requests),
            loads=dict(self._loads),
            refused={refusal.value: count for refusal, count in self._refused.items()},
        )

    def _refuse(self, refusal: Refusal, message: str) -> RefusedError:
        self._refused[refusal] += 1
        return RefusedError(refusal, message)


def _one_less(counts: dict[str, int], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
