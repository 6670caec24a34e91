"""A made-up workload: its parameters, and its rows.

Each aspect draws from a generator of its own, so that another law of lengths leaves every arrival
and every adapter where it was: two workloads differ in what was changed, and in nothing else.

With sessions, a request goes on with one of the open sessions, or opens one, such that a session has
`turns` requests on average; it keeps its adapter and tenant. The arrivals stay as asked for, so a
session's turns are about `open / rate` seconds apart. Lengths do not grow from turn to turn.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from random import Random
from typing import Any, Final

import msgspec

from sim.generate.arrivals import US_PER_S, Arrivals, Flash, times_us
from sim.generate.draws import Weighted
from sim.generate.lengths import Lengths, Pair, drawing
from sim.traces.row import TraceRow
from sim.workload import AdapterDraw

# Another number for each change after which the same parameters give other rows.
GENERATION: Final = 1


class Adapters(msgspec.Struct, frozen=True):
    """How many, how unequal, and how often a recently used one comes again (see `sim.workload`)."""

    count: int
    zipf: float = 1.0
    locality: float = 0.8


class Sessions(msgspec.Struct, frozen=True):
    """Requests a session on average, and how many sessions are open at a time."""

    turns: float
    open: int = 64


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """All that the rows depend on. It ends after `requests` or `duration_s`, what comes first."""

    seed: int
    arrivals: Arrivals
    lengths: Lengths
    requests: int | None = None
    duration_s: float | None = None
    flashes: tuple[Flash, ...] = ()
    base: str | None = None
    adapters: Adapters | None = None
    sessions: Sessions | None = None
    tenants: tuple[tuple[str, float], ...] = (("", 1.0),)
    priorities: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def record(self) -> dict[str, Any]:
        """What the file says of itself."""
        return {"by": "python -m sim generate", "generation": GENERATION} | dict(
            msgspec.to_builtins(self)
        )


class _Session(msgspec.Struct, frozen=True):
    id: str | None
    tenant: str
    adapter: str | None


class _Users:
    """Who asks: sessions with a tenant and an adapter each, or single requests."""

    def __init__(self, workload: Workload) -> None:
        self._sessions = workload.sessions
        self._rng = Random(f"users:{workload.seed}")
        self._tenants = Weighted(workload.tenants)
        self._draw: AdapterDraw | None = None
        if (adapters := workload.adapters) is not None:
            self._draw = AdapterDraw(
                adapters.count,
                locality=adapters.locality,
                zipf=adapters.zipf,
                seed=workload.seed,
            )
        self._open: deque[_Session] = deque(maxlen=self._sessions.open if self._sessions else 0)
        self._numbers = count(1)

    def next(self, flash: Flash | None) -> _Session:
        """The session that the next request belongs to."""
        rng = self._rng
        if flash is not None and flash.adapter is not None:
            return _Session(None, self._tenants.draw(rng), flash.adapter)
        sessions = self._sessions
        if sessions is not None and self._open and rng.random() * sessions.turns >= 1.0:
            return self._open[int(rng.random() * len(self._open))]
        new = _Session(
            None if sessions is None else f"s{next(self._numbers)}",
            self._tenants.draw(rng),
            None if self._draw is None else self._draw.next(),
        )
        self._open.append(new)
        return new


def generate(workload: Workload, pairs: Sequence[Pair] = ()) -> Iterator[TraceRow]:
    """The rows, in order. `pairs` are the lengths of an `Empirical`'s trace."""
    users = _Users(workload)
    draw_lengths = drawing(workload.lengths, pairs, Random(f"lengths:{workload.seed}"))
    priorities = Weighted(workload.priorities)
    priority_rng = Random(f"priorities:{workload.seed}")
    base = workload.base or "base"
    end_us = None if workload.duration_s is None else workload.duration_s * US_PER_S
    arrivals = times_us(workload.arrivals, workload.flashes, workload.seed)
    for number, (at_us, flash) in enumerate(arrivals):
        if number == workload.requests or (end_us is not None and at_us >= end_us):
            return
        user = users.next(flash)
        inputs, outputs = draw_lengths()
        yield TraceRow(
            at_us / 1000,
            inputs,
            outputs,
            f"{base}:{user.adapter}" if user.adapter else workload.base,
            user.id,
            user.tenant,
            priorities.draw(priority_rng),
        )
