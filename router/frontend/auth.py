"""Who may ask, and for what. Keys come from a file and the environment; without either, everyone may.

A key is hashed, its hash is looked up, and the whole of the hash is compared in constant time. How long
the look-up takes depends on the hash alone, never on the key, and nobody can make a hash that begins as
another one does: so time tells nothing of a key, and the cost is the same with ten keys and ten
thousand. Nothing is kept of what was given, be it right or wrong.
"""

import hmac
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from router.frontend.access import FULL, Access
from router.keys import digest_of


class _Known(NamedTuple):
    digest: bytes
    access: Access


class Keys:
    """The accepted API keys, by their hashes. `anyone` is whether none is needed."""

    def __init__(self, full: Iterable[str] = (), *, anyone: bool = False) -> None:
        self.anyone = anyone
        self._full = {digest: _Known(digest, FULL) for digest in map(digest_of, full)}
        self._known = self._full

    def replace(self, listed: Mapping[bytes, Access]) -> None:
        """Accept these from now on, by their SHA-256, beside those with full access."""
        known = {digest: _Known(digest, access) for digest, access in listed.items()}
        self._known = known | self._full

    def find(self, authorization: str | None, api_key: str | None) -> Access | None:
        """What the key gives that was sent; None where it is no key.

        `Authorization: Bearer KEY`, as OpenAI's clients send it, or `x-api-key: KEY`, as Anthropic's.
        """
        if self.anyone:
            return FULL
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            key = api_key or ""
        digest = digest_of(key.strip())
        known = self._known.get(digest)
        if known is None or not hmac.compare_digest(known.digest, digest):
            return None
        return known.access
