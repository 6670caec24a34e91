"""The operators' key: another one than clients have, and without it there is no administration."""

import hmac
import os
from collections.abc import Iterable, Mapping

from router.config import ConfigError, RouterConfig
from router.keys import KeyConfig, digest_of


class AdminKey:
    """The accepted keys, kept as hashes and compared in constant time; several while one is changed."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest_of(key) for key in keys]
        assert self._digests, "no key would be every key"

    @classmethod
    def from_environment(cls, config: RouterConfig) -> "AdminKey | None":
        """Read keys, separated by commas; None where there are none: administration is off.

        Raises `ConfigError` where a key is a client's too.
        """
        keys = _listed(config.admin_key_env)
        if set(keys) & set(_listed(config.api_keys_env)):
            raise ConfigError(
                f"a key is both in {config.admin_key_env} and in {config.api_keys_env}: every client "
                "that has it would be an operator; give operators a key of their own"
            )
        return cls(keys) if keys else None

    def check_clients(self, listed: Iterable[KeyConfig]) -> None:
        """Raise `ConfigError` where one of the clients' keys is an operator's."""
        own = {digest.hex() for digest in self._digests}
        for key in listed:
            if key.sha256.lower() in own:
                raise ConfigError(
                    f"the key `{key.name}` of the file of keys is the admin key too: every client that "
                    "has it would be an operator; remove it there, or give operators a key of their own"
                )

    def accepts(self, headers: Mapping[str, str]) -> bool:
        """Whether the headers carry it: `Authorization: Bearer KEY`, or `x-api-key: KEY`."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        given = digest_of(key.strip())
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found


def _listed(variable: str) -> list[str]:
    return [key for key in map(str.strip, os.environ.get(variable, "").split(",")) if key]
