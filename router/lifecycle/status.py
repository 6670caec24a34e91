"""What operators are told of adapters and workers: put together from all who know a part of it."""

from collections.abc import Iterable
from typing import Literal

from router.core.fleet import Worker
from router.core.job import AdapterRef
from router.core.residency import RESIDENT
from router.lifecycle.adapters import Adapters
from router.lifecycle.usage import UsageRecord
from router.lifecycle.words import (
    AdapterStatus,
    Residence,
    VersionState,
    VersionStatus,
    WorkerStatus,
)

Tier = Literal["gpu", "host", "disk", "store"]
Places = dict[str, dict[str, dict[str, Residence]]]


def places_of(workers: Iterable[Worker]) -> Places:
    """Where adapters are: by name, by version, by worker."""
    places: Places = {}
    for worker in workers:
        for adapter in worker.host:
            _note(places, adapter, worker, Residence.HOST)
        for slot in worker.slots:
            there = Residence.RESIDENT if slot.phase is RESIDENT else Residence.LOADING
            _note(places, slot.adapter, worker, there)
    return places


def _note(places: Places, adapter: AdapterRef, worker: Worker, there: Residence) -> None:
    versions = places.setdefault(adapter.name, {})
    versions.setdefault(adapter.version, {})[worker.id] = there


def adapter_status(
    adapters: Adapters,
    name: str,
    places: Places,
    usage: UsageRecord,
    now: float,
) -> AdapterStatus:
    """One adapter's; `places` are those of all. `now` and the usage are in seconds since the epoch."""
    alias = adapters.names.alias(name)
    listed = adapters.catalog.get(name)
    where = places.get(name, {})
    version = _serving(adapters, name, where)
    stored = adapters.stored(AdapterRef(adapters.model_id, name, version)) if version else None
    on_disk = bool(version) and adapters.cache.find(name, version) is not None
    facts = adapters.cache.facts(stored) if stored is not None else None
    size = sum(file.size for file in listed.files) if listed is not None else None
    return AdapterStatus(
        id=adapters.names.id(name),
        name=name,
        version=version,
        tier=_tier(where.get(version, {}).values(), on_disk=on_disk),
        rank=facts.rank if facts else None,
        bytes=facts.bytes if facts else size,
        source=alias.source or adapters.store_url,
        pinned=adapters.presence.is_pinned(name),
        hits=usage.hits,
        cold_loads=usage.cold_loads,
        requests=usage.requests,
        last_used_s=max(0.0, now - usage.last_used_at) if usage.last_used_at else None,
        versions=tuple(_versions(adapters, name, version, usage, where)),
        message=alias.message,
    )


def _serving(adapters: Adapters, name: str, where: dict[str, dict[str, Residence]]) -> str:
    """The version that serves; where this process was not asked for it, the one that workers have."""
    serving = adapters.names.serving(name)
    decided = serving.version if serving is not None else adapters.names.alias(name).serving
    if decided or where:
        return decided or next(iter(where))
    listed = adapters.catalog.get(name)
    return listed.version if listed is not None else ""


def _versions(
    adapters: Adapters,
    name: str,
    serving: str,
    usage: UsageRecord,
    where: dict[str, dict[str, Residence]],
) -> Iterable[VersionStatus]:
    alias = adapters.names.alias(name)
    states = dict.fromkeys(where, VersionState.RETIRED)
    for version, state in (
        (alias.previous, VersionState.PREVIOUS),
        (alias.candidate, VersionState.CANDIDATE),
        (serving, VersionState.SERVING),
    ):
        if version:
            states[version] = state
    weights = {serving: 1.0 - alias.weight, alias.candidate: alias.weight}
    order = list(VersionState)
    for version in sorted(states, key=lambda one: (order.index(states[one]), one)):
        requests, failures = usage.versions.get(version, (0, 0))
        yield VersionStatus(
            version=version,
            state=states[version],
            weight=weights.get(version, 0.0),
            on_disk=adapters.cache.find(name, version) is not None,
            requests=requests,
            failures=failures,
            workers=where.get(version, {}),
        )


def _tier(residences: Iterable[Residence], *, on_disk: bool) -> Tier:
    found = set(residences)
    if found - {Residence.HOST}:
        return "gpu"
    if found:
        return "host"
    return "disk" if on_disk else "store"


def worker_status(worker: Worker, *, draining: bool) -> WorkerStatus:
    """One worker's."""
    return WorkerStatus(
        id=worker.id,
        accepting=worker.accepting,
        draining=draining,
        ongoing=worker.ongoing,
        max_ongoing=worker.max_ongoing,
        slots=worker.slots.capacity,
        adapters=tuple(sorted(slot.adapter.model_id for slot in worker.slots)),
    )
