"""A client's request as it was read, and what a worker gets of it."""

import zlib
from typing import Final

from engine_worker.protocol import VERSION_HEADER
from router.frontend import terms
from router.frontend.errors import ApiError, too_large

PASSED_ON: Final = "/v1/"
# Of one connection alone (RFC 9110, 7.6.1), or rewritten on the way.
HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
        "te", "trailer", "transfer-encoding", "upgrade", "expect",
    }
)  # fmt: skip
# The client's key, cookies and terms are for us, the worker's token is its connection's own; the body
# was read whole and unpacked, so its length and encoding are new.
NOT_FORWARDED: Final = HOP_BY_HOP | terms.HEADERS | {
    "host", "authorization", "x-api-key", "api-key", "cookie", "content-length",
    "content-encoding", "accept-encoding", "x-request-id", VERSION_HEADER.lower(),
}  # fmt: skip
# All that our own pages read; whatever else there is could only be refused.
FOR_APPLICATION: Final = frozenset({"authorization", "x-api-key"})
# zlib's names for a gzip header and trailer, and for either of what is called deflate.
WINDOW: Final = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}


class Request:
    """One request, whole. `headers` have lower-case names; of one that is repeated, the first counts.

    `target` is what stands in the request line, `path` and `query` its parts, still quoted.
    `arrived` is the loop's time at the end of its head.
    """

    __slots__ = (
        "arrived", "body", "fields", "headers", "http_1_0", "id", "keep_alive", "method", "path",
        "query", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.id = ""
        self.method = ""
        self.target = b""
        self.path = ""
        self.query = ""
        self.fields: list[tuple[str, str]] = []
        self.headers: dict[str, str] = {}
        self.body = b""
        self.arrived = 0.0
        self.http_1_0 = False
        self.keep_alive = True

    @property
    def passed_on(self) -> bool:
        """Whether it is for a worker; every other one is answered here."""
        return self.method == "POST" and self.path.startswith(PASSED_ON)

    def for_worker(self, path: str, version: str, own: bytes) -> bytes:
        """The head that a worker gets: our connection's `own` lines, what the client's say, our id.

        `version` names the adapter version that is meant, if one is.
        """
        named = self.headers.get("connection")
        dropped = NOT_FORWARDED
        if named is not None:
            dropped = dropped | {name.strip().lower() for name in named.split(",")}
        lines = [f"POST {path} HTTP/1.1\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in self.fields if name not in dropped]
        lines.append(f"x-request-id: {self.id}\r\ncontent-length: {len(self.body)}\r\n")
        if version:
            lines.append(f"{VERSION_HEADER}: {version}\r\n")
        return b"".join(("".join(lines).encode("latin-1"), own, b"\r\n"))

    def forget(self) -> None:
        """Let go of what only sending it takes: its answer may last for long, its connection longer."""
        self.body = b""
        self.fields = []
        self.headers = {}

    def for_application(self) -> bytes:
        """What a page needs of its head, as the last one on its connection. None takes a body."""
        lines = [f"{self.method} {self.target.decode('latin-1')} HTTP/1.1\r\nhost: router\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in self.fields if name in FOR_APPLICATION]
        lines.append(f"x-request-id: {self.id}\r\nconnection: close\r\n\r\n")
        return "".join(lines).encode("latin-1")


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
