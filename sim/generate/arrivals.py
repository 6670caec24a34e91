"""When requests come, in whole microseconds.

Gaps are rounded before they are added up, so that no last bit of a machine's arithmetic can grow
into another arrival.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Final, assert_never

import msgspec

from sim.generate.draws import Weighted, exponential, gamma

US_PER_S: Final = 1_000_000


class Poisson(msgspec.Struct, frozen=True, tag="poisson", tag_field="process"):
    """Independent arrivals: exponential gaps."""

    rate_rps: float


class Gamma(msgspec.Struct, frozen=True, tag="gamma", tag_field="process"):
    """Gamma gaps with a coefficient of variation `cv`: above 1 bursts, below 1 a steady beat."""

    rate_rps: float
    cv: float


class State(msgspec.Struct, frozen=True):
    """A state of an MMPP: its rate, and how long it lasts on average."""

    rate_rps: float
    mean_s: float


class Mmpp(msgspec.Struct, frozen=True, tag="mmpp", tag_field="process"):
    """Markov-modulated Poisson: the rate of a state that lasts an exponential time, then the next's.

    States follow one another in their order, the first after the last; the first one is drawn by
    the share of time that each takes up.
    """

    states: tuple[State, ...]


class Diurnal(msgspec.Struct, frozen=True, tag="diurnal", tag_field="process"):
    """Poisson with a rate that swings as a sine: lowest at time 0, highest half a period later.

    `swing` 0.8 lets it go from 0.2 to 1.8 times `rate_rps`, the mean.
    """

    rate_rps: float
    swing: float
    period_s: float


Arrivals = Poisson | Gamma | Mmpp | Diurnal


class Flash(msgspec.Struct, frozen=True):
    """A crowd: for a while, `factor` times the mean rate; the additional requests are Poisson.

    They ask for `adapter`, or where it is None for what any other request might ask for.
    """

    at_s: float
    duration_s: float
    factor: float
    adapter: str | None = None


def mean_rps(arrivals: Arrivals) -> float:
    """Requests a second in the long run."""
    if isinstance(arrivals, Mmpp):
        # fsum: what `sum` makes of floats depends on the version of Python.
        total_s = math.fsum(state.mean_s for state in arrivals.states)
        return math.fsum(state.rate_rps * state.mean_s for state in arrivals.states) / total_s
    return arrivals.rate_rps


def times_us(
    arrivals: Arrivals, flashes: Sequence[Flash], seed: int
) -> Iterator[tuple[int, Flash | None]]:
    """Arrivals in order, without an end, in microseconds; and the crowd that each belongs to."""
    mean = mean_rps(arrivals)
    streams: list[Iterator[tuple[int, int]]] = [
        ((at, -1) for at in _regular(arrivals, Random(f"arrivals:{seed}")))
    ]
    streams += [
        _crowd(flash, number, mean, Random(f"flash:{number}:{seed}"))
        for number, flash in enumerate(flashes)
    ]
    for at, number in heapq.merge(*streams):
        yield at, None if number < 0 else flashes[number]


def _regular(arrivals: Arrivals, rng: Random) -> Iterator[int]:
    match arrivals:
        case Poisson(rate_rps):
            return _poisson(rate_rps, rng)
        case Gamma(rate_rps, cv):
            return _gamma(rate_rps, cv, rng)
        case Mmpp(states):
            return _mmpp(states, rng)
        case Diurnal():
            return _diurnal(arrivals, rng)
        case _:
            assert_never(arrivals)


def _poisson(rate_rps: float, rng: Random) -> Iterator[int]:
    at = 0
    while True:
        at += round(exponential(rng) / rate_rps * US_PER_S)
        yield at


def _gamma(rate_rps: float, cv: float, rng: Random) -> Iterator[int]:
    # A Gamma of shape k has a coefficient of variation of k ** -0.5.
    shape = 1.0 / (cv * cv)
    at = 0
    while True:
        at += round(gamma(rng, shape) / shape / rate_rps * US_PER_S)
        yield at


def _mmpp(states: Sequence[State], rng: Random) -> Iterator[int]:
    shares = [(number, state.mean_s) for number, state in enumerate(states)]
    number = Weighted(shares).draw(rng)
    at = begun = 0
    while True:
        state = states[number]
        ends = begun + round(exponential(rng) * state.mean_s * US_PER_S)
        # A Poisson process forgets: at a new state the wait for the next request starts anew.
        while state.rate_rps > 0.0:
            at += round(exponential(rng) / state.rate_rps * US_PER_S)
            if at >= ends:
                break
            yield at
        at = begun = ends
        number = (number + 1) % len(states)


def _diurnal(arrivals: Diurnal, rng: Random) -> Iterator[int]:
    """By thinning (Lewis and Shedler, 1979): at the highest rate, and only the due share kept."""
    highest = 1.0 + arrivals.swing
    period_us = round(arrivals.period_s * US_PER_S)
    for at in _poisson(arrivals.rate_rps * highest, rng):
        phase = 2.0 * math.pi * (at % period_us) / period_us
        if rng.random() * highest < 1.0 - arrivals.swing * math.cos(phase):
            yield at


def _crowd(flash: Flash, number: int, mean: float, rng: Random) -> Iterator[tuple[int, int]]:
    begins = round(flash.at_s * US_PER_S)
    ends = begins + round(flash.duration_s * US_PER_S)
    more_rps = (flash.factor - 1.0) * mean
    if more_rps <= 0.0:
        return
    for at in _poisson(more_rps, rng):
        if begins + at >= ends:
            return
        yield begins + at, number
