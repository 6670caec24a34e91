"""A client's request as it was read, and what a worker gets of it."""

import zlib
from typing import Final

from engine_worker.protocol import (
    ADAPTER_HEADER,
    REFUSED_HEADER,
    ROUTER_HEADER,
    VERSION_HEADER,
)
from router.frontend import terms
from router.frontend.access import FULL
from router.frontend.errors import ApiError, too_large

PASSED_ON: Final = "/v1/"
# vLLM's routes for the adapters of one worker; here they mean the fleet, and are answered here.
FOR_OPERATORS: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Of one connection alone (RFC 9110, 7.6.1), or rewritten on the way.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    }
)  # fmt: skip
TERMS: Final = frozenset(name.encode() for name in terms.HEADERS)
ADAPTER: Final = ADAPTER_HEADER.lower().encode()
VERSION: Final = VERSION_HEADER.lower().encode()
# The client's key, cookies and terms are for us, the worker's token is its connection's own; the body
# was read whole and unpacked, so its length and encoding are new.
NOT_FORWARDED: Final = HOP_BY_HOP | TERMS | {
    b"host", b"authorization", b"x-api-key", b"api-key", b"cookie", b"content-length",
    b"content-encoding", b"accept-encoding", b"x-request-id",
    ADAPTER, VERSION, ROUTER_HEADER.lower().encode(), REFUSED_HEADER.lower().encode(),
}  # fmt: skip
# All that our own pages read; whatever else there is could only be refused.
FOR_APPLICATION: Final = frozenset({b"authorization", b"x-api-key"})
# zlib's names for a gzip header and trailer, and for either of what is called deflate.
WINDOW: Final = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}


class Request:
    """One request, whole. `fields` are its headers as they came, names in lower case.

    `target` is what stands in the request line, `path` and `query` its parts, still quoted.
    `arrived` is the loop's time at the end of its head, `access` what its key gives.
    """

    __slots__ = (
        "_first", "access", "arrived", "body", "fields", "http_1_0", "id", "keep_alive", "method",
        "path", "query", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.id = ""
        self.access = FULL
        self.method = b""
        self.target = b""
        self.path = ""
        self.query = ""
        self.fields: list[tuple[bytes, bytes]] = []
        self._first: dict[bytes, bytes] = {}
        self.body = b""
        self.arrived = 0.0
        self.http_1_0 = False
        self.keep_alive = True

    @property
    def passed_on(self) -> bool:
        """Whether it is for a worker; every other one is answered here."""
        return (
            self.method == b"POST"
            and self.path.startswith(PASSED_ON)
            and self.path not in FOR_OPERATORS
        )

    @property
    def takes_body(self) -> bool:
        """Whether a page may want its body; of no other request is one looked at."""
        return self.method == b"POST"

    @property
    def needs_client_key(self) -> bool:
        """Whether it is refused at once without one. What is for operators takes another key."""
        return self.path.startswith(PASSED_ON) and self.path not in FOR_OPERATORS

    def add(self, name: bytes, value: bytes) -> None:
        """Take in a header."""
        name = name.lower()
        self.fields.append((name, value))
        self._first.setdefault(name, value)

    def get(self, name: bytes) -> str | None:
        """A header's value; of one that is repeated, the first counts."""
        value = self._first.get(name)
        return None if value is None else value.decode("latin-1")

    def headers(self) -> dict[str, str]:
        """All of them, for those who look for many."""
        return {
            name.decode("latin-1"): value.decode("latin-1") for name, value in self._first.items()
        }

    @property
    def has_terms(self) -> bool:
        """Whether one of its headers is of `terms.py`."""
        return not TERMS.isdisjoint(self._first)

    def for_worker(
        self, path: bytes, adapter: bytes, version: str, own: bytes, length: int
    ) -> bytes:
        """The head that a worker gets: our connection's `own` lines, what the client's say, our id.

        `adapter` and `version` name the adapter that is meant, if one is. The body has that `length`.
        """
        dropped = NOT_FORWARDED
        named = self._first.get(b"connection")
        if named is not None:
            dropped = dropped | {name.strip().lower() for name in named.split(b",")}
        lines = [b"POST %b HTTP/1.1\r\n%b" % (path, own)]
        lines += [b"%b: %b\r\n" % field for field in self.fields if field[0] not in dropped]
        lines.append(b"x-request-id: %b\r\ncontent-length: %d\r\n" % (self.id.encode(), length))
        if adapter:
            lines.append(b"%b: %b\r\n" % (ADAPTER, adapter))
        if version:
            lines.append(b"%b: %b\r\n" % (VERSION, version.encode()))
        lines.append(b"\r\n")
        return b"".join(lines)

    def forget(self) -> None:
        """Let go of what only sending it takes: its answer may last for long, its connection longer."""
        self.body = b""
        self.fields = []
        self._first = {}

    def for_application(self) -> bytes:
        """What a page needs of it, as the last one on its connection."""
        lines = [b"%b %b HTTP/1.1\r\nhost: router\r\n" % (self.method, self.target)]
        lines += [b"%b: %b\r\n" % field for field in self.fields if field[0] in FOR_APPLICATION]
        body = self.body if self.takes_body else b""
        if body:
            lines.append(b"content-length: %d\r\n" % len(body))
        lines.append(b"x-request-id: %b\r\nconnection: close\r\n\r\n" % self.id.encode())
        lines.append(body)
        return b"".join(lines)


def unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its `content-encoding`. Raises `ApiError`, 413 where it unpacks to too much."""
    if encoding.lower() in {"", "identity"}:
        return body
    window = WINDOW.get(encoding.lower())
    if window is None:
        raise ApiError(
            415, f"The content encoding `{encoding[:40]}` is not known; send gzip, deflate or none."
        )
    unpacking = zlib.decompressobj(window)
    try:
        plain = unpacking.decompress(body, limit + 1)
        if len(plain) > limit:
            raise too_large(limit)
        if not unpacking.eof:
            raise ApiError(400, f"The body is not whole for its content encoding, {encoding}.")
    except zlib.error as error:
        raise ApiError(400, f"The body is not {encoding}: {error}.") from None
    return plain
