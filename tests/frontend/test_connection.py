"""What a hostile or broken client may send, and how each of it ends."""

import asyncio
import gzip
import logging
import zlib
from functools import partial

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plane import (
    BODY,
    STREAM_END,
    STREAM_HEAD,
    Asked,
    Client,
    Reply,
    Script,
    WorkerSide,
    always,
    answer,
    chunk,
    forward,
    on_a_clock_that_jumps,
    on_asyncio,
    on_uvloop,
    plane,
    post,
    until,
)

from router.config import TenantConfig
from router.frontend.connection import HEAD_MAX_BYTES, HEAD_TIMEOUT_S, KEEPALIVE_S, LINGER_S

gzipped = partial(gzip.compress, mtime=0)
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
OK = answer(b'{"id": 1}')


class Remembers:
    """A worker that answers, and remembers what it was asked."""

    def __init__(self, reply: bytes = OK) -> None:
        self.asked: list[Asked] = []
        self._reply = reply

    async def __call__(self, side: WorkerSide) -> None:
        while True:
            self.asked.append(await side.asked())
            side.send(self._reply)


def held(side_ready: asyncio.Event, go_on: asyncio.Event, *pieces: bytes) -> Script:
    """Answer the first request when told to."""

    async def script(side: WorkerSide) -> None:
        while True:
            await side.asked()
            side_ready.set()
            await go_on.wait()
            for piece in pieces:
                side.send(piece)

    return script


# Whole requests, in whatever pieces.


@on_uvloop
async def test_a_request_may_be_split_anywhere() -> None:
    worker = Remembers()
    plain = post(BODY, b"x-a: b")
    chunked = CHUNKED + b"\r\n" + chunk(BODY[:5]) + chunk(BODY[5:]) + STREAM_END
    async with plane(worker) as made:
        for request in (plain, chunked):
            client = await made.client()
            await until(lambda: made.frontend.connections)
            connection = made.connection()
            for cut in range(1, len(request)):
                connection.data_received(request[:cut])
                connection.data_received(request[cut:])
                assert (await client.reply()).body == b'{"id": 1}'
            for byte in request:
                connection.data_received(bytes((byte,)))
            assert (await client.reply()).body == b'{"id": 1}'
            client.close()
            await until(lambda: not made.frontend.connections)
        await made.settled({"completed": len(plain) + len(chunked)})
    assert {asked.body for asked in worker.asked} == {BODY}
    assert {tuple(asked.values("content-length")) for asked in worker.asked} == {(str(len(BODY)),)}


@on_uvloop
async def test_pipelined_requests_are_answered_in_turn() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        client = await made.client()
        client.send(post() + post() + b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" + post())
        await ready.wait()
        go_on.set()
        assert [(await client.reply()).body for _ in range(2)] == [b'{"id": 1}'] * 2
        health = await client.reply("GET")
        assert (health.status, health.body) == (200, b'{"status": "ok"}')
        assert health.headers["connection"] == "close"
        await client.closed()
        await made.settled({"completed": 2})


@on_uvloop
async def test_many_pipelined_requests_are_bounded() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        client = await made.client()
        client.send(post() + b"GET / HTTP/1.1\r\n\r\n" * 50_000)
        await ready.wait()
        await until(lambda: len(made.connection()._waiting) > 1)
        assert len(made.connection()._waiting) <= 300
        go_on.set()
        assert (await client.reply()).status == 200
        assert (await client.reply("GET")).status == 404
        await client.rest()
        await made.settled({"completed": 1})


@on_uvloop
async def test_a_connection_is_used_again_and_again() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        client = await made.client()
        for _ in range(5):
            client.send(post())
            assert (await client.reply()).status == 200
        client.send(b'POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"model":')
        assert (await client.reply()).status == 400  # a body that is not JSON: the next may be
        client.send(post(BODY, b"connection: close"))
        last = await client.reply()
        assert last.headers["connection"] == "close"
        await client.closed()
        await made.settled({"completed": 6})
        assert len(made.workers[0].sides) == 1


# What cannot be read.

MALFORMED = {
    "bare LF": b"POST /v1/x HTTP/1.1\nhost: a\n\n",
    "bare LF in the head's end": HEAD + b"content-length: 1\n\nx",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc",
    "two equal lengths": HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\nab",
    "list of lengths": HEAD + b"content-length: 2, 2\r\n\r\nab",
    "negative length": HEAD + b"content-length: -1\r\n\r\n",
    "signed length": HEAD + b"content-length: +1\r\n\r\nx",
    "length in Python's words": HEAD + b"content-length: 1_0\r\n\r\n",
    "empty length": HEAD + b"content-length: \r\n\r\n",
    "huge length": HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    "length and chunks": HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": CHUNKED + b"content-length: 3\r\n\r\n0\r\n\r\n",
    "no chunks": HEAD + b"transfer-encoding: gzip\r\n\r\n0\r\n\r\n",
    "chunks within": HEAD + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunks twice": CHUNKED + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "disguised chunks": HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "bad chunk size": CHUNKED + b"\r\nzz\r\n",
    "negative chunk size": CHUNKED + b"\r\n-1\r\n",
    "huge chunk size": CHUNKED + b"\r\nffffffffffffffffff\r\n",
    "space after chunk size": CHUNKED + b"\r\n1 \r\nx\r\n0\r\n\r\n",
    "bare LF after chunk size": CHUNKED + b"\r\n1\nx\r\n0\r\n\r\n",
    "longer chunk": CHUNKED + b"\r\n1\r\nxy\r\n0\r\n\r\n",
    "NUL in a value": HEAD + b"a: b\0c\r\n\r\n",
    "control character in a value": HEAD + b"a: \x01\r\n\r\n",
    "CR in a value": HEAD + b"a: b\rc: d\r\n\r\n",
    "folded": HEAD + b"a: b\r\n c\r\n\r\n",
    "folded first": b"POST /v1/x HTTP/1.1\r\n a: b\r\n\r\n",
    "space in a name": HEAD + b"a b: c\r\n\r\n",
    "space after a name": HEAD + b"content-length : 3\r\n\r\nabc",
    "no name": HEAD + b": c\r\n\r\n",
    "no colon": HEAD + b"abc\r\n\r\n",
    "space in the target": b"POST /v1/a b HTTP/1.1\r\n\r\n",
    "NUL in the target": b"POST /v1/a\0b HTTP/1.1\r\n\r\n",
    "target that is none": b"POST nowhere HTTP/1.1\r\n\r\n",
    "unknown method": b"BREW /v1/x HTTP/1.1\r\n\r\n",
    "tunnel": b"CONNECT worker:8000 HTTP/1.1\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown version": b"POST /v1/x HTTP/1.2\r\n\r\n",
    "bytes in the target": b"POST /v1/x?\xc3\xa4 HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED)
@on_uvloop
async def test_what_cannot_be_read_is_refused_once_and_ends_the_connection(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with plane() as made:
        for cut in (len(request_), len(request_) // 2, len(request_) - 1):
            client = await made.client()
            await until(lambda: made.frontend.connections)
            made.connection().data_received(request_[:cut])
            if made.connection()._reading.name != "ENDED" and cut < len(request_):
                made.connection().data_received(request_[cut:])
            reply = await client.reply()
            assert reply.status in {400, 505}
            assert reply.headers["connection"] == "close"
            assert reply.headers["x-worker"] == "none"
            assert b'"invalid_request_error"' in reply.body
            client.send(post())  # is nobody's
            await client.closed()
            client.close()
            await until(lambda: not made.frontend.connections)
        await made.settled({})
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9"])
@on_uvloop
async def test_other_versions_are_refused(version: bytes) -> None:
    async with plane(always(OK)) as made:
        reply = await made.ask(post().replace(b"HTTP/1.1", version))
        assert reply.status == 505
        await made.settled({})


@on_uvloop
async def test_a_malformed_request_waits_for_its_turn() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        client = await made.client()
        client.send(post() + b"nonsense\r\n\r\n")
        await ready.wait()
        await until(lambda: made.connection()._waiting)
        go_on.set()
        assert (await client.reply()).status == 200
        assert (await client.reply()).status == 400
        await client.closed()
        await made.settled({"completed": 1})


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_noise_is_answered_or_waited_for_and_is_never_the_routers_fault(
    data: bytes, cut: int
) -> None:
    on_asyncio(noise)(data, cut)


SNIPPETS = [
    b"POST ", b"GET ", b"/v1/completions", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\0", b": ",
    b"content-length", b"transfer-encoding", b"chunked", b"3", b"0", b"expect: 100-continue\r\n",
    b"connection: upgrade\r\nupgrade: h2c\r\n", b"http://[", b"//", b"?", b"#", b"%", b"\xff", b";",
    b"x-tenant: a\r\n", b"\r\n\r\n", BODY,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.sampled_from(SNIPPETS), max_size=25).map(b"".join), cut=st.integers(0, 99))
def test_near_http_is_answered_or_waited_for_and_is_never_the_routers_fault(
    data: bytes, cut: int
) -> None:
    on_asyncio(noise)(data, cut)


async def noise(data: bytes, cut: int) -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        connection = made.connection()
        for piece in (data[:cut], data[cut:]):
            connection.data_received(piece)
        client.writer.write_eof()
        assert not (await client.rest()).startswith(b"HTTP/1.1 5")


# Limits.


@on_uvloop
async def test_a_head_is_bounded() -> None:
    async with plane() as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        connection = made.connection()
        connection.data_received(HEAD + b"a: ")
        sent = 0
        while connection._reading.name != "ENDED":
            connection.data_received(b"x" * 1000)
            sent += 1000
            assert sent <= HEAD_MAX_BYTES + 1000
        assert (await client.reply()).status == 431
        await client.closed()
        await made.settled({})


@on_uvloop
async def test_a_large_head_within_the_limit_is_served() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        many = [b"x-h-%d: %b" % (number, b"v" * 50) for number in range(900)]
        assert (await made.ask(post(BODY, *many))).status == 200
        assert (await made.ask(post(BODY, b"x-long: " + b"v" * 60_000))).status == 200
        get = b"GET /health HTTP/1.1\r\nhost: a\r\nx-long: " + b"v" * 60_000 + b"\r\n\r\n"
        client = await made.client()
        client.send(get)
        assert (await client.reply("GET")).status == 200
        client.close()
        await made.settled({"completed": 2})
    assert worker.asked[1].values("x-long") == ["v" * 60_000]


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\nx-trailer: ", b"y" * 1000),
        (CHUNKED + b"\r\n1;", b"e" * 1000),
        (CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\n", b"x-trailer: y\r\n" * 70),
    ],
    ids=["trailer", "chunk extension", "trailers"],
)
@on_uvloop
async def test_what_is_neither_head_nor_body_is_bounded_too(begins: bytes, goes_on: bytes) -> None:
    async with plane() as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        connection = made.connection()
        connection.data_received(begins)
        for _ in range(2 * HEAD_MAX_BYTES // 900):
            connection.data_received(goes_on)
        assert (await client.reply()).status == 431
        await client.closed()
        await made.settled({})


OVERSIZED = {
    "by its length": HEAD + b"content-length: 1001\r\n\r\n",
    "by its chunks": CHUNKED + b"\r\n" + chunk(b"x" * 600) + chunk(b"x" * 401),
    "by one chunk": CHUNKED + b"\r\n" + b"3e9\r\n" + b"x" * 1001,
    "and waits to be told to go on": HEAD + b"content-length: 1001\r\nexpect: 100-continue\r\n\r\n",
    "gzip": post(gzipped(b" " * 1001), b"content-encoding: gzip"),
    "bomb": post(gzipped(b" " * 500_000), b"content-encoding: gzip"),
    "deflate": post(zlib.compress(b" " * 500_000), b"content-encoding: deflate"),
}


@pytest.mark.parametrize("request_", OVERSIZED.values(), ids=OVERSIZED)
@on_uvloop
async def test_an_oversized_body_is_413(request_: bytes) -> None:
    async with plane(max_body_bytes=1000) as made:
        reply = await made.ask(request_)
        assert reply.status == 413
        assert b"100 Continue" not in reply.raw
        await made.settled({})


@on_uvloop
async def test_a_body_in_many_small_chunks_is_whole() -> None:
    worker = Remembers()
    body = b'{"model": "base", "prompt": "%b"}' % (b"ab" * 20_000)
    async with plane(worker) as made:
        pieces = [chunk(body[at : at + 2]) for at in range(0, len(body), 2)]
        reply = await made.ask(CHUNKED + b"\r\n" + b"".join(pieces) + STREAM_END)
        assert reply.status == 200
    assert worker.asked[0].body == body


@on_uvloop
async def test_a_page_takes_no_body() -> None:
    """Nobody needs a key to ask for a page: what is sent there must not fill the memory."""
    async with plane(keys=["key"]) as made:
        client = await made.client()
        client.send(b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 10000000\r\n\r\n")
        assert (await client.reply("GET")).status == 413
        client.close()
        client = await made.client()
        bomb = gzipped(b" " * 30_000_000)
        client.send(
            b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-encoding: gzip\r\ncontent-length: "
            b"%d\r\n\r\n%b" % (len(bomb), bomb)
        )
        assert (await client.reply("GET")).status == 200
        client.close()


# Time.


@on_a_clock_that_jumps
async def test_a_head_that_does_not_come_to_its_end_is_408() -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        made.connection().data_received(post()[:20])
        forward(HEAD_TIMEOUT_S - 1)
        made.connection().data_received(post()[20:30])
        forward(2)
        assert (await client.reply()).status == 408
        await client.closed()
        await made.settled({})


@on_a_clock_that_jumps
async def test_a_head_that_begins_late_has_its_time() -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        client.send(post())
        assert (await client.reply()).status == 200
        forward(KEEPALIVE_S - 1)
        made.connection().data_received(post()[:20])
        forward(HEAD_TIMEOUT_S - 1)
        await asyncio.sleep(0)
        made.connection().data_received(post()[20:])
        assert (await client.reply()).status == 200
        made.connection().data_received(post()[:20])
        forward(HEAD_TIMEOUT_S + 1)
        assert (await client.reply()).status == 408
        await made.settled({"completed": 2})


@on_a_clock_that_jumps
async def test_a_slow_body_is_408_and_one_that_goes_on_is_not() -> None:
    async with plane(always(OK), idle_timeout_s=10.0) as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        body = b'{"model": "base", "prompt": "%b"}' % (b"a" * 500_000)
        request = post(body)
        for at in range(0, len(request), 1 << 16):
            made.connection().data_received(request[at : at + (1 << 16)])
            forward(9)
            await asyncio.sleep(0)
        assert (await client.reply()).status == 200
        made.connection().data_received(post()[:-1])
        forward(11)
        assert (await client.reply()).status == 408
        await client.closed()
        await made.settled({"completed": 1})


@on_a_clock_that_jumps
async def test_a_body_that_drips_is_408() -> None:
    async with plane(always(OK), idle_timeout_s=10.0) as made:
        client = await made.client()
        await until(lambda: made.frontend.connections)
        connection = made.connection()
        for byte in post(b"x" * 100):
            if connection._reading.name == "BODY":
                forward(1)
                await asyncio.sleep(0)
            connection.data_received(bytes((byte,)))
        assert (await client.reply()).status == 408
        await made.settled({})


@on_a_clock_that_jumps
async def test_an_idle_connection_is_closed_in_time() -> None:
    async with plane(always(OK)) as made:
        silent = await made.client()
        used = await made.client()
        used.send(post())
        assert (await used.reply()).status == 200
        forward(HEAD_TIMEOUT_S + 1)
        await silent.closed()
        assert len(made.frontend.connections) == 1
        forward(KEEPALIVE_S)
        await used.closed()
        await made.settled({"completed": 1})


@on_a_clock_that_jumps
async def test_who_never_leaves_after_the_last_answer_is_left() -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        client.send(post(BODY, b"connection: close"))
        assert (await client.reply()).status == 200
        await client.closed()
        assert made.frontend.connections  # the client may still be sending
        client.send(b"more and more")
        forward(LINGER_S + 1)
        await until(lambda: not made.frontend.connections)
        await made.settled({"completed": 1})


# Kinds of clients.


@on_uvloop
async def test_http_1_0_clients_get_the_content_alone_and_the_end_of_the_connection() -> None:
    pieces = (STREAM_HEAD, chunk(b"data: a\n\n"), chunk(b"data: b\n\n"), STREAM_END)
    async with plane(always(*pieces)) as made:
        client = await made.client()
        client.send(post(BODY, b"connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert body == b"data: a\n\ndata: b\n\n"
        assert b"transfer-encoding" not in head.lower()
        assert b"\r\nconnection: close" in head.lower()
        await made.settled({"completed": 1})


@on_uvloop
async def test_a_client_that_waits_to_be_told_is_told_to_go_on() -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        client.send(post(BODY, b"expect: 100-continue")[: -len(BODY)])
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(BODY)
        assert (await client.reply()).status == 200
        old = await made.client()  # HTTP/1.0 knows no such thing
        old.send(post(BODY, b"expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await old.rest()).startswith(b"HTTP/1.1 200 OK\r\n")
        await made.settled({"completed": 2})


@on_uvloop
async def test_a_pipelined_client_that_waits_to_be_told_is_told_in_its_turn() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        client = await made.client()
        client.send(post() + post(BODY, b"expect: 100-continue")[: -len(BODY)])
        await ready.wait()
        await until(lambda: made.connection()._reading.name == "BODY")
        go_on.set()
        assert (await client.reply()).status == 200
        if client._rest:
            assert client._rest == b"HTTP/1.1 100 Continue\r\n\r\n"
            client._rest = b""
        else:
            assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(BODY)
        assert (await client.reply()).status == 200
        await made.settled({"completed": 2})


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"HEAD /health HTTP/1.1\r\nhost: a\r\n\r\n", 200),
        (b"OPTIONS /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        (b"DELETE /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", 405),
        (b"PUT /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /health HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 405),
        (b"POST //v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v1/ HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v1/../metrics HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v1/%2e%2e/load HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v1/x;y HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST http://elsewhere/v1/completions HTTP/1.1\r\nhost: a\r\n\r\n", 400),  # no body
        (b"GET http://elsewhere/health HTTP/1.1\r\nhost: a\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 200),
        (b"GET /nowhere HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    ],
)  # fmt: skip
@on_uvloop
async def test_what_is_not_passed_on_is_answered_here(request_: bytes, status: int) -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        client.send(request_)
        reply = await client.reply(request_.split()[0].decode())
        assert reply.status == status
        assert reply.headers["x-worker"] == "none"
        assert reply.headers["x-request-id"]
        assert not made.workers[0].sides
        client.close()
        await made.settled({})


@on_uvloop
async def test_an_upgrade_is_not_made_and_the_connection_ends() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        client = await made.client()
        lines = (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AA")
        client.send(post(BODY, *lines))
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        client.send(post())
        await client.closed()
        await made.settled({"completed": 1})
    (asked,) = worker.asked
    assert not {"upgrade", "connection", "http2-settings"} & {name for name, _ in asked.headers}


@on_uvloop
async def test_the_absolute_form_is_passed_on_by_its_path() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        reply = await made.ask(post(path=b"http://elsewhere:99/v1/completions?a=b"))
        assert reply.status == 200
        await made.settled({"completed": 1})
    assert worker.asked[0].target == "/v1/completions?a=b"


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        (b"gzip", gzipped(BODY)),
        (b"x-gzip", gzipped(BODY)),
        (b"DEFLATE", zlib.compress(BODY)),
        (b"identity", BODY),
    ],
)
@on_uvloop
async def test_a_packed_body_reaches_the_worker_unpacked(encoding: bytes, packed: bytes) -> None:
    worker = Remembers()
    async with plane(worker) as made:
        assert (await made.ask(post(packed, b"content-encoding: " + encoding))).status == 200
        await made.settled({"completed": 1})
    assert worker.asked[0].body == BODY
    assert not worker.asked[0].values("content-encoding")


@pytest.mark.parametrize(
    ("encoding", "packed", "status"),
    [
        (b"gzip", BODY, 400),
        (b"gzip", gzipped(BODY)[:-4], 400),
        (b"gzip", b"", 400),
        (b"deflate", gzipped(BODY), 400),
        (b"br", BODY, 415),
        (b"gzip, gzip", gzipped(gzipped(BODY)), 415),
    ],
)
@on_uvloop
async def test_a_body_that_does_not_unpack(encoding: bytes, packed: bytes, status: int) -> None:
    async with plane(always(OK)) as made:
        client = await made.client()
        client.send(post(packed, b"content-encoding: " + encoding))
        assert (await client.reply()).status == status
        client.send(post())
        assert (await client.reply()).status == 200
        await made.settled({"completed": 1})


# What must not become a header, or a request.


@on_uvloop
async def test_a_trailer_is_no_header() -> None:
    worker = Remembers()
    trailers = b"0\r\nx-tenant: rich\r\nx-priority: nonsense\r\nauthorization: Bearer key\r\n\r\n"
    request = CHUNKED + b"trailer: x-tenant\r\n\r\n" + chunk(BODY) + trailers
    async with plane(worker, tenants=(TenantConfig("rich"),)) as made:
        assert (await made.ask(request)).status == 200
        await made.settled({"completed": 1})
        labels = {"model": "base", "tenant": "rich", "outcome": "completed"}
        counted = made.metrics.registry.get_sample_value("lorayard_tenant_requests_total", labels)
        assert not counted
    names = [name for name, _ in worker.asked[0].headers]
    assert not {"x-tenant", "x-priority", "trailer", "transfer-encoding"} & {*names}
    async with plane(worker, keys=["key"]) as made:
        assert (await made.ask(request)).status == 401


@on_uvloop
async def test_of_a_repeated_header_the_first_counts_and_all_are_passed_on() -> None:
    worker = Remembers()
    async with plane(worker, keys=["key"]) as made:
        lines = (
            b"authorization: Bearer key", b"authorization: Bearer wrong", b"x-a: 1", b"x-a: 2",
            b"x-request-id: one", b"x-request-id: two", b"cookie: c", b"X-Api-Key: key",
        )  # fmt: skip
        reply = await made.ask(post(BODY, *lines))
        assert (reply.status, reply.headers["x-request-id"]) == (200, "one")
        swapped = (lines[1], lines[0])
        assert (await made.ask(post(BODY, *swapped))).status == 401
        await made.settled({"completed": 1})
    (asked,) = worker.asked
    assert asked.values("x-a") == ["1", "2"]
    assert asked.values("x-request-id") == ["one"]
    assert asked.values("authorization") == ["Bearer secret"]
    assert not asked.values("x-api-key")
    assert not asked.values("cookie")


INJECTIONS = {
    "query": post(path=b"/v1/completions?a=%0d%0ax-b:%20c&%ff"),
    "query with a fragment": post(path=b"/v1/completions?a#b"),
    "request id": post(BODY, b"x-request-id: a\tb"),
    "long request id": post(BODY, b"x-request-id: " + b"a" * 200),
    "hop by hop": post(BODY, b"connection: content-length, x-request-id, host, authorization"),
    "hop by hop, all": post(BODY, b'connection: *,,;"\\, \xff', b"te: trailers", b"keep-alive: 1"),
    "worker's headers": post(BODY, b"x-lorayard-adapter-version: sha256:2"),
    "bytes": post(BODY, b"x-bytes: \xff\xfe\x80 \xc3\xa4"),
    "hidden request": post(BODY + post()[:0] + b" " * 3) + post(),
    "hidden in chunks": CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\n\r\n" + post(),
    "leading lines": b"\r\n\r\n" + post(),
    "chunk extensions": CHUNKED + b"\r\n" + b"11;a=b;c\r\n" + BODY + b"\r\n0;d\r\n\r\n",
}


@pytest.mark.parametrize("request_", INJECTIONS.values(), ids=INJECTIONS)
@on_uvloop
async def test_a_worker_reads_exactly_one_request(request_: bytes) -> None:
    worker = Remembers()  # h11 reads it, and finds nothing behind it
    async with plane(worker) as made:
        client = await made.client()
        client.send(request_)
        reply = await client.reply()
        assert reply.status == 200
        assert "x-b" not in reply.headers
        client.writer.write_eof()
        await client.rest()
        await made.settled()
    for asked in worker.asked:
        assert asked.method == "POST"
        assert asked.target.startswith("/v1/completions")
        assert len(asked.values("content-length")) == 1
        assert len(asked.values("host")) == 1
        assert len(asked.values("x-request-id")) == 1
        assert asked.values("authorization") == ["Bearer secret"]
        assert asked.values("x-b") == []
        assert asked.body.strip() == BODY


@on_uvloop
async def test_an_adapters_name_with_a_line_end_in_it_is_404_and_reaches_no_worker() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        assert (await made.ask(post(b'{"model": "base:a\\r\\nx-b: c"}'))).status == 404
        await made.settled()
    assert not worker.asked


@on_uvloop
async def test_bytes_in_headers_go_on_as_they_came() -> None:
    worker = Remembers()
    async with plane(worker) as made:
        assert (await made.ask(post(BODY, b"x-bytes: \xff\xfe \xc3\xa4"))).status == 200
    assert worker.asked[0].values("x-bytes") == [b"\xff\xfe \xc3\xa4".decode("latin-1")]


@on_uvloop
async def test_a_model_that_is_not_there_touches_no_worker() -> None:
    async with plane(always(OK)) as made:
        for model in (b"other", b"other:a", b"\\u0000", b"\\r\\nx-b: c", b"", b"x" * 500):
            reply = await made.ask(post(b'{"model": "%b"}' % model))
            assert reply.status == 404
            assert "x-b" not in reply.headers
        assert not made.workers[0].sides
        await made.settled({})


# Clients that leave.


@on_uvloop
async def test_a_client_that_leaves_before_its_body_ends() -> None:
    async with plane(always(OK)) as made:
        for request in (post()[:10], post()[:-1], CHUNKED + b"\r\n5\r\nab", b""):
            for leave in ("close", "abort", "half"):
                client = await made.client()
                await until(lambda: made.frontend.connections)
                client.send(request)
                await client.writer.drain()
                if leave == "half":
                    client.writer.write_eof()
                    await client.closed()
                else:
                    getattr(client, leave)()
                await until(lambda: not made.frontend.connections)
        assert not made.workers[0].sides
        await made.settled({})


@pytest.mark.parametrize("leave", ["close", "abort", "half"])
@on_uvloop
async def test_a_client_that_leaves_while_it_is_queued(leave: str) -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK), max_ongoing=1) as made:
        first = await made.client()
        first.send(post())
        await ready.wait()
        second = await made.client()
        second.send(post())
        await until(lambda: made.router.queued == 1)
        leave_by(second, leave)
        await until(lambda: made.router.queued == 0)
        assert made.outcomes() == {"client_gone": 1}
        go_on.set()
        assert (await first.reply()).status == 200
        await made.settled({"client_gone": 1, "completed": 1})
        assert len(made.workers[0].sides) == 1


@pytest.mark.parametrize("leave", ["close", "abort", "half"])
@on_uvloop
async def test_a_client_that_leaves_while_its_adapter_loads(leave: str) -> None:
    async with plane(always(OK)) as made:
        made.pool.gate = asyncio.Event()
        client = await made.client()
        client.send(post(b'{"model": "base:a"}'))
        await until(lambda: made.pool.loads)
        leave_by(client, leave)
        await made.settled({"client_gone": 1})
        assert made.router.loading == 1  # others may want it
        made.pool.gate.set()
        await until(lambda: made.router.loading == 0)
        assert not made.workers[0].sides


@pytest.mark.parametrize("leave", ["close", "abort", "half"])
@on_uvloop
async def test_a_client_that_leaves_before_the_first_byte_ends_its_request(leave: str) -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        client = await made.client()
        client.send(post())
        await ready.wait()
        leave_by(client, leave)
        await made.settled({"client_gone": 1})
        go_on.set()
        assert (
            await made.workers[0].sides[0].was_reset() or True
        )  # it is closed, one way or another


@pytest.mark.parametrize("leave", ["close", "abort", "half"])
@on_uvloop
async def test_a_client_that_leaves_within_its_answer_ends_its_request(leave: str) -> None:
    gone = asyncio.Event()

    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD + chunk(b"data: a\n\n"))
        await side.gone()
        gone.set()

    async with plane(script) as made:
        client = await made.client()
        client.send(post())
        await client.until(b"data: a\n\n")
        leave_by(client, leave)
        await gone.wait()
        await made.settled({"client_gone": 1})


def leave_by(client: Client, how: str) -> None:
    if how == "half":
        client.writer.write_eof()
    elif how == "close":
        client.close()
    else:
        client.abort()


# Slow clients.

PIECE = b"data: " + b"x" * 50_000 + b"\n\n"


def endless(sent: list[int]) -> Script:
    """Stream for as long as it is read."""

    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD)
        while True:
            side.send(chunk(PIECE))
            await side.writer.drain()
            sent[0] += len(PIECE)

    return script


@on_a_clock_that_jumps
async def test_a_client_that_stalls_stops_its_own_worker_and_nobody_else() -> None:
    sent = [0]
    both: list[Script] = [endless(sent), always(OK)]

    async def script(side: WorkerSide) -> None:
        await both[min(side.number, 1)](side)

    async with plane(script, idle_timeout_s=10.0) as made:
        stalled = await made.client(receive_buffer=4096)
        stalled.send(post())
        await until(lambda: [one for one in made.upstreams() if one.paused])
        upstream = made.upstream()
        before = -1
        while before != sent[0]:  # what the sockets hold
            before = sent[0]
            for _ in range(20):
                assert (await made.ask()).status == 200
        assert upstream.paused
        (connection,) = [one for one in made.frontend.connections if one.upstream is upstream]
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < 1 << 19
        forward(11)
        await until(lambda: made.outcomes().get("client_gone"))
        await until(lambda: connection not in made.frontend.connections)
        await made.settled()


@pytest.mark.parametrize("size", [1000, 200_000])
@on_a_clock_that_jumps
async def test_a_client_that_asks_on_and_reads_nothing_is_left(size: int) -> None:
    """Its answers fill its own buffer and no more: the next one begins when there is room."""
    served = [0]

    async def script(side: WorkerSide) -> None:
        while True:
            await side.asked()
            served[0] += 1
            side.send(answer(b"x" * size))
            await side.writer.drain()

    async with plane(script, idle_timeout_s=10.0) as made:
        client = await made.client(receive_buffer=4096)
        client.stop_reading()
        client.send(post() * 2_000)
        before = -1
        while before != served[0] or made.in_flight:
            before = served[0]
            for _ in range(200):
                await asyncio.sleep(0)
        connection = made.connection()
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < (1 << 17) + size
        forward(11)
        await until(lambda: not made.frontend.connections)
        await made.settled({"completed": served[0]})


@on_a_clock_that_jumps
async def test_a_client_that_reads_late_gets_all_it_asked_for() -> None:
    async with plane(always(answer(b"x" * 200_000)), idle_timeout_s=100.0) as made:
        client = await made.client(receive_buffer=4096)
        client.stop_reading()
        client.send(post() * 40 + post(BODY, b"connection: close"))
        await until(lambda: made.outcomes().get("completed"))
        forward(KEEPALIVE_S + 1)
        for _ in range(200):
            await asyncio.sleep(0)
        client.read_on()
        for _ in range(41):
            assert len((await client.reply()).body) == 200_000
        await client.closed()
        await made.settled({"completed": 41})


@on_a_clock_that_jumps
async def test_a_slow_client_gets_its_last_answer_whole() -> None:
    async with plane(always(answer(b"x" * 250_000)), idle_timeout_s=100.0) as made:
        client = await made.client(receive_buffer=4096)
        client.stop_reading()
        client.send(post(BODY, b"connection: close"))
        await until(lambda: made.outcomes().get("completed"))
        forward(LINGER_S + 1)
        for _ in range(200):
            await asyncio.sleep(0)
        client.read_on()
        assert len((await client.reply()).body) == 250_000
        await made.settled({"completed": 1})


# The end of the process.


@on_uvloop
async def test_draining_closes_what_is_idle_and_lets_what_runs_end() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        idle, half, busy = [await made.client() for _ in range(3)]
        await until(lambda: len(made.frontend.connections) == 3)
        half.send(post()[:-1])
        busy.send(post())
        await ready.wait()
        await until(lambda: sum(one._reading.name == "BODY" for one in made.frontend.connections))
        drained = asyncio.ensure_future(made.frontend.drained())
        await idle.closed()
        await half.closed()
        assert not drained.done()
        go_on.set()
        assert (await busy.reply()).status == 200
        await busy.closed()
        await drained
        await made.settled({"completed": 1})


@on_uvloop
async def test_draining_waits_for_the_bytes_that_a_slow_client_has_yet_to_take() -> None:
    async with plane(always(answer(b"x" * 250_000))) as made:
        client = await made.client(receive_buffer=4096)
        client.stop_reading()
        client.send(post())
        await until(lambda: made.outcomes().get("completed"))
        drained = asyncio.ensure_future(made.frontend.drained())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not drained.done()
        client.read_on()
        assert len((await client.reply()).body) == 250_000
        await drained
        await made.settled({"completed": 1})


@on_uvloop
async def test_closing_cuts_off_whatever_is_left() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        clients = [await made.client() for _ in range(3)]
        clients[0].send(post()[:-1])
        clients[1].send(post())
        await ready.wait()
        await made.frontend.aclose()
        for client in clients:
            await client.closed()
        await made.settled({"client_gone": 1})


@on_uvloop
async def test_while_it_drains_new_requests_are_turned_away() -> None:
    ready, go_on = asyncio.Event(), asyncio.Event()
    async with plane(held(ready, go_on, OK)) as made:
        busy = await made.client()
        busy.send(post())
        await ready.wait()
        made.router.close()
        drained = asyncio.ensure_future(made.frontend.drained())
        await asyncio.sleep(0)
        late: Reply = await made.ask()
        assert (late.status, late.headers["connection"]) == (503, "close")
        go_on.set()
        assert (await busy.reply()).status == 200
        await drained
        await made.settled({"completed": 1, "shutting_down": 1})


def test_h11_is_strict_where_this_suite_leans_on_it() -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc")
    with pytest.raises(h11.RemoteProtocolError):
        server.next_event()
