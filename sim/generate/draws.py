"""Draws from distributions, each from `Random.random` alone (see the package for why)."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Generic, TypeVar

Item = TypeVar("Item")


def exponential(rng: Random) -> float:
    """Exponential with mean 1."""
    return -math.log(1.0 - rng.random())


def normal(rng: Random) -> float:
    """Standard normal (Box and Muller, 1958)."""
    radius = math.sqrt(2.0 * exponential(rng))
    return radius * math.cos(2.0 * math.pi * rng.random())


def gamma(rng: Random, shape: float) -> float:
    """Gamma with scale 1, so with mean `shape` (Marsaglia and Tsang, 2000)."""
    if shape < 1.0:
        # Their section 6: a draw of one shape more, times a power of a uniform one.
        return float(gamma(rng, shape + 1.0) * (1.0 - rng.random()) ** (1.0 / shape))
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = normal(rng)
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(1.0 - rng.random()) < 0.5 * x * x + d - d * v + d * math.log(v):
            return d * v


class Weighted(Generic[Item]):
    """Draws items in proportion to their weights."""

    def __init__(self, weights: Sequence[tuple[Item, float]]) -> None:
        self._items = [item for item, _ in weights]
        self._cumulated = list(accumulate(weight for _, weight in weights))
        assert self._cumulated[-1] > 0

    def draw(self, rng: Random) -> Item:
        """One item."""
        at = rng.random() * self._cumulated[-1]
        # The last item's bound is left out: the product may be rounded up to it.
        return self._items[bisect_right(self._cumulated, at, 0, len(self._items) - 1)]
