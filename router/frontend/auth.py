"""Who may ask. Keys come from the environment; without any, everyone on the network may."""

import hashlib
import hmac
import os
from collections.abc import Mapping


class Keys:
    """The accepted API keys, kept as hashes and compared in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def from_environment(cls, name: str) -> "Keys":
        """Read keys, separated by commas, from a variable; it may be unset."""
        return cls([key for key in map(str.strip, os.environ.get(name, "").split(",")) if key])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, headers: Mapping[str, str]) -> bool:
        """Whether the headers carry one of the keys, or none is needed.

        `Authorization: Bearer KEY`, as OpenAI's clients send it, or `x-api-key: KEY`, as Anthropic's.
        """
        if not self._digests:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        given = hashlib.sha256(key.strip().encode("utf-8", errors="surrogateescape")).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found
