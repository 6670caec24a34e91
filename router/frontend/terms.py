"""For whom a request is, how urgent, and what it would rather not wait for: its headers, and its key.

    x-tenant            one of `router.tenants`; another name is nobody's, and counts as none
    x-priority          -3 to 3, less is more urgent, as vLLM's `priority`; the tenant's where left out
    x-ttft-deadline-ms  milliseconds from its arrival to its first token; else `router.ttft_deadline_s`
    x-adapter-cold      `reject`: turn it away rather than wait for a cold load; `allow` is the default

They are the router's alone and no worker sees them. A key that names its tenant has the last word: then
`x-tenant` says nothing, and what is more urgent than the key's priority, or its tenant's, counts as
that. A key that names none may speak for any tenant: it is for gateways that can be trusted. What
cannot be read is a 400 that says what to send: a misspelt deadline must not be a silent default.
"""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Final

import msgspec

from router.config import RouterConfig, TenantConfig
from router.frontend.access import FULL, Access
from router.frontend.errors import ApiError

TENANT: Final = "x-tenant"
PRIORITY: Final = "x-priority"
DEADLINE: Final = "x-ttft-deadline-ms"
COLD: Final = "x-adapter-cold"
HEADERS: Final[frozenset[str]] = frozenset({TENANT, PRIORITY, DEADLINE, COLD})
PRIORITY_MAX: Final = 3
DEADLINE_MAX_MS: Final = 86_400_000.0  # a day
WHOLE: Final = re.compile(r"[+-]?[0-9]{1,3}")
SHOWN: Final = 40


class Terms(msgspec.Struct, frozen=True):
    """What the headers say, with the key's or the configuration's word where they may not, or do not.

    Times in seconds. `accounts` are those that it is charged to beside its tenant's.
    """

    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    refuse_cold: bool = False
    accounts: tuple[str, ...] = ()


class TermsReader:
    """Reads the headers under one configuration."""

    def __init__(self, config: RouterConfig) -> None:
        self._tenants: dict[str, TenantConfig] = {one.name: one for one in config.tenants}
        self._deadline_s = config.ttft_deadline_s

    def usual(self, access: Access) -> Terms:
        """The terms of a request without such headers."""
        return Terms(
            access.tenant, access.priority or 0, self._deadline_s, accounts=access.accounts
        )

    def read(self, headers: Mapping[str, str], access: Access = FULL) -> Terms:
        """The terms of one request, its headers' names in lower case. Raises `ApiError` 400."""
        tenant = self._tenants.get(access.tenant or headers.get(TENANT, ""))
        deadline_s = self._deadline_s
        if (text := headers.get(DEADLINE)) is not None:
            deadline_s = _deadline_ms(text) / 1000
        priority = access.priority
        if priority is None:
            priority = 0 if tenant is None else tenant.priority
        if (text := headers.get(PRIORITY)) is not None:
            priority = _priority(text)
            if access.priority is not None:
                priority = max(priority, access.priority)
        return Terms(
            "" if tenant is None else tenant.name,
            priority,
            deadline_s,
            _cold(headers.get(COLD)),
            access.accounts,
        )


def _priority(text: str) -> int:
    if WHOLE.fullmatch(text) and abs(int(text)) <= PRIORITY_MAX:
        return int(text)
    wanted = f"a whole number from -{PRIORITY_MAX} (most urgent) to {PRIORITY_MAX}"
    raise _not(PRIORITY, text, wanted)


def _deadline_ms(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if isfinite(value) and 0.0 < value <= DEADLINE_MAX_MS:
        return value
    wanted = f"milliseconds, above 0 and at most {DEADLINE_MAX_MS:.0f} (a day)"
    raise _not(DEADLINE, text, wanted)


def _cold(text: str | None) -> bool:
    if text in {None, "allow"}:
        return False
    if text == "reject":
        return True
    raise _not(COLD, str(text), "`reject` or `allow`")


def _not(header: str, text: str, wanted: str) -> ApiError:
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    message = f"The header `{header}` is `{shown}`; send {wanted}."
    return ApiError(400, message, param=header, code="invalid_value")
