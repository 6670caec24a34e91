"""A number for a text, the same in every process and on any machine.

`hash()` of a text is salted, so that two routers, or two runs of one replay, would place differently.
"""

from hashlib import blake2b


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
