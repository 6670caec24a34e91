"""Errors in OpenAI's shape, each with the status that the contract gives it."""

import math
from typing import Final

import msgspec

from router.core.job import LoadError, LoadFault, Outcome, Rejected

LOAD_STATUS: Final[dict[LoadFault, tuple[int, str, str]]] = {
    LoadFault.ADAPTER_CHANGED: (503, "server_error", "adapter_changed"),
    LoadFault.ADAPTER_INVALID: (400, "invalid_request_error", "adapter_invalid"),
    LoadFault.STORE_UNAVAILABLE: (503, "server_error", "adapter_store_unavailable"),
    LoadFault.WORKER: (502, "server_error", "adapter_load_failed"),
}
STORE_RETRY_AFTER_S: Final = 5
NO_STAMPS: Final = "x-worker: none\r\nx-adapter: none\r\n"


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault, `code` what is wrong with it.

    `stamps` are the header lines that say how far the request came.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.stamps = NO_STAMPS

    def body(self) -> bytes:
        """The answer's content."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": str(self),
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> dict[str, str]:
        """The headers that go with its content."""
        headers = {"content-type": "application/json; charset=utf-8"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def model_not_found(model: str) -> ApiError:
    """404, before any worker is touched."""
    shown = model if len(model) <= 256 else model[:256] + "..."  # noqa: PLR2004
    return ApiError(
        404,
        f"The model `{shown}` does not exist; GET /v1/models lists those that do.",
        param="model",
        code="model_not_found",
    )


def rejected(error: Rejected) -> ApiError:
    """429 where the tenant's quota is used up, which is the client's to mend; else 503: no capacity."""
    over_quota = error.outcome is Outcome.OVER_QUOTA
    return ApiError(
        429 if over_quota else 503,
        str(error),
        kind="rate_limit_error" if over_quota else "server_error",
        code=error.outcome.value,
        retry_after_s=error.retry_after_s,
    )


def load_failed(error: LoadError) -> ApiError:
    """The adapter could not be made resident."""
    status, kind, code = LOAD_STATUS[error.fault]
    retry_after_s = STORE_RETRY_AFTER_S if status == 503 else None  # noqa: PLR2004
    param = "model" if error.fault is not LoadFault.WORKER else None
    return ApiError(
        status, str(error), kind=kind, param=param, code=code, retry_after_s=retry_after_s
    )


def unauthorized() -> ApiError:
    """401."""
    return ApiError(
        401,
        "No or wrong API key; send `Authorization: Bearer KEY`, or `x-api-key: KEY`.",
        code="invalid_api_key",
    )


def too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, f"The body is larger than {limit:,} bytes.")
