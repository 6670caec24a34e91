"""What operators may ask for, as one table: the routes are made of it, and so is the OpenAPI document.

A path is written as OpenAPI writes it. What a route takes is one struct, of the body of a POST and of
the query of a GET; what it answers is another. An adapter is named `base:name`, and so the base model
that it is of.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from router.lifecycle.wire import (
    PAGE_DEFAULT,
    PAGE_MAX,
    TEXT_MAX,
    AdapterPage,
    Changes,
    Load,
    ModelWorkers,
    Nothing,
    Promote,
    Refresh,
    Rollout,
    WorkerList,
)
from router.lifecycle.words import AdapterStatus, Change, Lifecycle, LifecycleError

SHOWN_MAX: Final = 256
ROOT: Final = "/admin/v1"
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Taken = TypeVar("Taken", bound=msgspec.Struct)


class WhichAdapters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those of one base model, or of all; by the beginning of their names, a page at a time.

    `after` is what the page before said.
    """

    model: Text = ""
    prefix: Text = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = PAGE_DEFAULT
    after: Text = ""


class WhichWorkers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those of one base model, or of all."""

    model: Text = ""


class Fleet:
    """The lifecycles of all base models, by their ids. Everything raises `LifecycleError`."""

    def __init__(self, lifecycles: Sequence[Lifecycle]) -> None:
        self._by_model = {lifecycle.model_id: lifecycle for lifecycle in lifecycles}

    def __iter__(self) -> Iterator[Lifecycle]:
        return iter(self._by_model.values())

    def of_model(self, model_id: str) -> Sequence[Lifecycle]:
        """One base model's, or all where none is named."""
        if not model_id:
            return list(self)
        found = self._by_model.get(model_id)
        if found is None:
            served = ", ".join(self._by_model)
            raise LifecycleError("unknown", f"no base model `{shown(model_id)}`; served: {served}")
        return [found]

    def of_adapter(self, adapter_id: str) -> tuple[Lifecycle, str]:
        """The lifecycle and the name of an adapter, which need not exist."""
        model_id, colon, name = adapter_id.partition(":")
        if not (model_id and colon and name):
            raise LifecycleError(
                "unknown",
                f"`{shown(adapter_id)}` is no adapter's id; write BASE:NAME, as the listing does",
            )
        (lifecycle,) = self.of_model(model_id)
        return lifecycle, name

    def of_worker(self, worker_id: str) -> Lifecycle:
        """Whose worker it is."""
        known = []
        for lifecycle in self:
            ids = [worker.id for worker in lifecycle.workers()]
            if worker_id in ids:
                return lifecycle
            known += ids
        raise LifecycleError(
            "unknown", f"no worker `{shown(worker_id)}`; there are: {', '.join(known) or 'none'}"
        )


@dataclass(frozen=True)
class Route(Generic[Taken]):
    """One thing to ask for. `act` gets the fleet, the id in the path, and what was sent."""

    name: str
    method: str
    path: str
    summary: str
    takes: type[Taken]
    answers: type
    act: Callable[[Fleet, str, Taken], Awaitable[Any]]
    as_vllm: bool = False

    @property
    def changes(self) -> bool:
        """Whether it may change anything; whatever does is logged."""
        return self.method == "POST"


def shown(text: str) -> str:
    """A name as an error message repeats it."""
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."


async def _list(fleet: Fleet, _: str, which: WhichAdapters) -> AdapterPage:
    last_model, _, last_name = which.after.partition(":")
    found: list[AdapterStatus] = []
    for lifecycle in sorted(fleet.of_model(which.model), key=lambda one: one.model_id):
        if lifecycle.model_id < last_model:
            continue
        after = last_name if lifecycle.model_id == last_model else ""
        # One more than fits says whether there is a next page.
        room = which.limit + 1 - len(found)
        found += lifecycle.list(which.prefix, after=after, limit=room)
        if len(found) > which.limit:
            page = tuple(found[: which.limit])
            return AdapterPage(page, page[-1].id)
    return AdapterPage(tuple(found))


async def _show(fleet: Fleet, adapter_id: str, _: Nothing) -> AdapterStatus:
    lifecycle, name = fleet.of_adapter(adapter_id)
    status = lifecycle.show(name)
    if status is None:
        raise LifecycleError(
            "unknown", f"no adapter `{shown(adapter_id)}`; the listing has those that there are"
        )
    return status


async def _load(fleet: Fleet, adapter_id: str, what: Load) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.load(name, workers=what.workers)


async def _unload(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.unload(name)


async def _warm(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.warm(name)


async def _pin(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.pin(name, pinned=True)


async def _unpin(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.pin(name, pinned=False)


async def _refresh(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.refresh(name)


async def _refresh_all(fleet: Fleet, _: str, which: Refresh) -> Changes:
    return Changes(tuple([await one.refresh() for one in fleet.of_model(which.model or "")]))


async def _rollout(fleet: Fleet, adapter_id: str, what: Rollout) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.rollout(name, what.version, what.weight)


async def _promote(fleet: Fleet, adapter_id: str, what: Promote) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.promote(name, what.version)


async def _rollback(fleet: Fleet, adapter_id: str, _: Nothing) -> Change:
    lifecycle, name = fleet.of_adapter(adapter_id)
    return await lifecycle.rollback(name)


async def _workers(fleet: Fleet, _: str, which: WhichWorkers) -> WorkerList:
    return WorkerList(
        tuple(
            ModelWorkers(one.model_id, tuple(one.workers())) for one in fleet.of_model(which.model)
        )
    )


async def _drain(fleet: Fleet, worker_id: str, _: Nothing) -> Change:
    return await fleet.of_worker(worker_id).drain(worker_id, draining=True)


async def _undrain(fleet: Fleet, worker_id: str, _: Nothing) -> Change:
    return await fleet.of_worker(worker_id).drain(worker_id, draining=False)


ADAPTER: Final = f"{ROOT}/adapters/{{id}}"
WORKER: Final = f"{ROOT}/workers/{{id}}"
ROUTES: Final[tuple[Route[Any], ...]] = (
    Route(
        "list_adapters", "GET", f"{ROOT}/adapters",
        "The adapters that there are, by base model and name.",
        WhichAdapters, AdapterPage, _list,
    ),
    Route("show_adapter", "GET", ADAPTER, "One adapter.", Nothing, AdapterStatus, _show),
    Route(
        "load_adapter", "POST", f"{ADAPTER}/load",
        "Bring an adapter to so many workers, and answer when it is there.", Load, Change, _load,
    ),
    Route(
        "unload_adapter", "POST", f"{ADAPTER}/unload",
        "Drop an adapter from every worker as soon as nobody uses it there.",
        Nothing, Change, _unload,
    ),
    Route(
        "warm_adapter", "POST", f"{ADAPTER}/warm",
        "Bring an adapter to the router's disk.", Nothing, Change, _warm,
    ),
    Route(
        "pin_adapter", "POST", f"{ADAPTER}/pin",
        "Never evict an adapter from where it is or comes to be.", Nothing, Change, _pin,
    ),
    Route(
        "unpin_adapter", "POST", f"{ADAPTER}/unpin",
        "Evict an adapter again as any other.", Nothing, Change, _unpin,
    ),
    Route(
        "refresh_adapter", "POST", f"{ADAPTER}/refresh",
        "Look for an adapter in the store now, and follow what is new.", Nothing, Change, _refresh,
    ),
    Route(
        "roll_out_version", "POST", f"{ADAPTER}/rollout",
        "Give another version of an adapter a share of its requests.", Rollout, Change, _rollout,
    ),
    Route(
        "promote_version", "POST", f"{ADAPTER}/promote",
        "Have the candidate, or the version that is named, serve all requests.",
        Promote, Change, _promote,
    ),
    Route(
        "roll_back", "POST", f"{ADAPTER}/rollback",
        "Drop the candidate; without one, go back to the previous version.",
        Nothing, Change, _rollback,
    ),
    Route(
        "refresh", "POST", f"{ROOT}/refresh",
        "Read the stores' listings now.", Refresh, Changes, _refresh_all,
    ),
    Route(
        "list_workers", "GET", f"{ROOT}/workers", "All workers, by base model.",
        WhichWorkers, WorkerList, _workers,
    ),
    Route(
        "drain_worker", "POST", f"{WORKER}/drain",
        "Send a worker nothing new.", Nothing, Change, _drain,
    ),
    Route(
        "undrain_worker", "POST", f"{WORKER}/undrain",
        "Send a worker work again.", Nothing, Change, _undrain,
    ),
)  # fmt: skip
