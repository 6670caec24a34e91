"""Engines that cost nothing: worker endpoints that answer at once, in bytes made beforehand.

All of them are one process, on one loop and few timers. Each speaks the protocol of this project's
engine workers, with adapters and pushed state, and what other routers ask of a vLLM or SGLang server
before they trust it. Streams go by steps, as an engine's batch does: at each step every stream of it
gets one token, the same bytes. A step is at most `STEP_MAX_MS` long, and streams that want a token less
often are spread over as many steps.

`python -m benchmarks.data_plane.engines N` prints the ports and ends with its standard input.
"""

import asyncio
import contextlib
import os
import sys
import time
from typing import Final, cast

import httptools
import msgspec
import uvloop

from benchmarks.data_plane.wire import (
    ANSWER,
    BASE,
    LAST_CHUNKS,
    MODELS,
    PATH,
    STREAM_HEAD,
    Asked,
    token_chunk,
    whole,
)
from engine_worker.protocol import (
    ADAPTERS,
    BUSY_PERIOD_S,
    HEALTH,
    IDLE_PERIOD_S,
    INFO,
    LOAD,
    STATE,
    UNLOAD,
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    State,
    UnloadRequest,
)

STEP_MAX_MS: Final = 50
BACKLOG: Final = 4096
MAX_MODEL_LEN: Final = 8192
RANK_MAX: Final = 8

_ANSWER: Final = whole(ANSWER)
_MISSING: Final = whole(b'{"detail":"Not Found"}', "404 Not Found")
_encode: Final = msgspec.json.Encoder().encode
_asked: Final = msgspec.json.Decoder(Asked).decode
_load: Final = msgspec.json.Decoder(LoadRequest).decode
_unload: Final = msgspec.json.Decoder(UnloadRequest).decode


def _constants() -> dict[str, bytes]:
    """What routers ask for before they send requests."""
    base = {"id": BASE, "object": "model", "owned_by": "vllm", "root": BASE, "parent": None}
    models = [{**base, "max_model_len": MAX_MODEL_LEN}]
    models += [{**base, "id": name, "parent": BASE} for name in MODELS]
    facts = {
        "model_path": BASE,
        "served_model_name": BASE,
        "tokenizer_path": BASE,
        "is_generation": True,
        "max_model_len": MAX_MODEL_LEN,
    }
    return {
        HEALTH: whole(b""),
        "/health_generate": whole(b""),
        "/ping": whole(b""),
        "/version": whole(b'{"version":"0.32.0"}'),
        "/v1/models": whole(_encode({"object": "list", "data": models})),
        "/get_model_info": whole(_encode(facts)),
        "/model_info": whole(_encode(facts)),
        "/get_server_info": whole(_encode(facts)),
        "/server_info": whole(_encode(facts)),
    }


CONSTANTS: Final = _constants()


class Spoke:
    """Streams that get their tokens at the same steps."""

    def __init__(self, every_s: float, phase_s: float) -> None:
        self._every_s = every_s
        self._phase_s = phase_s
        self._streams: list[Connection] = []
        self._step = 0
        self._timer: asyncio.TimerHandle | None = None

    def join(self, stream: "Connection") -> None:
        """Give a stream a token from the next step on."""
        self._streams.append(stream)
        if self._timer is None:
            self._next()

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        passed = (now - self._phase_s) // self._every_s
        at = self._phase_s + (passed + 1) * self._every_s
        self._timer = loop.call_later(at - now, self._tick)

    def _tick(self) -> None:
        self._step += 1
        chunk = token_chunk(self._step)
        last = chunk + LAST_CHUNKS
        ended = False
        for stream in self._streams:
            stream.left -= 1
            if stream.left > 0:
                stream.transport.write(chunk)
            else:
                ended = True
                if not stream.transport.is_closing():
                    stream.transport.write(last)
                stream.engine.running -= 1
        if ended:
            self._streams = [stream for stream in self._streams if stream.left > 0]
        self._timer = None
        if self._streams:
            self._next()


class Engine:
    """One worker endpoint. `phase` is where in a step it is, of 0 to 1, relative to the others."""

    def __init__(self, phase: float) -> None:
        self.running = 0
        self._phase = phase
        self._wheels: dict[int, list[Spoke]] = {}
        self._joined = 0
        self._seq = 0
        self._gpu: dict[AdapterId, None] = {}
        self._followers: set[Connection] = set()
        self._told_at = 0.0

    def begin(self, stream: "Connection", every_ms: int) -> None:
        """Stream tokens, one each `every_ms`."""
        wheel = self._wheels.get(every_ms)
        if wheel is None:
            count = max(1, every_ms // STEP_MAX_MS)
            every_s = every_ms / 1000
            spokes = range(count)
            wheel = [Spoke(every_s, every_s * (n + self._phase) / count) for n in spokes]
            self._wheels[every_ms] = wheel
        self.running += 1
        self._joined += 1
        wheel[self._joined % len(wheel)].join(stream)

    def info(self) -> bytes:
        """What this worker is."""
        return whole(
            _encode(
                Info(
                    engine="fixed",
                    engine_version="1",
                    model_id=BASE,
                    max_loras=len(MODELS),
                    max_lora_rank=RANK_MAX,
                    pid=0,
                    max_model_len=MAX_MODEL_LEN,
                    max_num_seqs=4096,
                )
            )
        )

    def state(self) -> bytes:
        """The state, as JSON."""
        return _encode(State(seq=self._seq, running=self.running, gpu=tuple(self._gpu)))

    def load(self, body: bytes) -> bytes:
        """Load at once."""
        asked = _load(body)
        for adapter in asked.evict:
            self._gpu.pop(adapter, None)
        self._gpu[asked.adapter] = None
        return self._changed()

    def unload(self, body: bytes) -> bytes:
        """Unload at once."""
        self._gpu.pop(_unload(body).adapter, None)
        return self._changed()

    def _changed(self) -> bytes:
        self._seq += 1
        self._tell()
        return whole(_encode(LoadReply(self._seq)))

    def follow(self, follower: "Connection") -> None:
        """Push the state from now on."""
        self._followers.add(follower)
        self._tell()

    def left(self, connection: "Connection") -> None:
        """A connection has ended."""
        self._followers.discard(connection)

    def pulse(self, now: float) -> None:
        """Push the state where it is time."""
        period_s = BUSY_PERIOD_S if self.running else IDLE_PERIOD_S
        if now - self._told_at >= period_s * 0.9:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        line = self.state() + b"\n"
        chunk = b"%x\r\n%b\r\n" % (len(line), line)
        for follower in self._followers:
            follower.transport.write(chunk)


class Connection(asyncio.Protocol):
    """One connection from a router, kept alive."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.left = 0
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none, and does the same

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's)
        """Its stream, if it has one, ends at the next step."""
        self.left = min(self.left, 1)
        self.engine.left(self)

    def data_received(self, data: bytes) -> None:
        """Parse; what is no HTTP ends the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_url(self, url: bytes) -> None:
        """The request's target."""
        self._path = url.decode("latin-1").partition("?")[0]

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Answer."""
        body = b"".join(self._body)
        self._body.clear()
        write = self.transport.write
        if self._path == PATH:
            asked = _asked(body)
            if asked.stream:
                self.left = asked.max_tokens
                write(STREAM_HEAD)
                self.engine.begin(self, asked.seed)
            else:
                write(_ANSWER)
        elif self._path in CONSTANTS:
            write(CONSTANTS[self._path])
        else:
            self._control(body)

    def _control(self, body: bytes) -> None:
        engine = self.engine
        match self._path:
            case p if p == STATE:
                self.transport.write(STREAM_HEAD)
                engine.follow(self)
            case p if p == INFO:
                self.transport.write(engine.info())
            case p if p == ADAPTERS:
                self.transport.write(whole(engine.state()))
            case p if p == LOAD:
                self.transport.write(engine.load(body))
            case p if p == UNLOAD:
                self.transport.write(engine.unload(body))
            case _:
                self.transport.write(_MISSING)


async def serve(count: int) -> None:
    """Serve `count` workers until standard input ends."""
    loop = asyncio.get_running_loop()
    engines = [Engine(number / count) for number in range(count)]
    ports = []
    for engine in engines:
        # Bound at once, so that the loop keeps it.
        server = await loop.create_server(
            lambda engine=engine: Connection(engine),  # type: ignore[misc]
            "127.0.0.1",
            0,
            backlog=BACKLOG,
        )
        ports.append(server.sockets[0].getsockname()[1])
    ended = asyncio.Event()
    loop.add_reader(0, lambda: None if os.read(0, 1) else ended.set())
    print(*ports, flush=True)
    while not ended.is_set():
        now = time.monotonic()
        for engine in engines:
            engine.pulse(now)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), BUSY_PERIOD_S)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
