"""How long requests are, in tokens: by a law, or as in a real trace.

A prompt and its answer are not independent in real traffic, so a trace's lengths are drawn in pairs.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, assert_never

import msgspec

from sim.generate.draws import normal

LONGEST: Final = 131_072
Pair = tuple[int, int]


class Fixed(msgspec.Struct, frozen=True, tag="fixed", tag_field="law"):
    """Always as many."""

    tokens: int


class LogNormal(msgspec.Struct, frozen=True, tag="lognormal", tag_field="law"):
    """Log-normal by its mean and coefficient of variation, cut to 1 and `most`."""

    mean: float
    cv: float
    most: int = LONGEST


Law = Fixed | LogNormal


class Independent(msgspec.Struct, frozen=True, tag="independent", tag_field="kind"):
    """Prompt and answer each by a law of its own."""

    input: Law
    output: Law


class Empirical(msgspec.Struct, frozen=True, tag="empirical", tag_field="kind"):
    """Pairs of a trace, each as likely as any other. The file is named, and known by its digest."""

    source: str
    requests: int
    digest: str


Lengths = Independent | Empirical


def empirical(source: str, pairs: Sequence[Pair]) -> Empirical:
    """What to record of a trace's pairs."""
    digest = hashlib.blake2b(digest_size=8)
    for pair in pairs:
        digest.update(b"%d,%d\n" % pair)
    return Empirical(source, len(pairs), digest.hexdigest())


def drawing(lengths: Lengths, pairs: Sequence[Pair], rng: Random) -> Callable[[], Pair]:
    """What draws a request's prompt and answer. `pairs` are an `Empirical`'s."""
    match lengths:
        case Independent(inputs, outputs):
            prompt, answer = _drawing(inputs, rng), _drawing(outputs, rng)
            return lambda: (prompt(), answer())
        case Empirical(_, requests, _):
            assert len(pairs) == requests > 0
            return lambda: pairs[int(rng.random() * requests)]
        case _:
            assert_never(lengths)


def _drawing(law: Law, rng: Random) -> Callable[[], int]:
    match law:
        case Fixed(tokens):
            return lambda: tokens
        case LogNormal(mean, cv, most):
            variance = math.log(1.0 + cv * cv)
            middle, sigma = math.log(mean) - variance / 2.0, math.sqrt(variance)
            # Rounded to a millionth first: a half that a last bit decides is then no half.
            return lambda: min(
                most, max(1, round(round(math.exp(middle + sigma * normal(rng)), 6)))
            )
        case _:
            assert_never(law)
