"""Which of two versions a request gets: a share of the users, and each always the same one.

A user's place between 0 and 1 is a hash of who it is and of the version that is tried out. So it is the
same in every router process and after a restart, and not the same users get all that is new.
"""

import hashlib
from typing import Final

from router.core.job import AdapterRef

BYTES: Final = 4
WHOLE: Final = 256.0**BYTES


class Share:
    """A candidate, and the share of users that get it."""

    __slots__ = ("_below", "_salt", "candidate")

    def __init__(self, candidate: AdapterRef, weight: float) -> None:
        self.candidate = candidate
        self._below = weight * WHOLE
        self._salt = f"{candidate.name}@{candidate.version} ".encode()

    def takes(self, user: str) -> bool:
        """Whether the user gets the candidate."""
        who = self._salt + user.encode("utf-8", errors="surrogatepass")
        place = int.from_bytes(hashlib.blake2b(who, digest_size=BYTES).digest(), "big")
        return place < self._below
