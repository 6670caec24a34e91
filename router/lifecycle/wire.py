"""What goes over the wire of `/admin/v1`, beside the words of the lifecycle themselves.

The router writes it, the command line reads it, and the OpenAPI document is made of it: one set of
structs, so that none can say what another does not. A body with a field that is not known is refused: a
misspelt field must not be a silent default.
"""

from typing import Annotated, Final

import msgspec

from router.lifecycle.words import AdapterStatus, Change, WorkerStatus

PAGE_MAX: Final = 200  # a page is made between two requests, in some 20 ms
PAGE_DEFAULT: Final = 100
WORKERS_MAX: Final = 100_000
TEXT_MAX: Final = 1024

Version = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=128, description="a version as `show` lists it"),
]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)]


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operation that needs no more than its path: `{}`, or no body."""


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To how many workers."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)] = 1


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version, and its share of the requests."""

    version: Version
    weight: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Promote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which version; the candidate unless given."""

    version: Version | None = None


class Refresh(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base model whose store is read; all of them unless given."""

    model: Name | None = None


class AdapterPage(msgspec.Struct, frozen=True):
    """Some adapters. `after` is what to ask for the next page with; null on the last."""

    adapters: tuple[AdapterStatus, ...]
    after: str | None = None


class ModelWorkers(msgspec.Struct, frozen=True):
    """The workers of one base model."""

    model: str
    workers: tuple[WorkerStatus, ...]


class WorkerList(msgspec.Struct, frozen=True):
    """All workers, by base model."""

    models: tuple[ModelWorkers, ...]


class Changes(msgspec.Struct, frozen=True):
    """What an operation on several base models did."""

    changes: tuple[Change, ...]


class LoadLoraAdapter(msgspec.Struct, frozen=True):
    """vLLM's request, and like vLLM's it may carry more. `lora_name` is `name` or `base:name`.

    `lora_path` is the adapter's own place, if it is not in the store.
    """

    lora_name: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    lora_path: Annotated[str, msgspec.Meta(max_length=4 * TEXT_MAX)] | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoraAdapter(msgspec.Struct, frozen=True):
    """vLLM's request, and like vLLM's it may carry more. `lora_name` is `name` or `base:name`."""

    lora_name: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong: `param` names the field at fault, `code` says it in a word."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct, frozen=True):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class VllmErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong, in vLLM's words; `code` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(msgspec.Struct, frozen=True):
    """An error in vLLM's shape."""

    error: VllmErrorDetail
