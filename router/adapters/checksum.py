"""Checksums of content: which kinds there are, how each is computed, and the file SHA256SUMS.

A checksum is computed piece by piece in order, while the pieces are at hand. Python's own library has
all kinds but two that S3 uses, CRC-32C and CRC-64/NVME; those are computed where `awscrt` is
installed, and a store does not offer them where it is not.
"""

import hashlib
import re
import zlib
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from types import ModuleType
from typing import Final, Protocol, assert_never

import msgspec

SUMS_MAX_BYTES: Final = 64 * 1024
# GNU: digest, space, a space or an asterisk (which said "binary" once), the file's name.
_LINE: Final = re.compile(r"([0-9A-Fa-f]{64}) [ *](?:\./)?([^/\0]+)")


class Algorithm(StrEnum):
    """The kinds of checksum that stores know."""

    SHA256 = "sha256"
    MD5 = "md5"
    CRC32 = "crc32"
    CRC32C = "crc32c"
    CRC64NVME = "crc64nvme"
    GIT_BLOB = "git-blob"  # SHA-1 over a header with the size, then the content


class Checksum(msgspec.Struct, frozen=True):
    """A checksum of a whole file; `value` is hex in lower case."""

    algorithm: Algorithm
    value: str


class Hasher(Protocol):
    """Takes a file's content in order; hashlib's own are such."""

    def update(self, data: bytes, /) -> None:
        """Take the next piece."""

    def hexdigest(self) -> str:
        """The checksum of what came so far."""


class SumsError(ValueError):
    """SHA256SUMS is not in GNU's format. The message names the line."""


def is_computable(algorithm: Algorithm) -> bool:
    """Whether this installation can compute that kind."""
    needs_crt = algorithm in {Algorithm.CRC32C, Algorithm.CRC64NVME}
    return not needs_crt or _crt() is not None


def hasher(algorithm: Algorithm, size: int) -> Hasher:
    """A hasher for a file of `size` bytes; the kind must be computable."""
    match algorithm:
        case Algorithm.SHA256:
            return hashlib.sha256()
        case Algorithm.MD5:
            return hashlib.md5(usedforsecurity=False)
        case Algorithm.GIT_BLOB:
            digest = hashlib.sha1(usedforsecurity=False)
            digest.update(f"blob {size}\0".encode())
            return digest
        case Algorithm.CRC32:
            return _Crc(zlib.crc32, digits=8)
        case Algorithm.CRC32C | Algorithm.CRC64NVME:
            crt = _crt()
            assert crt is not None, f"{algorithm} is not computable here"
            if algorithm is Algorithm.CRC32C:
                return _Crc(crt.crc32c, digits=8)
            return _Crc(crt.crc64nvme, digits=16)
        case _:
            assert_never(algorithm)


class _Crc:
    def __init__(self, function: Callable[[bytes, int], int], *, digits: int) -> None:
        self._function = function
        self._digits = digits
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = self._function(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


@cache
def _crt() -> ModuleType | None:
    try:
        from awscrt import checksums  # noqa: PLC0415  (of the extra `stores`)
    except ImportError:
        return None
    found: ModuleType = checksums
    return found


def read_sums(data: bytes) -> dict[str, Checksum]:
    """The checksums of a SHA256SUMS file, by file name. Raises `SumsError`."""
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise SumsError("is not UTF-8 text") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SumsError(
                f"line {number} is not `DIGEST  FILE` as `sha256sum FILE` writes it: {line[:100]!r}"
            )
        found[match[2]] = Checksum(Algorithm.SHA256, match[1].lower())
    return found
