"""What a broken or hostile worker may answer, and what of it reaches the client."""

import asyncio
import gc
import json
import logging
import socket
import struct
from pathlib import Path

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plane import (
    BODY,
    STREAM_END,
    STREAM_HEAD,
    Asked,
    Plane,
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

from router.config import RecordConfig
from router.frontend.relay import Passage
from router.telemetry.answer import Answer
from router.telemetry.recorder import Recorder
from router.telemetry.usage import Usage
from router.workers.upstream import (
    HEAD_MAX_BYTES,
    Upstream,
    UpstreamPool,
    WorkerFailedError,
    WorkerStalledError,
)

EVENTS = (
    b'data: {"choices": [{"text": "a"}]}\n\n',
    b'data: {"choices": [{"text": "b"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n',
    b"data: [DONE]\n\n",
)
STREAM = STREAM_HEAD + b"".join(map(chunk, EVENTS)) + STREAM_END
TRAILERS = STREAM_HEAD + chunk(EVENTS[0]) + b"0\r\nx-t: 1\r\nx-u: 2\r\n\r\n"
WHOLE = answer(b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}')
LARGE = answer(b"y" * 300_000, b"content-type: application/json")
TO_THE_END = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(EVENTS)
ANSWERS = {
    "whole": WHOLE,
    "stream": STREAM,
    "extensions": STREAM_HEAD + b"4;a=b\r\nabcd\r\n0;c\r\n\r\n",
    "trailers": TRAILERS,
    "empty": answer(b""),
    "empty stream": STREAM_HEAD + STREAM_END,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n",
    "after others": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + WHOLE,
}  # fmt: skip


def body_of(raw: bytes) -> bytes:
    """What is in an answer, as h11 reads it; the end of the data is the end of its connection."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    client.receive_data(b"")
    body = b""
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        if isinstance(event, h11.Data):
            body += event.data
    return body


# Whole answers, in whatever pieces.


class Silent:
    """A worker that reads requests, and whose answers the test puts in."""

    async def __call__(self, side: WorkerSide) -> None:
        while True:
            await side.asked()


async def given_to_upstream(made: Plane, pieces: list[bytes]) -> tuple[Reply, Upstream]:
    """Ask, and give the answer to the router's connection in these pieces."""
    client = await made.client()
    client.send(post())
    await until(lambda: [one for one in made.upstreams() if one._reader is not None])
    (upstream,) = [one for one in made.upstreams() if one._reader is not None]
    for piece in pieces:
        upstream.data_received(piece)
    reply = await client.reply()
    client.close()
    return reply, upstream


@pytest.mark.parametrize("raw", ANSWERS.values(), ids=ANSWERS)
@on_uvloop
async def test_an_answer_may_be_split_anywhere(raw: bytes) -> None:
    async with plane(Silent()) as made:
        splits = [[raw[:cut], raw[cut:]] for cut in range(1, len(raw))]
        splits.append([raw[at : at + 1] for at in range(len(raw))])
        splits.append([raw])
        for pieces in splits:
            reply, _ = await given_to_upstream(made, pieces)
            assert reply.body == body_of(raw)
            framed = raw.partition(b"\r\n\r\n")[2]
            assert framed.endswith(reply.raw.partition(b"\r\n\r\n")[2])
        await made.settled()
        assert len(made.workers[0].sides) <= (1 if b" 204 " not in raw else len(splits))
        assert sum(made.outcomes().values()) == len(splits) == made.outcomes()["completed"]


@on_uvloop
async def test_an_answer_to_the_end_of_the_connection_ends_the_clients() -> None:
    async with plane(always(TO_THE_END, close=True)) as made:
        client = await made.client()
        client.send(post() + post())
        raw = await client.rest()
        assert raw.endswith(b"\r\n\r\n" + b"".join(EVENTS))
        assert b"\r\nconnection: close\r\n" in raw
        assert b"transfer-encoding" not in raw
        await made.settled({"completed": 1})


@on_uvloop
async def test_a_large_answer_of_known_length_passes_and_nothing_behind_it() -> None:
    async with plane(always(LARGE + b"\r\n\r\n")) as made:
        client = await made.client()
        for _ in range(3):
            client.send(post())
            reply = await client.reply()
            assert reply.body == b"y" * 300_000
            assert client._rest == b""
        client.close()
        await made.settled({"completed": 3})


class Told:
    """A client's end that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.upstream: Upstream | None = None
        self.unframed = False
        self.write = self.sent.append


class Line:
    """A transport to nowhere."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, int, Usage | None, bytes]:
    """A valid streamed answer, its events, its usage, its content; chunks fall anywhere."""
    texts = draw(st.lists(st.text(max_size=30), max_size=6))
    events = [b"data: %b\n\n" % json.dumps({"t": text}).encode() for text in texts]
    usage = None
    if draw(st.booleans()):
        usage = Usage(draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6)))
        said = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        events.append(b"data: %b\n\n" % json.dumps({"usage": said}).encode())
    content = b"".join(events)
    count = len(events)
    if draw(st.booleans()):
        content += b"data: [DONE]\n\n"
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(content) - 1)), max_size=8)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    framing = draw(st.sampled_from(["chunked", "extended", "close"]))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    if framing == "close":
        return head + b"\r\n" + content, count, usage, content
    extension = b";a=b" if framing == "extended" else b""
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces if piece)
    trailers = draw(st.sampled_from([b"", b"x-t: 1\r\n"]))
    head += b"transfer-encoding: chunked\r\n\r\n"
    return head + body + b"0\r\n" + trailers + b"\r\n", count, usage, content


@settings(max_examples=200, deadline=None)
@given(one=streams(), data=st.data())
def test_in_whatever_reads_an_answer_comes_it_is_passed_on_to_the_byte_and_counted(
    one: tuple[bytes, int, Usage | None, bytes], data: st.DataObject
) -> None:
    raw, count, usage, content = one
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=30)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    old = data.draw(st.booleans())

    @on_asyncio
    async def main() -> None:
        client, line, shown = Told(), Line(), Answer(lambda: 1.0)
        pool = UpstreamPool("http://worker:1", None, "r0")
        upstream = Upstream(pool, asyncio.get_running_loop())
        upstream.connection_made(line)  # type: ignore[arg-type]
        passage = Passage(
            client, asyncio.get_running_loop(), chunked=not old, last=old,
            stamps=b"x-worker: w\r\n", adapter=b"", answer=shown,
            on_first_byte=lambda: None, on_first_token=lambda: None,
        )  # fmt: skip
        client.upstream = upstream
        upstream.ask(passage, b"", b"", first_byte_timeout_s=9, idle_timeout_s=9)
        for piece in pieces:
            upstream.data_received(piece)
        if not passage.over.done():
            upstream.connection_lost(None)
        assert await passage.over == 200
        head, _, body = b"".join(client.sent).partition(b"\r\n\r\n")
        framed = raw.partition(b"\r\n\r\n")[2]
        assert body == (content if old else framed)
        assert head.count(b"x-worker: w") == 1
        assert shown.events == count
        assert shown.usage() == usage
        assert shown.streamed
        upstream.connection_lost(None)
        assert not pool._connections

    main()


# Answers that are none.

MALFORMED = {
    "no HTTP": b"nonsense\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}\r\n\r\n",
    "a line before": b"\r\n\r\n" + WHOLE,
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\na: b\r\n c\r\ncontent-length: 2\r\n\r\n{}",
    "NUL": b"HTTP/1.1 200 OK\r\na: \0\r\ncontent-length: 2\r\n\r\n{}",
    "space in a name": b"HTTP/1.1 200 OK\r\na b: c\r\ncontent-length: 2\r\n\r\n{}",
    "other encoding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nabc",
    "packed chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks twice": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
    b"transfer-encoding: identity\r\n\r\n0\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "no status": b"HTTP/1.1 099 No\r\n\r\nabc",
    "another protocol": b"HTTP/1.1 101 Yes\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nabc",
    "content where there is none": b"HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc",
    "bytes behind it": WHOLE + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "noise behind it": WHOLE + b"xyz",
    "bad first chunk": STREAM_HEAD + b"zz\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (HEAD_MAX_BYTES // 6 + 1),
    "endless line": b"HTTP/1.1 200 " + b"K" * (HEAD_MAX_BYTES + 1),
    "other workers' business": answer(status=b"502 Bad Gateway"),
    "not now": answer(status=b"503 Service Unavailable"),
    "who are you": answer(status=b"401 Unauthorized"),
    "not you": answer(status=b"403 Forbidden"),
    "not you, in chunks": STREAM.replace(b"200 OK", b"403 No"),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
@on_uvloop
async def test_what_is_no_answer_is_made_good_elsewhere_and_else_is_502(raw: bytes) -> None:
    async with plane(always(raw)) as made:
        reply = await made.ask()
        assert reply.status == 502
        assert reply.headers["x-worker"] == "w0"
        assert b'"worker_failed"' in reply.body
        await made.settled({"worker_failed": 1})
        assert not made.upstreams()
    async with plane(*once_each(raw, WHOLE)) as made:
        reply = await made.ask()
        assert (reply.status, reply.raw.count(b"HTTP/1.1 ")) == (200, 1)
        await made.settled({"completed": 1})
        assert made.retries() == 1


def once_each(*replies: bytes, close: bool = False) -> tuple[Script, Script]:
    """Two workers which between them answer with these in turn."""
    left = [*replies]

    async def script(side: WorkerSide) -> None:
        while True:
            await side.asked()
            side.send(left.pop(0))
            if close and left:
                return

    return script, script


@on_uvloop
async def test_where_the_adapter_is_missing_it_is_loaded_again_elsewhere() -> None:
    missing = answer(
        b'{"error": {"message": "The model `base:a` does not exist."}}', status=b"404 Not Found"
    )
    async with plane(*once_each(missing, WHOLE)) as made:
        reply = await made.ask(post(b'{"model": "base:a"}'))
        assert reply.status == 200
        assert [name for _, name in made.pool.loads] == ["a", "a"]
        first, second = (worker for worker, _ in made.pool.loads)
        assert first != second
        await made.settled({"completed": 1})
        assert made.retries() == 1


@on_uvloop
async def test_a_worker_that_has_its_own_name_for_a_version_is_asked_by_it() -> None:
    asked: list[Asked] = []

    async def script(side: WorkerSide) -> None:
        while True:
            asked.append(await side.asked())
            if len(asked) == 1:  # it has lost it
                missing = b'{"error": {"message": "The model `base:a@sha256:1` does not exist."}}'
                side.send(answer(missing, status=b"404 Not Found"))
            else:
                side.send(answer(b'{"model": "base:a@sha256:1"}'))

    async with plane(script, script) as made:
        for link in made.pool.links.values():
            link.names = "{0}@{1}"
        reply = await made.ask(post(b'{"n": 1.0, "model": "base:a"}'))
        assert (reply.status, reply.body) == (200, b'{"model": "base:a@sha256:1"}')
        assert [one.body for one in asked] == [b'{"n":1.0,"model":"base:a@sha256:1"}'] * 2
        assert made.retries() == 1
        assert (await made.ask(post(b'{"n": 1.0, "model": "base"}'))).status == 200
        assert asked[-1].body == b'{"n": 1.0, "model": "base"}', "the base model's, as it came"
        await made.settled({"completed": 2})


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (answer(b'{"detail": "Not Found"}', status=b"404 Not Found"), "refused"),
        (answer(b"The model `other` does not exist.", status=b"404 Not Found"), "refused"),
        (answer(status=b"400 Bad Request"), "refused"),
        (answer(status=b"429 Too Many Requests"), "refused"),
        (answer(status=b"500 Internal Server Error"), "worker_failed"),
        (answer(status=b"302 Found"), "completed"),
        (answer(status=b"599 Whatever"), "worker_failed"),
    ],
)
@on_uvloop
async def test_other_statuses_are_the_clients_to_read(raw: bytes, outcome: str) -> None:
    async with plane(always(raw), always(raw)) as made:
        reply = await made.ask(post(b'{"model": "base:a"}'))
        assert reply.status == int(raw.split()[1])
        assert reply.body == body_of(raw)
        await made.settled({outcome: 1})
        assert made.retries() == 0


@on_uvloop
async def test_a_workers_word_does_not_replace_the_routers() -> None:
    raw = answer(
        b"{}", b"x-worker: evil", b"x-request-id: evil", b"X-Adapter: evil", b"server: uvicorn",
        b"Connection: keep-alive", b"keep-alive: timeout=5", b"x-own: kept", b"X-Own: twice",
    )  # fmt: skip
    async with plane(always(raw)) as made:
        client = await made.client()
        client.send(post(BODY, b"x-request-id: mine"))
        reply = await client.reply()
        assert reply.headers["x-worker"] == "w0"
        assert reply.headers["x-request-id"] == "mine"
        assert reply.headers["x-adapter"] == "none"
        assert b"evil" not in reply.raw
        assert b"uvicorn" not in reply.raw
        assert b"keep-alive" not in reply.raw.lower()
        assert reply.raw.lower().count(b"x-own: ") == 2
        client.close()


# Workers that die.


@pytest.mark.parametrize(
    "raw", [WHOLE, STREAM, TRAILERS, LARGE[:70]], ids=["whole", "stream", "trailers", "large"]
)
@on_uvloop
async def test_a_worker_that_dies_anywhere_is_made_good_or_cut(raw: bytes) -> None:
    """Before the first byte to the client it is retried, after that the answer is cut off."""
    for cut in range(len(raw)):
        async with plane(*once_each(raw[:cut], WHOLE, close=True)) as made:
            client = await made.client()
            client.send(post(BODY, b"connection: close"))
            got = await client.rest()
            outcome = {"completed": 1}
            if got.startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 55\r\n"):  # from the other one
                assert got.endswith(b"2}}")
                assert made.retries() == 1
            else:
                assert cut > raw.index(b"\r\n\r\n")
                with pytest.raises(h11.RemoteProtocolError):
                    body_of(got)  # no client takes it for whole
                outcome = {"worker_failed": 1}
                assert made.retries() == 0
            await made.settled(outcome)


@pytest.mark.parametrize("old", [False, True])
@on_uvloop
async def test_where_the_end_of_the_connection_is_that_of_the_answer_a_cut_is_a_reset(
    old: bool,
) -> None:
    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD + chunk(EVENTS[0]))
        await go_on.wait()
        reset(side)

    go_on = asyncio.Event()
    async with plane(script) as made:
        client = await made.client()
        client.send(post().replace(b"HTTP/1.1", b"HTTP/1.0") if old else post())
        await client.until(b"\n\n")
        go_on.set()
        assert await client.was_reset() is old
        await made.settled({"worker_failed": 1})


@on_uvloop
async def test_an_answer_to_the_end_of_a_connection_that_the_router_closes_is_a_reset() -> None:
    """As of a worker that is taken for gone: what has come is no whole answer."""
    stay = asyncio.Event()

    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(TO_THE_END)
        await stay.wait()

    async with plane(script) as made:
        client = await made.client()
        client.send(post())
        await client.until(b"[DONE]\n\n")
        made.pool.links["w0"].upstreams.close()
        assert await client.was_reset()
        await made.settled({"worker_failed": 1})


FULL = b"x-lorayard-refused: full"
REFUSALS = {
    "short": answer(b"{}", FULL, status=b"503 Service Unavailable"),
    "long": b"HTTP/1.1 503 No\r\n%b\r\ncontent-length: 100000000\r\n\r\n" % FULL + b"x" * 1000,
    "without an end": b"HTTP/1.1 503 No\r\n%b\r\n\r\n" % FULL + b"x" * 1000,
    "in chunks": STREAM_HEAD.replace(b"200 OK", b"503 No\r\n" + FULL) + chunk(b"x" * 1000),
}


@pytest.mark.parametrize("raw", REFUSALS.values(), ids=REFUSALS)
@on_uvloop
async def test_a_refusal_costs_no_retry_and_its_content_is_not_waited_for(raw: bytes) -> None:
    async with plane(*once_each(raw, WHOLE), max_retries=0) as made:
        reply = await made.ask(post(b'{"model": "base", "prompt": "' + b"y" * 100_000 + b'"}'))
        assert reply.status == 200
        await made.settled({"completed": 1})
        assert made.retries() == 0


@on_uvloop
async def test_a_recording_counts_retries_and_no_refusals(tmp_path: Path) -> None:
    gone = answer(b"{}", b"x-lorayard-refused: adapter_gone", status=b"503 Service Unavailable")
    failed = answer(status=b"503 Service Unavailable")
    async with plane(*once_each(gone, failed, WHOLE)) as made:
        config = RecordConfig(path=str(tmp_path / "traffic.jsonl"))
        made.frontend._recorder = recorder = Recorder.open(config, made.metrics)
        assert (await made.ask(post(b'{"model": "base:a"}'))).status == 200
        await made.settled({"completed": 1})
        await recorder.aclose()
        (row,) = map(json.loads, (tmp_path / "traffic.jsonl").read_bytes().splitlines())
        assert row["extra"]["retries"] == made.retries() == 1


def reset(side: WorkerSide) -> None:
    """End a connection as a machine does that has lost it."""
    sock = side.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.abort()


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", WHOLE[:-1], TO_THE_END])
@on_uvloop
async def test_a_reset_is_a_failure_at_every_stage(sent: bytes) -> None:
    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(sent)
        await side.writer.drain()
        if sent is TO_THE_END:
            await go_on.wait()
        reset(side)

    go_on = asyncio.Event()
    async with plane(script, max_retries=0) as made:
        client = await made.client()
        client.send(post())
        if sent is TO_THE_END:
            await client.until(b"[DONE]\n\n")
            go_on.set()
            assert await client.was_reset()
        else:
            assert (await client.reply()).status == 502
        await made.settled({"worker_failed": 1})


@on_uvloop
async def test_a_worker_that_is_not_there_or_hangs_up_at_once() -> None:
    async def script(side: WorkerSide) -> None:
        reset(side)

    async with plane(script) as made:
        assert (await made.ask()).status == 502
        await made.workers[0].stop()
        reply = await made.ask()
        assert reply.status == 502
        assert b"refused" in reply.body.lower() or b"connect" in reply.body.lower()
        await made.settled({"worker_failed": 2})


@on_uvloop
async def test_a_connection_that_closes_between_requests_costs_nothing() -> None:
    """Not a retry, and not a request: over a new one it is sent again."""
    async with plane(always(WHOLE, close=True)) as made:
        client = await made.client()
        for _ in range(200):
            client.send(post())
            assert (await client.reply()).status == 200
        client.close()
        await made.settled({"completed": 200})
        assert made.retries() == 0
        assert len(made.workers[0].sides) >= 200


@on_uvloop
async def test_a_kept_connection_that_closes_as_it_is_asked_costs_nothing() -> None:
    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(WHOLE)
        await side.asked()
        reset(side)  # with the second request unanswered

    async with plane(script, max_retries=0) as made:
        for _ in range(20):
            assert (await made.ask()).status == 200
        await made.settled({"completed": 20})
        assert len(made.workers[0].sides) == 20


@on_uvloop
async def test_a_worker_that_says_it_closes_is_not_asked_on_that_connection_again() -> None:
    raw = answer(b"{}", b"connection: close")
    async with plane(always(raw)) as made:
        for _ in range(3):
            reply = await made.ask()
            assert "connection" not in reply.headers
        await made.settled({"completed": 3})
        assert len(made.workers[0].sides) == 3


@on_uvloop
async def test_what_a_worker_sends_unasked_is_nobodys() -> None:
    async def script(side: WorkerSide) -> None:
        if side.number == 0:
            await side.asked()
            side.send(WHOLE)
            await go_on.wait()
            side.send(answer(b"poison"))
        await always(WHOLE)(side)

    go_on = asyncio.Event()
    async with plane(script) as made:
        assert (await made.ask()).body == body_of(WHOLE)
        go_on.set()
        await until(lambda: not made.upstreams())
        assert (await made.ask()).body == body_of(WHOLE)
        await made.settled({"completed": 2})


# Workers that stall.


@on_a_clock_that_jumps
async def test_a_worker_that_stalls_before_its_head_is_504_once_no_retry_is_left() -> None:
    for sent in (b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"):

        async def script(side: WorkerSide, sent: bytes = sent) -> None:
            await side.asked()
            side.send(sent)
            await side.gone()

        async with plane(script, max_retries=1, first_byte_timeout_s=30.0) as made:
            client = await made.client()
            client.send(post())
            for number in range(2):
                await made.workers[0].side(number)
                await until(lambda: [one for one in made.upstreams() if one._reader])
                forward(31)
            reply = await client.reply()
            assert reply.status == 504
            assert b'"worker_stalled"' in reply.body
            await made.settled({"worker_stalled": 1})
            assert made.retries() == 1
            client.close()


@on_a_clock_that_jumps
async def test_a_worker_that_stalls_within_its_answer_is_cut_off() -> None:
    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD + chunk(EVENTS[0]))
        await side.gone()

    async with plane(script, idle_timeout_s=30.0) as made:
        client = await made.client()
        client.send(post())
        await client.until(b"\n\n")
        forward(31)
        with pytest.raises(h11.RemoteProtocolError):
            body_of(STREAM_HEAD + await client.rest())
        await made.settled({"worker_stalled": 1})


@on_a_clock_that_jumps
async def test_a_short_answer_that_stalls_is_made_good() -> None:
    left = [WHOLE[:-1], WHOLE]

    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(left.pop(0))
        await side.gone()

    async with plane(script, script, idle_timeout_s=30.0) as made:
        client = await made.client()
        client.send(post())
        await until(lambda: [one for one in made.upstreams() if one._in_body])
        forward(31)
        assert (await client.reply()).status == 200
        client.close()
        await made.settled({"completed": 1})
        assert made.retries() == 1


@on_a_clock_that_jumps
async def test_a_stream_may_last_for_hours() -> None:
    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD)
        for _ in range(100):
            side.send(chunk(EVENTS[0]))
            await step.wait()
            step.clear()
        side.send(STREAM_END)

    step = asyncio.Event()
    async with plane(script, idle_timeout_s=30.0) as made:
        client = await made.client()
        client.send(post())
        await client.until(b"\r\n\r\n")
        for _ in range(100):
            await client.until(b"\n\n\r\n")
            forward(29)
            step.set()
        assert await client.exactly(5) == STREAM_END
        await made.settled({"completed": 1})


# Cancellation, at the worst of times.


@on_asyncio
async def test_a_client_that_leaves_as_its_answer_ends_takes_no_connection_of_anothers() -> None:
    """The answer ends, its connection is asked again, and only then does who has left find out."""
    async with plane(Silent(), max_ongoing=2) as made:
        first, second = await made.client(), await made.client()
        first.send(post())
        await until(lambda: made.upstreams() and made.upstream()._reader is not None)
        upstream = made.upstream()
        (leaving,) = [one for one in made.frontend.connections if one._busy]
        second.send(post()[:-1])
        await until(lambda: sum(one._reading.name == "BODY" for one in made.frontend.connections))
        (staying,) = [one for one in made.frontend.connections if one is not leaving]
        # In one turn of the loop: the second begins, the first one's answer ends, its client goes.
        staying.data_received(post()[-1:])
        upstream.data_received(WHOLE)
        leaving.connection_lost(None)
        await until(lambda: upstream._reader is not None or len(made.upstreams()) > 1)
        (asked,) = [one for one in made.upstreams() if one._reader is not None]
        asked.data_received(WHOLE)
        assert (await second.reply()).status == 200
        first.close()
        second.close()
        await until(lambda: made.frontend.in_flight == 0)


@on_uvloop
async def test_a_client_that_leaves_while_the_worker_is_connected_to() -> None:
    """The worker's queue of connections is full: the router waits for it to accept."""
    with socket.socket() as deaf, socket.socket() as filler:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        filler.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(filler, deaf.getsockname())
        async with plane(Silent()) as made:
            link = made.pool.links["w0"]
            link.upstreams._port = deaf.getsockname()[1]
            client = await made.client()
            client.send(post())
            await until(lambda: made.in_flight == 1)
            client.abort()
            await made.settled({"client_gone": 1})
            assert not made.upstreams()


# Size and speed.


@on_uvloop
async def test_a_huge_chunk_passes_a_slow_client_in_bounded_memory() -> None:
    size = 64 << 20

    async def script(side: WorkerSide) -> None:
        await side.asked()
        side.send(STREAM_HEAD.replace(b"text/event-stream", b"application/json"))
        side.send(b"%x\r\n" % size)
        for _ in range(64):
            side.send(b"z" * (1 << 20))
            await side.writer.drain()
        side.send(b"\r\n" + STREAM_END)

    async with plane(script) as made:
        client = await made.client(receive_buffer=1 << 16)
        client.send(post())
        await client.until(b"\r\n\r\n")
        await client.until(b"\r\n")
        await until(lambda: made.upstream().paused)
        left, most = size, 0
        while left:
            got = await client.reader.read(min(left, 1 << 20))
            assert got.count(b"z") == len(got)
            left -= len(got)
            transport = made.connection()._transport
            assert transport is not None
            most = max(most, transport.get_write_buffer_size())
        assert await client.exactly(7) == b"\r\n" + STREAM_END
        assert most < 1 << 19
        await made.settled({"completed": 1})


@pytest.mark.parametrize("unix", [False, True])
@on_uvloop
async def test_large_both_ways(unix: bool, tmp_path: Path) -> None:
    seen = []

    async def script(side: WorkerSide) -> None:
        while True:
            asked = await side.asked()
            seen.append(len(asked.body))
            side.send(answer(asked.body, b"content-type: application/json"))
            await side.writer.drain()

    body = b'{"model": "base", "prompt": "%b"}' % (b"p" * (10 << 20))
    async with plane(script, unix=tmp_path if unix else None) as made:
        client = await made.client()
        for _ in range(2):
            client.send(post(body))
            assert (await client.reply()).body == body
        client.close()
        await made.settled({"completed": 2})
        assert len(made.workers[0].sides) == 1
    assert seen == [len(body)] * 2


@on_asyncio
async def test_on_asyncios_own_loop_it_is_the_same() -> None:
    async with plane(always(STREAM)) as made:
        client = await made.client()
        for _ in range(10):
            client.send(post())
            assert (await client.reply()).body == b"".join(EVENTS)
        client.close()
        await made.settled({"completed": 10})


# What is left behind.


@on_uvloop
async def test_requests_and_connections_leave_nothing_for_the_collector() -> None:
    async with plane(always(STREAM)) as made:

        async def round_() -> None:
            for _ in range(20):
                assert (await made.ask()).status == 200
            await until(lambda: not made.frontend.connections)

        await round_()
        gc.collect()
        gc.disable()
        try:
            await round_()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            kinds = {type(one).__name__ for one in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        ours = {"ClientConnection", "Upstream", "Request", "Exchange", "Passage", "Answer"}
        assert not kinds & ours


@on_uvloop
async def test_what_clients_do_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with plane(always(STREAM_HEAD + chunk(EVENTS[0]))) as made:
        for request in (
            post(),
            post(b"{"),
            post(path=b"/v1/%00"),
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0",
        ):
            client = await made.client()
            client.send(request)
            await client.exactly(1)
            client.abort()
        await until(lambda: not made.frontend.connections)
        await made.settled()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@on_uvloop
async def test_an_idle_connection_holds_no_body() -> None:
    async with plane(always(STREAM_HEAD + chunk(EVENTS[0]))) as made:
        client = await made.client()
        client.send(post(b'{"model": "base", "prompt": "%b"}' % (b"p" * 100_000)))
        await client.until(EVENTS[0])
        assert made.connection()._request.body == b""  # no other worker will be asked


@pytest.mark.parametrize("error", [WorkerFailedError("it"), WorkerStalledError("it")])
@on_asyncio
async def test_a_connection_that_is_lost_before_it_is_asked_fails(
    error: WorkerFailedError | WorkerStalledError,
) -> None:
    pool = UpstreamPool("http://worker:1", None, "r0")
    upstream = Upstream(pool, asyncio.get_running_loop())
    upstream.connection_made(Line())  # type: ignore[arg-type]
    upstream.connection_lost(None)
    passage = Passage(
        Told(), asyncio.get_running_loop(), chunked=True, last=False, stamps=b"",
        adapter=b"", answer=Answer(lambda: 1.0),
        on_first_byte=lambda: None, on_first_token=lambda: None,
    )  # fmt: skip
    upstream.ask(passage, b"", b"", first_byte_timeout_s=9, idle_timeout_s=9)
    with pytest.raises(WorkerFailedError):
        await passage.over
