"""The words of the core: what is asked for, what is answered, how it can end.

Plain data, shared by production and simulation. Nothing here waits or decides.
"""

from enum import StrEnum

import msgspec


class AdapterRef(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """One adapter version: the unit of residency.

    `name` is the adapter's own name, without the base model's; `version` names its content, and is
    empty where the catalog does not tell versions apart (a trace does not).
    """

    model: str
    name: str
    version: str = ""

    @property
    def model_id(self) -> str:
        """The id that a client asks for: `base:adapter`."""
        return f"{self.model}:{self.name}"


class Prefix(msgspec.Struct, frozen=True, gc=False):
    """A beginning of a prompt: the hash of it, and how many tokens it has."""

    key: int
    tokens: int


class Job(msgspec.Struct, eq=False, gc=False):
    """One request, as far as routing needs to know it.

    `adapter` is None for the base model alone. Lengths are in tokens and may be estimates;
    `max_output_tokens` 0 where the client did not say. `priority` is vLLM's: less is more urgent.
    `deadline` is the loop time by which its first token must be out. With `refuse_cold` it is turned
    away where its adapter is not resident. `prefix` are the marks of its prompt (see prefixes.py), and
    `avoid` names workers that already failed this request. `accounts` are those whose quotas it is
    charged to beside its tenant's, by names that no tenant has. `counted` is the router's own: it has
    let the job in before, so a retry, of whatever cause, is no second request of a quota. So are
    `contends_since`, the loop time at which it was first refused because of another router, after which
    it goes before those who wait, and `contentions`, how often it was.
    """

    id: str
    adapter: AdapterRef | None = None
    prompt_tokens: int = 0
    max_output_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    refuse_cold: bool = False
    prefix: tuple[Prefix, ...] = ()
    avoid: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    counted: bool = False
    contends_since: float | None = None
    contentions: int = 0


class AdapterUse(StrEnum):
    """In which state the worker's slot was when the job was placed: the header `x-adapter`."""

    __hash__ = str.__hash__  # as it compares; Enum's own is a call into Python

    NONE = "none"
    HIT = "hit"
    LOADING = "loading"
    COLD = "cold"


class Outcome(StrEnum):
    """Every way in which a request can end, once it named a model that exists."""

    __hash__ = str.__hash__

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"
    REFUSED = "refused"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    DEADLINE = "deadline"  # its first token would have come too late, or did not come in time
    OVER_QUOTA = "over_quota"  # of one of its accounts
    COLD_REFUSED = "cold_refused"  # its adapter was not resident, and it asked not to wait for that
    LOAD_FAILED = "load_failed"
    WORKER_FAILED = "worker_failed"
    WORKER_STALLED = "worker_stalled"
    ROUTER_FAILED = "router_failed"
    SHUTTING_DOWN = "shutting_down"

    @property
    def is_rejection(self) -> bool:
        """Whether the router turned the request away before any worker had it."""
        return self in {
            Outcome.QUEUE_FULL,
            Outcome.QUEUE_TIMEOUT,
            Outcome.DEADLINE,
            Outcome.OVER_QUOTA,
            Outcome.COLD_REFUSED,
            Outcome.SHUTTING_DOWN,
        }


class Rejected(Exception):  # noqa: N818  (an outcome, not a fault of the program)
    """No capacity: the job was turned away before a worker had it.

    `retry_after_s` is when the queue will have drained at the present rate, in seconds.
    """

    def __init__(self, outcome: Outcome, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.retry_after_s = retry_after_s


class LoadFault(StrEnum):
    """Whose fault a failed load is. It decides the answer, and whether another worker may help."""

    ADAPTER_CHANGED = "adapter_changed"
    ADAPTER_INVALID = "adapter_invalid"
    STORE_UNAVAILABLE = "store_unavailable"
    WORKER = "worker"
    CONTENDED = "contended"  # nobody's: another router has what was to be had; decide again


class LoadError(Exception):
    """An adapter did not become resident. The message is fit for the client to read.

    `worker` is where it was to be loaded, once that is known.
    """

    def __init__(self, fault: LoadFault, message: str, worker: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.worker = worker
