"""The bytes that engines send, made beforehand, and how a client knows them again.

A token's event carries the number of its step and the moment it was sent, as its text: a client can
tell that no token was lost, doubled or swapped, and how long each was on its way, and a router cannot
tell it from any other token. All else of an answer is constant and must arrive byte for byte.
"""

import json
import time
from typing import Any, Final

import msgspec

BASE: Final = "bench"
ADAPTERS: Final = tuple(f"adapter-{number:02d}" for number in range(16))
MODELS: Final = tuple(f"{BASE}:{name}" for name in ADAPTERS)
WORKERS: Final = 8
PATH: Final = "/v1/chat/completions"
PROMPT: Final = "What is the capital of France?"
USAGE: Final = {"prompt_tokens": 14, "total_tokens": 22, "completion_tokens": 8}
STEP_DIGITS: Final = 8
SENT_DIGITS: Final = 20

_MARK: Final = "@"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:  # noqa: ANN401
    head = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": BASE,
    }
    return b"data: " + _json({**head, "choices": choices, **more}) + b"\n\n"


ANSWER: Final = _json(
    {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion",
        "created": 1790000000,
        "model": BASE,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris."},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
)
_TOKEN: Final = _event(
    [{"index": 0, "delta": {"content": _MARK}, "logprobs": None, "finish_reason": None}]
)
TOKEN_HEAD, TOKEN_TAIL = _TOKEN.split(_MARK.encode())
STAMP_LENGTH: Final = STEP_DIGITS + 1 + SENT_DIGITS
TOKEN_LENGTH: Final = len(TOKEN_HEAD) + STAMP_LENGTH + len(TOKEN_TAIL)
LAST: Final = _event([], usage=USAGE) + b"data: [DONE]\n\n"
_TOKEN_CHUNK_HEAD: Final = b"%x\r\n" % TOKEN_LENGTH + TOKEN_HEAD
_TOKEN_CHUNK_TAIL: Final = TOKEN_TAIL + b"\r\n"

END_OF_CHUNKS: Final = b"0\r\n\r\n"
LAST_CHUNKS: Final = (
    _chunk(LAST.partition(b"\n\n")[0] + b"\n\n") + _chunk(b"data: [DONE]\n\n") + END_OF_CHUNKS
)
STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def whole(body: bytes, status: str = "200 OK") -> bytes:
    """An answer with a length."""
    head = f"HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


def token_chunk(step: int) -> bytes:
    """A step's token, in chunked coding, stamped with the present moment."""
    stamp = b"%08d %020d" % (step, time.monotonic_ns())
    return b"".join((_TOKEN_CHUNK_HEAD, stamp, _TOKEN_CHUNK_TAIL))


def stamp_of(event: bytes) -> tuple[int, int] | None:
    """The step of a token's event and the moment it was sent, in ns; None for any other bytes."""
    if len(event) != TOKEN_LENGTH or not (
        event.startswith(TOKEN_HEAD) and event.endswith(TOKEN_TAIL)
    ):
        return None
    step, _, sent = event[len(TOKEN_HEAD) : -len(TOKEN_TAIL)].partition(b" ")
    return (int(step), int(sent)) if step.isdigit() and sent.isdigit() else None


class Asked(msgspec.Struct):
    """What an engine reads of a request. `seed` is the time between tokens, in milliseconds.

    A field of its own would be dropped by routers that read a body into a type and write it again.
    """

    stream: bool = False
    max_tokens: int = 1
    seed: int = 20


def request(model: str, host: str, *, tokens: int = 8, every_ms: int | None = None) -> bytes:
    """A chat request, head and body; streamed where the time between tokens is given."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    if every_ms is not None:
        body |= {"stream": True, "stream_options": {"include_usage": True}, "seed": every_ms}
    text = _json(body)
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\naccept: */*\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text
