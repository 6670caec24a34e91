"""One request's way to its worker and back: bytes out as received, bytes in as they come.

Up to the first byte of the answer a failure can be made good on another worker; from then on the
answer is the worker's, and a failure cuts it off, so that no client takes half an answer for whole.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from engine_worker.protocol import VERSION_HEADER
from router.frontend import terms
from router.telemetry.answer import Answer
from router.workers.client import WorkerClient, describe

WHOLE_MAX_BYTES: Final = 256 * 1024
SEGMENT: Final = re.compile(r"[A-Za-z0-9_.-]+")
NOT_FOUND: Final = 404
MODEL_MISSING: Final = b"does not exist"  # vLLM: "The model `base:adapter` does not exist."
# Not an answer to this request, but a worker that cannot serve or does not know its router.
WORKERS_FAULT: Final = frozenset({401, 403, 502, 503})
# Of this connection alone (RFC 9110, 7.6.1), or rewritten on the way.
HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
        "te", "trailer", "transfer-encoding", "upgrade", "expect",
    }
)  # fmt: skip
# The client's key, cookies and terms are for us, the worker's token is its client's own; the body was
# read whole and unpacked, so its length and encoding are new.
NOT_FORWARDED: Final = HOP_BY_HOP | terms.HEADERS | {
    "host", "authorization", "x-api-key", "api-key", "cookie", "content-length",
    "content-encoding", "accept-encoding", "x-request-id", VERSION_HEADER.lower(),
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


class AdapterNotThereError(Exception):
    """The worker does not hold the adapter that it was thought to; nothing was sent to the client."""


def forwarded_headers(
    headers: CIMultiDictProxy[str], request_id: str, version: str
) -> CIMultiDict[str]:
    """What a worker gets of a client's headers, and which adapter version is meant."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    dropped = NOT_FORWARDED | named
    forwarded = CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )
    forwarded["X-Request-Id"] = request_id
    if version:
        forwarded[VERSION_HEADER] = version
    return forwarded


def upstream_path(path: str, query: str) -> str | None:
    """The path and query to ask a worker for, or None where no route can be meant.

    A worker has routes that are not for clients, so nothing may be left that some later reader could
    take for a step upwards: each segment is plain, and the whole goes on as it was checked.
    """
    segments = path.split("/")
    if not all(SEGMENT.fullmatch(segment) and segment not in {".", ".."} for segment in segments):
        return None
    return f"/v1/{path}?{query}" if query else f"/v1/{path}"


async def relay(
    request: web.Request,
    body: bytes,
    client: WorkerClient,
    path: str,
    *,
    headers: CIMultiDict[str],
    stamps: Mapping[str, str],
    adapter: str,
    first_byte_timeout_s: float,
    idle_timeout_s: float,
    on_first_byte: Callable[[], None],
    on_first_token: Callable[[], None],
    answer: Answer,
) -> web.StreamResponse:
    """Send the body to a worker and its answer to the client, with our `stamps` as headers.

    `adapter` is the model id that the worker was leased for, empty for the base model. `answer` is
    shown what passes. `on_first_byte` is called when the answer begins, `on_first_token` when the first
    event of a stream has come: a stream's head comes before its prompt is computed.

    Raises `WorkerFailedError`, `WorkerStalledError` or `AdapterNotThereError` while nothing was sent,
    `AnswerCutError` after.
    """
    url = URL(client.url + path, encoded=True)
    try:
        async with asyncio.timeout(first_byte_timeout_s):
            upstream = await client.session.post(
                url, data=body, headers=headers, allow_redirects=False
            )
    except TimeoutError:
        raise WorkerStalledError(f"no answer within {first_byte_timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise WorkerFailedError(describe(error)) from None
    async with upstream:
        if upstream.status in WORKERS_FAULT:
            raise WorkerFailedError(f"it answered {upstream.status}")
        length = upstream.content_length
        whole: bytes | None = None
        if length is not None and length <= WHOLE_MAX_BYTES:
            try:
                async with asyncio.timeout(idle_timeout_s):
                    whole = await upstream.read()
            except TimeoutError:
                raise WorkerStalledError(f"no more of its answer in {idle_timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError) as error:
                raise WorkerFailedError(describe(error)) from None
        # Not every 404 is that: a route or a stored response may be what is not there.
        missing = upstream.status == NOT_FOUND and whole is not None and MODEL_MISSING in whole
        if missing and adapter and adapter.encode() in (whole or b""):
            raise AdapterNotThereError
        on_first_byte()
        returned = CIMultiDict(
            (name, value)
            for name, value in upstream.headers.items()
            if name.lower() not in NOT_RETURNED
        )
        returned.update(stamps)
        if whole is not None:
            answer.whole(whole)
            return web.Response(status=upstream.status, headers=returned, body=whole)
        response = web.StreamResponse(status=upstream.status, headers=returned)
        if length is not None:
            response.content_length = length
        answer.begins(upstream.headers.get("Content-Type", ""))
        await _stream(request, upstream, response, idle_timeout_s, answer, on_first_token)
        return response


async def _stream(
    request: web.Request,
    upstream: aiohttp.ClientResponse,
    response: web.StreamResponse,
    idle_timeout_s: float,
    answer: Answer,
    on_first_token: Callable[[], None],
) -> None:
    """Bytes from the worker to the client, as they come; neither may pause for long."""
    await _to_client(response.prepare(request), idle_timeout_s)
    content = upstream.content
    while True:
        try:
            async with asyncio.timeout(idle_timeout_s):
                chunk = await content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise AnswerCutError(describe(error), client_gone=False) from None
        if not chunk:
            break
        if answer.streamed and answer.first_byte_at is None:
            on_first_token()
        answer.passes(chunk)
        await _to_client(response.write(chunk), idle_timeout_s)
    await _to_client(response.write_eof(), idle_timeout_s)


async def _to_client(sending: Awaitable[object], idle_timeout_s: float) -> None:
    """Send; a client that takes nothing for so long is gone, and its place is another's."""
    try:
        async with asyncio.timeout(idle_timeout_s):
            await sending
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise AnswerCutError(describe(error), client_gone=True) from None
