"""What is asked of a client, and what it saw: the words between the benchmark and its client process.

Times are in seconds unless a name says otherwise.
"""

from collections.abc import Sequence

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Requests to one server.

    `ports` are asked in turn: one for a router, one an engine without. `models` are in turn too.
    `limit_s` is when those that still run are given up.
    """

    ports: tuple[int, ...]
    models: tuple[str, ...]
    clients: int
    limit_s: float = 60.0


class Answers(Load, frozen=True, kw_only=True, tag="answers"):
    """Each client sends its next request when it has its answer, for `seconds`, or `each` times."""

    seconds: float = 0.0
    each: int = 0


class Streams(Load, frozen=True, kw_only=True, tag="streams"):
    """Each client reads `each` streams of `tokens`, one each `every_ms`, one after the other.

    `ramp_s` is the time over which clients begin. Delays and the rate are of the tokens that come
    between `from_s` and `to_s`, from the beginning; of all where that is 0.
    """

    tokens: int
    every_ms: int
    each: int = 1
    ramp_s: float = 0.0
    from_s: float = 0.0
    to_s: float = 0.0


class Spread(msgspec.Struct, frozen=True):
    """Percentiles, by the nearest rank."""

    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The percentiles of some values; zeros where there are none."""
        if not values:
            return cls()
        ranked = sorted(values)
        last = len(ranked) - 1
        return cls(ranked[round(last * 0.5)], ranked[round(last * 0.99)], ranked[last])


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one load saw.

    `good` are answers that came whole and byte for byte, of those `asked`; `wrong` says what was wrong
    with the others. `per_s` is of answers, or of a stream's tokens. `transit_s` is from the engine's
    step to the client, `late_s` by how much longer a gap between two tokens was at the client than at
    the engine.
    """

    per_s: float
    asked: int
    good: int
    wrong: str = ""
    latency_s: Spread = Spread()
    chunks: int = 0
    transit_s: Spread = Spread()
    late_s: Spread = Spread()
    peak_open: int = 0
