r"""What an answer tells of its times and lengths, read off as it passes. Its bytes are not touched.

No chunk is parsed: that would cost a stream more than passing it on does. Of a stream the events are
counted by the blank line that ends each (a token's text holds none, since JSON writes a line's end as
`\n`), and its last few KiB are kept: `usage` is in the last event, where the client asked for it.
"""

import re
from collections.abc import Callable
from typing import Final

from router.telemetry.usage import Usage, read_usage

TAIL_BYTES: Final = 2048
TAIL_MAX_BYTES: Final = TAIL_BYTES * 3 // 2  # then it is cut to that: each stream holds one
EVENT_STREAM: Final = "text/event-stream"
EVENT_END: Final = b"\n\n"
DONE: Final = b"data: [DONE]"  # the last event of OpenAI's streams carries no token
USAGE: Final = b'"usage"'  # cannot stand in generated text: there JSON escapes the quotes
# Null in all events but the last; servers differ in the white space.
OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')


class Answer:
    """One answer on its way to a client. `clock` gives the times, in seconds."""

    __slots__ = ("_clock", "_events", "_read", "_tail", "_usage", "first_byte_at", "streamed")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tail: bytes | bytearray = b""
        self._events = 0
        self._usage: Usage | None = None
        self._read = (-1, -1)  # how far the answer had come when its usage was read
        self.streamed = False
        self.first_byte_at: float | None = None  # of a stream its body's, else its head's

    def whole(self, body: bytes) -> None:
        """An answer has come in one piece."""
        self.first_byte_at = self._clock()
        self._tail = body

    def begins(self, content_type: str) -> None:
        """The head of an answer has come; its body follows."""
        self._tail = bytearray()
        self.streamed = content_type.startswith(EVENT_STREAM)
        if not self.streamed:
            self.first_byte_at = self._clock()

    def passes(self, chunk: bytes) -> None:
        """A part of the body passes."""
        tail = self._tail
        assert isinstance(tail, bytearray), "passes() follows begins()"
        if self.first_byte_at is None:
            self.first_byte_at = self._clock()
        if self.streamed:
            self._events += chunk.count(EVENT_END)
            # The two halves of an event's end may come apart.
            if chunk.startswith(b"\n") and tail.endswith(b"\n") and not tail.endswith(EVENT_END):
                self._events += 1
        tail += chunk
        if len(tail) > TAIL_MAX_BYTES:
            del tail[:-TAIL_BYTES]

    @property
    def events(self) -> int:
        """Events of a stream that have passed: about one a token."""
        return self._events - 1 if self._events and DONE in self._tail else self._events

    def usage(self) -> Usage | None:
        """The engine's count, from the end of what has passed; None where it is not there."""
        come = (self._events, len(self._tail))
        if come != self._read:
            self._usage, self._read = self._find_usage(), come
        return self._usage

    def _find_usage(self) -> Usage | None:
        tail = self._tail
        end = len(tail)
        while (start := tail.rfind(USAGE, 0, end)) >= 0:
            found = OBJECT.match(tail, start)
            if found:
                return read_usage(bytes(tail[found.end() - 1 : found.end() + TAIL_BYTES]))
            end = start
        return None
