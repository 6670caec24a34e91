"""Operators and clients at one port: whose key is good for what, and which bodies are taken."""

import gzip
import json
import zlib
from functools import partial

import pytest
from administered import StandIn
from plane import ADMIN_KEY, MODEL, STREAM_END, always, answer, chunk, on_uvloop, plane, post

from router.frontend.connection import HEAD_MAX_BYTES

OK = answer(b'{"id": 1}')
CLIENTS = "clients-only"
gzipped = partial(gzip.compress, mtime=0)
LOAD = b"/admin/v1/adapters/base:sql/load"
VLLM = b"/v1/load_lora_adapter"


def bearer(key: str) -> bytes:
    return b"authorization: Bearer " + key.encode()


OPERATOR, CLIENT = bearer(ADMIN_KEY), bearer(CLIENTS)


@pytest.mark.parametrize(
    ("path", "body", "line", "status", "code"),
    [
        (LOAD, b"{}", OPERATOR, 200, None),
        (LOAD, b"{}", CLIENT, 401, "invalid_admin_key"),
        (LOAD, b"{}", b"a: b", 401, "invalid_admin_key"),
        (VLLM, b'{"lora_name": "sql"}', OPERATOR, 200, None),
        (VLLM, b'{"lora_name": "sql"}', CLIENT, 401, "invalid_admin_key"),
        (b"/v1/completions", b'{"model": "base"}', CLIENT, 200, None),
        (b"/v1/completions", b'{"model": "base"}', OPERATOR, 401, "invalid_api_key"),
        (b"/health", b"", OPERATOR, 405, None),
    ],
)
@on_uvloop
async def test_each_key_is_good_for_its_own_routes(
    path: bytes, body: bytes, line: bytes, status: int, code: str | None
) -> None:
    lifecycle = StandIn(MODEL)
    async with plane(always(OK), keys=[CLIENTS], lifecycle=lifecycle) as made:
        reply = await made.ask(post(body, line, path=path))
        assert reply.status == status, reply.body
        if status == 401:
            assert json.loads(reply.body)["error"]["code"] == code
            assert not lifecycle.log
            assert not made.workers[0].sides


@pytest.mark.parametrize("keys", [[], [CLIENTS]])
@on_uvloop
async def test_without_an_admin_key_there_is_no_administration(keys: list[str]) -> None:
    async with plane(always(OK), keys=keys) as made:
        for path in (LOAD, b"/admin/v1/adapters", b"/admin", b"/nowhere"):
            reply = await made.ask(post(b"{}", CLIENT, path=path))
            assert (reply.status, json.loads(reply.body)["error"]["code"]) == (404, None)
        reply = await made.ask(post(b'{"lora_name": "sql"}', CLIENT, path=VLLM))
        assert reply.status == 404
        assert b"put new ones into the store, or set an admin key" in reply.body
        assert not made.workers[0].sides


BODY = json.dumps({"workers": 2}).encode()


@pytest.mark.parametrize(
    "request_",
    [
        post(BODY, OPERATOR, path=LOAD),
        post(gzipped(BODY), OPERATOR, b"content-encoding: gzip", path=LOAD),
        post(zlib.compress(BODY), OPERATOR, b"content-encoding: deflate", path=LOAD),
        b"POST %b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n%b\r\n\r\n%b%b%b"
        % (LOAD, OPERATOR, chunk(BODY[:4]), chunk(BODY[4:]), STREAM_END),
        post(BODY, OPERATOR, b"content-type: text/plain", b"cookie: a=b", path=LOAD),
    ],
    ids=["plain", "gzip", "deflate", "chunked", "other headers"],
)
@on_uvloop
async def test_a_body_reaches_the_operation_however_it_is_framed(request_: bytes) -> None:
    lifecycle = StandIn(MODEL)
    async with plane(always(OK), lifecycle=lifecycle) as made:
        reply = await made.ask(request_)
        assert reply.status == 200, reply.body
        assert reply.headers["connection"] == "close"
    assert lifecycle.log == [("load", "sql", 2)]


@pytest.mark.parametrize(
    ("body", "lines", "status"),
    [
        (b" " * (HEAD_MAX_BYTES + 1), (), 413),
        (gzipped(b" " * (HEAD_MAX_BYTES + 1)), (b"content-encoding: gzip",), 413),
        (b"not packed", (b"content-encoding: gzip",), 400),
        (b"{}", (b"content-encoding: br",), 415),
        (b"{", (), 400),
    ],
    ids=["too large", "unpacks to too much", "not packed", "unknown packing", "cut"],
)
@on_uvloop
async def test_a_body_that_cannot_be_taken_is_refused(
    body: bytes, lines: tuple[bytes, ...], status: int
) -> None:
    lifecycle = StandIn(MODEL)
    async with plane(always(OK), lifecycle=lifecycle) as made:
        reply = await made.ask(post(body, OPERATOR, *lines, path=LOAD))
        assert reply.status == status, reply.body
        assert json.loads(reply.body)["error"]["message"]
    assert not lifecycle.log


@on_uvloop
async def test_what_is_no_post_has_no_body() -> None:
    async with plane(always(OK), lifecycle=StandIn(MODEL)) as made:
        client = await made.client()
        head = b"GET /admin/v1/workers HTTP/1.1\r\nhost: a\r\ncontent-length: 7\r\n%b\r\n\r\n"
        client.send(head % OPERATOR + b"GET /x ")
        reply = await client.reply("GET")
        assert reply.status == 200
        await client.closed()
