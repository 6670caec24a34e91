"""The clients: raw protocols on one loop, in a process of their own, idle but for the load.

A stream's pieces are kept with the moment of their arrival; framing, bytes and delays are looked at
when the load is over. `python -m benchmarks.data_plane.clients` reads a load a line from standard
input, prints a line when it has run and another with what was seen, and ends with its input.
"""

import asyncio
import contextlib
import gc
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final, cast

import httptools
import msgspec
import uvloop

from benchmarks.data_plane.loads import Answers, Seen, Spread, Streams
from benchmarks.data_plane.wire import ANSWER, END_OF_CHUNKS, LAST, request, stamp_of

OK: Final = 200
GOOD: Final = b"HTTP/1.1 200"
HOST: Final = "127.0.0.1"
WRONGS_SHOWN: Final = 3
Pieces = list[tuple[int, bytes]]


class Client(asyncio.Protocol):
    """One client and its connection. `done` is set when it has had all it wants, or cannot go on."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wrong = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none, and does the same
        self.begin()

    def begin(self) -> None:
        """Send the first request."""
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has closed, or this one has."""
        self.end(f"connection lost: {exc}" if exc else "connection closed")

    def end(self, wrong: str = "") -> None:
        """No more is wanted."""
        if not self.done.done():
            self.wrong = self.wrong or wrong
            self.done.set_result(None)
        self.transport.close()


class Asker(Client):
    """Sends a request when it has its answer."""

    def __init__(self, requests: list[bytes], first: int, each: int, until: float) -> None:
        super().__init__()
        self.latencies: list[float] = []
        self.asked = 0
        self.good = 0
        self._requests = itertools.cycle(requests[first:] + requests[:first])
        self._each = each
        self._until = until
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._sent_at = 0.0

    def begin(self) -> None:
        """Send the next request."""
        self.asked += 1
        self._sent_at = time.perf_counter()
        self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Parse."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.end(f"no HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        """A part of the answer."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        now = time.perf_counter()
        self.latencies.append(now - self._sent_at)
        body = b"".join(self._body)
        self._body.clear()
        status = self._parser.get_status_code()
        if body == ANSWER and status == OK:
            self.good += 1
        else:
            self.wrong = self.wrong or f"{status}: {body[:200].decode(errors='replace')}"
        if self.asked == self._each or now >= self._until:
            self.end()
        else:
            self.begin()


class Open:
    """How many streams have begun and not ended, and the most there were."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def one_more(self) -> None:
        """One has begun."""
        self.now += 1
        self.peak = max(self.peak, self.now)


class Reader(Client):
    """Reads streams, one after the other."""

    def __init__(self, requests: list[bytes], first: int, each: int, counted: Open) -> None:
        super().__init__()
        self.streams: list[Pieces] = []
        self.ended = 0
        self._requests = requests
        self._first = first
        self._each = each
        self._pieces: Pieces = []
        self._open = counted

    def begin(self) -> None:
        """Ask for the next stream."""
        number = self._first + len(self.streams)
        self._pieces = []
        self.streams.append(self._pieces)
        self.transport.write(self._requests[number % len(self._requests)])

    def data_received(self, data: bytes) -> None:
        """Keep the piece, and see whether it is the last."""
        if not self._pieces:
            self._open.one_more()
            if not data.startswith(GOOD):
                self._pieces.append((time.monotonic_ns(), data))
                self._ended()
                self.end()
                return
        self._pieces.append((time.monotonic_ns(), data))
        if data.endswith(END_OF_CHUNKS) or (
            len(data) < len(END_OF_CHUNKS) and self._tail().endswith(END_OF_CHUNKS)
        ):
            self._ended()
            if len(self.streams) == self._each:
                self.end()
            else:
                self.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """An end that is marked by closing is an end too; the bytes will tell."""
        if self._pieces and self.ended < len(self.streams):
            self._ended()
        super().connection_lost(exc)

    def _tail(self) -> bytes:
        return b"".join(data for _, data in self._pieces[-len(END_OF_CHUNKS) :])

    def _ended(self) -> None:
        self.ended += 1
        self._open.now -= 1


class Reading:
    """One stream, looked at afterwards: its events, what was wrong, and the delays of its tokens.

    Delays are of those that came within the window, in ns of the monotonic clock.
    """

    def __init__(self, pieces: Pieces, tokens: int, window: tuple[int, int]) -> None:
        self.transit_s: list[float] = []
        self.late_s: list[float] = []
        self._window = window
        self.chunks = 0
        self.wrong = ""
        self._text = b""
        self._at = 0
        self._last: tuple[int, int, int] | None = None  # step, sent, come
        self._complete = False
        parser = httptools.HttpResponseParser(self)
        try:
            for at, data in pieces:
                self._at = at
                parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.wrong = f"no HTTP: {error}"
            return
        if not pieces:
            self.wrong = "no answer"
        elif parser.get_status_code() != OK:
            self.wrong = f"{parser.get_status_code()}: {self._text[:200].decode(errors='replace')}"
        elif not self._complete:
            self.wrong = self.wrong or f"cut off after {self.chunks} tokens"
        elif self.chunks != tokens or self._text != LAST:
            self.wrong = self.wrong or f"{self.chunks} tokens, then {self._text[:200]!r}"

    def on_body(self, body: bytes) -> None:
        """Take the events that are whole."""
        text = self._text + body
        while (end := text.find(b"\n\n") + 2) > 1 and self._token(text[:end]):
            text = text[end:]
        self._text = text

    def on_message_complete(self) -> None:
        """The framing says that this is all."""
        self._complete = True

    def _token(self, event: bytes) -> bool:
        stamp = stamp_of(event)
        if stamp is None:
            return False
        step, sent = stamp
        transit_ns = self._at - sent
        within = self._window[0] <= self._at <= self._window[1]
        if within:
            self.transit_s.append(transit_ns / 1e9)
        if self._last is not None:
            before, sent_before, come_before = self._last
            if within:
                self.late_s.append((transit_ns - (come_before - sent_before)) / 1e9)
            if step != before + 1:
                self.wrong = self.wrong or f"step {step} after {before}"
        self._last = (step, sent, self._at)
        self.chunks += 1
        return True


async def run(load: Answers | Streams) -> Seen:
    """Run a load, tell that it has run, and look at what came."""
    wanted = [
        [
            request(model, f"{HOST}:{port}", tokens=load.tokens, every_ms=load.every_ms)
            if isinstance(load, Streams)
            else request(model, f"{HOST}:{port}")
            for model in load.models
        ]
        for port in load.ports
    ]
    gc.collect()
    gc.disable()
    try:
        if isinstance(load, Streams):
            return await _read(load, wanted)
        return await _ask(load, wanted)
    finally:
        gc.enable()


async def _ask(load: Answers, wanted: list[list[bytes]]) -> Seen:
    each = load.each or sys.maxsize
    started = time.perf_counter()
    until = started + load.seconds if load.seconds else float("inf")
    askers = [
        Asker(wanted[number % len(wanted)], number % len(load.models), each, until)
        for number in range(load.clients)
    ]
    wall_s = await _drive(load, list(askers), 0.0)
    _told()
    return Seen(
        per_s=sum(len(one.latencies) for one in askers) / wall_s,
        asked=sum(max(1, one.asked) for one in askers),
        good=sum(one.good for one in askers),
        wrong=_told_apart([one.wrong for one in askers]),
        latency_s=Spread.of([latency for one in askers for latency in one.latencies]),
    )


async def _read(load: Streams, wanted: list[list[bytes]]) -> Seen:
    counted = Open()
    readers = [
        Reader(wanted[number % len(wanted)], number, load.each, counted)
        for number in range(load.clients)
    ]
    started_ns = time.monotonic_ns()
    wall_s = await _drive(load, list(readers), load.ramp_s)
    _told()
    from_s, to_s = (load.from_s, load.to_s) if load.to_s else (0.0, wall_s)
    window = started_ns + int(from_s * 1e9), started_ns + int(to_s * 1e9)
    found = [Reading(pieces, load.tokens, window) for one in readers for pieces in one.streams]
    return Seen(
        per_s=sum(len(one.transit_s) for one in found) / (to_s - from_s),
        asked=load.clients * load.each,
        good=sum(not one.wrong for one in found),
        wrong=_told_apart([one.wrong for one in found] + [one.wrong for one in readers]),
        chunks=sum(one.chunks for one in found),
        transit_s=Spread.of([delay for one in found for delay in one.transit_s]),
        late_s=Spread.of([delay for one in found for delay in one.late_s]),
        peak_open=counted.peak,
    )


async def _drive(load: Answers | Streams, clients: list[Client], ramp_s: float) -> float:
    """Connect all clients and wait for all; those that are not done by the limit are given up."""
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def one(number: int, client: Client) -> None:
        if ramp_s:
            await asyncio.sleep(ramp_s * number / len(clients))
        port = load.ports[number % len(load.ports)]
        try:
            await loop.create_connection(lambda: client, HOST, port)
        except OSError as error:
            client.wrong = f"cannot connect: {error}"
            return
        await asyncio.shield(client.done)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(load.limit_s):
            await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))
    wall_s = loop.time() - started
    for client in clients:
        if not client.done.done():
            if hasattr(client, "transport"):
                client.end(f"given up after {load.limit_s:g} s")
            client.wrong = client.wrong or f"not connected within {load.limit_s:g} s"
    return wall_s


def _told_apart(wrongs: Iterable[str]) -> str:
    """The most frequent things that went wrong, with how often they did."""
    counted = Counter(wrong for wrong in wrongs if wrong)
    return "; ".join(f"{count} × {wrong}" for wrong, count in counted.most_common(WRONGS_SHOWN))


def _told() -> None:
    print("ran", flush=True)


def main() -> None:
    """Run loads until standard input ends."""
    decode = msgspec.json.Decoder(Answers | Streams).decode
    for line in sys.stdin:
        seen = uvloop.run(run(decode(line)))
        print(msgspec.json.encode(seen).decode(), flush=True)


if __name__ == "__main__":
    main()
