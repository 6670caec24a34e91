"""The keys and the limits of one process, kept as the file of keys says.

The file is looked at every second. A new one counts from then on, for requests that come then; one that
cannot be used is told once, and keys and limits stay as they were. Only at the start is that an end.
"""

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from router.config import RouterConfig, TenantConfig
from router.core.quotas import Quota, Quotas
from router.document import ConfigError
from router.frontend.access import Access, Scope
from router.frontend.admin_key import AdminKey
from router.frontend.auth import Keys
from router.key_file import KeyFile
from router.keys import KeyConfig

log = logging.getLogger("lorayard.frontend")

POLL_S: Final = 1.0


class Gate:
    """The keys of one process and what they may use, kept as the file says.

    `share` is the process's part of the limits, of which others have the rest. A file that lists the
    `admin_key` cannot be used. To be made inside a running loop.
    """

    def __init__(
        self, config: RouterConfig, *, share: float = 1.0, admin_key: AdminKey | None = None
    ) -> None:
        given = os.environ.get(config.api_keys_env, "").split(",")
        full = [key for key in map(str.strip, given) if key]
        self._loop = asyncio.get_running_loop()
        self._tenants = config.tenants
        self._tenant_quotas = config.quotas
        self._share = share
        self._admin_key = admin_key
        self._file = key_file(config)
        self.keys = Keys(full, anyone=not full and self._file is None)
        self.quotas = Quotas(config.quotas, self._loop.time())
        self._following: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the file, and follow it from then on. Raises `ConfigError` where it cannot be used."""
        if self._file is not None:
            await self._take(await asyncio.to_thread(self._file.read))
            self._following = asyncio.create_task(self._follow(self._file))

    async def aclose(self) -> None:
        """Follow it no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def _follow(self, file: KeyFile) -> None:
        told = ""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                listed = await file.read_if_changed()
                if listed is not None:
                    await self._take(listed)
                    told = ""
            except ConfigError as error:
                if str(error) != told:
                    told = str(error)
                    log.error("the API keys are kept as they were: %s", error)  # noqa: TRY400
            except Exception:  # this must not end while the router runs
                log.exception("the API keys are kept as they were")

    async def _take(self, listed: Sequence[KeyConfig]) -> None:
        # In threads, which let requests go on between two of ten thousand keys.
        if self._admin_key is not None:
            await asyncio.to_thread(self._admin_key.check_clients, listed)
        given = await asyncio.to_thread(accesses, listed, self._tenants)
        quotas = await asyncio.to_thread(quotas_of, listed, self._share)
        self.keys.replace(given)
        self.quotas.change({**self._tenant_quotas, **quotas}, self._loop.time())
        log.info("%d API keys are known from the file", len(listed))


def key_file(config: RouterConfig) -> KeyFile | None:
    """The file that the configuration names, if it names one."""
    if config.api_keys_file is None:
        return None
    return KeyFile(Path(config.api_keys_file), [tenant.name for tenant in config.tenants])


def account_of(key: KeyConfig) -> str:
    """What a key's own account is called; a tenant's name has no colon."""
    return f"key:{key.name}"


def quotas_of(listed: Iterable[KeyConfig], share: float) -> dict[str, Quota]:
    """That share of each key's own limits, by its account."""
    return {
        account_of(key): Quota(
            _part(key.requests_per_minute, share), _part(key.tokens_per_minute, share)
        )
        for key in listed
    }


def accesses(listed: Iterable[KeyConfig], tenants: Iterable[TenantConfig]) -> dict[bytes, Access]:
    """What each key gives, by its hash."""
    priorities = {tenant.name: tenant.priority for tenant in tenants}
    scopes: dict[tuple[tuple[str, ...], tuple[str, ...]], Scope] = {}
    found = {}
    for key in listed:
        patterns = (key.models, key.adapters)
        if patterns not in scopes:
            scopes[patterns] = Scope(*patterns)
        limited = key.requests_per_minute is not None or key.tokens_per_minute is not None
        priority = key.priority
        if priority is None and key.tenant is not None:
            priority = priorities[key.tenant]
        found[bytes.fromhex(key.sha256)] = Access(
            scopes[patterns],
            key.tenant or "",
            priority,
            (account_of(key),) if limited else (),
        )
    return found


def _part(limit: float | None, share: float) -> float | None:
    return None if limit is None else limit * share
