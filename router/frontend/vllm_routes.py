"""vLLM's two routes for adapters, meaning the whole fleet: what was scripted for one server goes on.

They answer in vLLM's words and statuses. To load brings an adapter to one worker, and requests spread
it to more; with a `lora_path` that is not the store's, it is served from there from then on. To unload
forgets that place; an adapter of the store leaves the workers, and can be asked for again.
"""

from typing import Any, Final

import msgspec

from router.frontend.admin_routes import Fleet, Route, shown
from router.frontend.errors import ApiError
from router.lifecycle.wire import LoadLoraAdapter, UnloadLoraAdapter
from router.lifecycle.words import AdapterStatus, Lifecycle, LifecycleError, Problem

RETRY_AFTER_S: Final = 5.0
# vLLM's own names for what is wrong.
INVALID: Final = "InvalidUserInput"
STATUS: Final[dict[Problem, tuple[int, str]]] = {
    "unknown": (404, "NotFoundError"),
    "invalid": (400, INVALID),
    "conflict": (400, INVALID),
    "unavailable": (503, "ServiceUnavailableError"),
}


class VllmError(ApiError):
    """An error in vLLM's shape, whose `code` is the status."""

    def body(self) -> bytes:
        """The answer's content."""
        detail = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }
        return msgspec.json.encode({"error": detail})


def in_vllm_shape(error: ApiError) -> ApiError:
    """What was wrong with the request, as vLLM would put it."""
    if isinstance(error, VllmError):
        return error
    return VllmError(error.status, str(error), kind=INVALID, param=error.param)


def _invalid(message: str) -> VllmError:
    return VllmError(400, message, kind=INVALID)


def fault(error: LifecycleError) -> VllmError:
    """An operation could not be done."""
    status, kind = STATUS[error.kind]
    retry_after_s = RETRY_AFTER_S if error.kind == "unavailable" else None
    return VllmError(status, str(error), kind=kind, retry_after_s=retry_after_s)


async def _load(fleet: Fleet, _: str, asked: LoadLoraAdapter) -> str:
    if not asked.lora_name:
        raise _invalid("'lora_name' must be provided.")
    if asked.is_3d_lora_weight:
        raise _invalid("'is_3d_lora_weight' is not supported; adapters are two-dimensional here.")
    lifecycle, name = _named(fleet, asked.lora_name)
    status = lifecycle.show(name)
    if status is not None and status.tier == "gpu" and not asked.load_inplace:
        raise _invalid(
            f"The lora adapter '{shown(asked.lora_name)}' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True."
        )
    if asked.lora_path and (status is None or not _is_there(status, asked.lora_path)):
        await lifecycle.register(name, asked.lora_path)
    elif asked.load_inplace:
        await lifecycle.refresh(name)
    await lifecycle.load(name)
    return f"Success: LoRA adapter '{asked.lora_name}' added successfully."


async def _unload(fleet: Fleet, _: str, asked: UnloadLoraAdapter) -> str:
    if not asked.lora_name:
        raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
    lifecycle, name = _named(fleet, asked.lora_name)
    if lifecycle.show(name) is None:
        raise VllmError(
            404,
            f"The lora adapter '{shown(asked.lora_name)}' cannot be found.",
            kind="NotFoundError",
        )
    try:
        await lifecycle.unregister(name)
    except LifecycleError as error:
        if error.kind != "conflict":
            raise
        await lifecycle.unload(name)  # it is the store's
    return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def _named(fleet: Fleet, lora_name: str) -> tuple[Lifecycle, str]:
    """The adapter that is meant by `name` or `base:name`."""
    lifecycles = list(fleet)
    if any(one.model_id == lora_name for one in lifecycles):
        raise _invalid(f"The lora adapter '{lora_name}' conflicts with a served base model.")
    if ":" in lora_name:
        return fleet.of_adapter(lora_name)
    if len(lifecycles) > 1:
        some = " or ".join(f"'{one.model_id}:{shown(lora_name)}'" for one in lifecycles)
        raise _invalid(f"Several base models are served: 'lora_name' must be {some}.")
    return lifecycles[0], lora_name


def _is_there(status: AdapterStatus, path: str) -> bool:
    """Whether the path is where the adapter is already: its place, or its folder in the store."""
    place = path.rstrip("/")
    source = status.source.rstrip("/")
    return place in {source, f"{source}/{status.name}"}


VLLM_ROUTES: Final[tuple[Route[Any], ...]] = (
    Route(
        "vllm_load_lora_adapter", "POST", "/v1/load_lora_adapter",
        "vLLM's route: serve an adapter, of a place of its own if one is given.",
        LoadLoraAdapter, str, _load, as_vllm=True,
    ),
    Route(
        "vllm_unload_lora_adapter", "POST", "/v1/unload_lora_adapter",
        "vLLM's route: unload an adapter, and forget the place that it was loaded from.",
        UnloadLoraAdapter, str, _unload, as_vllm=True,
    ),
)  # fmt: skip
