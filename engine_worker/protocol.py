"""What a router and an engine worker say to each other: JSON over HTTP, in these structs.

Beside the engine's own OpenAI routes a worker serves, for whoever carries its token:

    GET  /worker/v1/info      Info: what engine this is and how many adapters it holds
    GET  /worker/v1/state     State, one JSON line at every change, and every 50 ms while busy
    GET  /worker/v1/adapters  State, once
    GET  /worker/v1/occupancy Occupancy: what it has counted of all its routers
    POST /worker/v1/load      LoadRequest -> LoadReply; idempotent, several at once
    POST /worker/v1/unload    UnloadRequest -> LoadReply; idempotent; not while another router uses it
    GET  /health              200 when the engine can serve; needs no token

An error is `{"error": {"message", "type", "code"}}`: 400 where the adapter is at fault, 500 where the
engine is. What the worker refuses because of other routers has a `Refusal` as its code: a load or an
unload is then 409, with the `state` to decide again by; an OpenAI request is 503, with that name in a
header too.
Several routers may use one worker. Each names itself in a header of everything that it sends, and hears
in `State` of the others alone.
"""

from enum import StrEnum
from typing import Final

import msgspec

PROTOCOL: Final = 1
PREFIX: Final = "/worker/v1"
INFO: Final = f"{PREFIX}/info"
STATE: Final = f"{PREFIX}/state"
ADAPTERS: Final = f"{PREFIX}/adapters"
LOAD: Final = f"{PREFIX}/load"
UNLOAD: Final = f"{PREFIX}/unload"
OCCUPANCY: Final = f"{PREFIX}/occupancy"
HEALTH: Final = "/health"
TOKEN_ENV: Final = "LORAYARD_WORKER_TOKEN"  # noqa: S105  (the name of a variable)
# The cores that a worker may use, as numbers with commas between; all where it is not set.
CORES_ENV: Final = "LORAYARD_WORKER_CORES"
# Names the version of the adapter that a request is for, where a worker holds several of one name.
VERSION_HEADER: Final = "X-Lorayard-Adapter-Version"
# Name the router that asks, and the adapter (`base:adapter`) that a request is for.
ROUTER_HEADER: Final = "X-Lorayard-Router"
ADAPTER_HEADER: Final = "X-Lorayard-Adapter"
REFUSED_HEADER: Final = "X-Lorayard-Refused"
BUSY_PERIOD_S: Final = 0.05
IDLE_PERIOD_S: Final = 1.0


class Refusal(StrEnum):
    """Why a worker refuses what one router asks for: another one was there first."""

    FULL = "full"  # as many requests are in flight as may be
    ADAPTER_GONE = "adapter_gone"  # it has left since the router heard that it is here
    NO_SLOT = "no_slot"  # a load lacks a slot, or would evict what another router uses
    IN_USE = "in_use"  # an unload would take what another router uses, or has just loaded


class AdapterId(msgspec.Struct, frozen=True, order=True):
    """An adapter version on a worker. `name` is what requests ask for: `base:adapter`."""

    name: str
    version: str = ""


class Info(msgspec.Struct, frozen=True):
    """What a worker is. `max_loras` is 0 where it serves the base model alone.

    The rest is how its engine schedules, for those who model it: 0 where it is not known.
    """

    engine: str
    engine_version: str
    model_id: str
    max_loras: int
    max_lora_rank: int
    pid: int
    protocol: int = PROTOCOL
    device: str = ""
    max_cpu_loras: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    async_scheduling: bool = False
    kv_tokens: int = 0
    block_size: int = 0
    max_ongoing_requests: int = 0


class State(msgspec.Struct, frozen=True):
    """What a worker is doing. `seq` rises with every change of its adapters.

    `running` and `waiting` count requests, `kv_usage` is a share of 0 to 1; `gpu` are the adapters in
    slots, or on their way into one, `host` those in host memory alone. `others` counts the requests
    here of other routers than the one that is told, `used` are the adapters that those use.
    """

    seq: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    gpu: tuple[AdapterId, ...] = ()
    host: tuple[AdapterId, ...] = ()
    others: int = 0
    used: tuple[AdapterId, ...] = ()


class Occupancy(msgspec.Struct, frozen=True):
    """What a worker has counted of all its routers since it was started.

    `max_ongoing` is 0 where there is no limit; `loads` counts by adapter name what the engine was asked
    to load, `refused` by `Refusal`.
    """

    max_ongoing: int
    ongoing: int
    ongoing_peak: int
    routers: int
    loads: dict[str, int]
    refused: dict[str, int]


class LoadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Make an adapter resident from a folder that the worker can read; then drop `evict`.

    `drain_s` is for who has waited too long for a slot: `evict` then takes no new requests of any
    router, and the load waits for so long until those that it has are over.
    """

    adapter: AdapterId
    path: str
    evict: tuple[AdapterId, ...] = ()
    drain_s: float = 0.0


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drop an adapter from the engine, from its slot and from host memory."""

    adapter: AdapterId


class LoadReply(msgspec.Struct, frozen=True):
    """The change is part of the state `seq`; it took `load_s` seconds in the engine."""

    seq: int
    load_s: float = 0.0


class WireErrorBody(msgspec.Struct, frozen=True):
    """The inner part of an error answer."""

    message: str
    type: str = "worker_error"
    code: str = ""


class WireError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error answer; with the worker's state where a load is refused."""

    error: WireErrorBody
    state: State | None = None
