"""One request's way to its worker and back: bytes out as received, bytes in as they come.

Up to the first byte of the answer a failure can be made good on another worker; from then on the
answer is the worker's, and a failure cuts it off, so that no client takes half an answer for whole.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from router.workers.client import WorkerClient, describe

WHOLE_MAX_BYTES: Final = 256 * 1024
# Of this connection alone (RFC 9110, 7.6.1), or rewritten on the way.
HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
        "te", "trailer", "transfer-encoding", "upgrade", "expect",
    }
)  # fmt: skip
# The client's key and cookies are for us, the worker's token is its client's own; the body was read
# whole and unpacked, so its length and encoding are new.
NOT_FORWARDED: Final = HOP_BY_HOP | {
    "host", "authorization", "cookie", "content-length", "content-encoding", "accept-encoding",
    "x-request-id",
}  # fmt: skip
NOT_RETURNED: Final = HOP_BY_HOP | {"date", "server", "x-request-id", "content-length"}


class WorkerFailedError(Exception):
    """The worker failed before the first byte of its answer; nothing was sent to the client."""


class WorkerStalledError(Exception):
    """The worker did not begin its answer in time; nothing was sent to the client."""


class AnswerCutError(Exception):
    """The worker failed within its answer, or the client went away; the connection is broken."""

    def __init__(self, message: str, *, client_gone: bool) -> None:
        super().__init__(message)
        self.client_gone = client_gone


def forwarded_headers(headers: CIMultiDictProxy[str], request_id: str) -> CIMultiDict[str]:
    """What a worker gets of a client's headers."""
    forwarded = CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in NOT_FORWARDED
    )
    forwarded["X-Request-Id"] = request_id
    return forwarded


async def relay(
    request: web.Request,
    body: bytes,
    client: WorkerClient,
    *,
    headers: CIMultiDict[str],
    stamps: Mapping[str, str],
    first_byte_timeout_s: float,
    idle_timeout_s: float,
    on_first_byte: Callable[[], None],
) -> web.StreamResponse:
    """Send the body to a worker and its answer to the client, with our `stamps` as headers.

    Raises `WorkerFailedError` or `WorkerStalledError` while nothing was sent, `AnswerCutError` after.
    """
    url = client.url + request.rel_url.raw_path_qs
    try:
        async with asyncio.timeout(first_byte_timeout_s):
            upstream = await client.session.post(url, data=body, headers=headers)
    except TimeoutError:
        raise WorkerStalledError(f"no answer within {first_byte_timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise WorkerFailedError(describe(error)) from None
    async with upstream:
        length = upstream.content_length
        whole: bytes | None = None
        if length is not None and length <= WHOLE_MAX_BYTES:
            try:
                async with asyncio.timeout(idle_timeout_s):
                    whole = await upstream.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise WorkerFailedError(describe(error)) from None
        on_first_byte()
        returned = CIMultiDict(
            (name, value)
            for name, value in upstream.headers.items()
            if name.lower() not in NOT_RETURNED
        )
        returned.update(stamps)
        if whole is not None:
            return web.Response(status=upstream.status, headers=returned, body=whole)
        response = web.StreamResponse(status=upstream.status, headers=returned)
        if length is not None:
            response.content_length = length
        await _stream(request, upstream, response, idle_timeout_s)
        return response


async def _stream(
    request: web.Request,
    upstream: aiohttp.ClientResponse,
    response: web.StreamResponse,
    idle_timeout_s: float,
) -> None:
    try:
        await response.prepare(request)
    except (ConnectionError, aiohttp.ClientError) as error:
        raise AnswerCutError(describe(error), client_gone=True) from None
    content = upstream.content
    while True:
        try:
            async with asyncio.timeout(idle_timeout_s):
                chunk = await content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise AnswerCutError(describe(error), client_gone=False) from None
        if not chunk:
            break
        try:
            await response.write(chunk)
        except (ConnectionError, aiohttp.ClientError) as error:
            raise AnswerCutError(describe(error), client_gone=True) from None
    try:
        await response.write_eof()
    except (ConnectionError, aiohttp.ClientError) as error:
        raise AnswerCutError(describe(error), client_gone=True) from None
