"""A mean over seeds with its 95% confidence interval: how much of a figure is luck.

The interval is Student's, mean ± t(n-1) × s / √n, for the mean over seeds of one replay's figure. It
covers what the seed draws (adapters, ties in placement), not whether the trace or the calibration is
right. Where one seed gives infinity, the mean is infinite: that is None, as in a single result.
"""

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

import msgspec

# Two-sided 95% quantiles of Student's t by degrees of freedom (Abramowitz and Stegun, table 26.10).
# Between two rows the one above is taken, which is the wider interval.
T_95: Final[dict[int, float]] = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110,
    18: 2.101, 19: 2.093, 20: 2.086, 21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064, 25: 2.060,
    26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980,
}  # fmt: skip
_DEGREES: Final = tuple(T_95)


class Estimate(msgspec.Struct, frozen=True):
    """A mean over `seeds` values. `half` is half the interval, None where one seed gives none."""

    mean: float | None
    half: float | None
    seeds: int

    @property
    def low(self) -> float:
        """The interval's lower end; the mean itself where there is no interval."""
        return math.inf if self.mean is None else self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """The interval's upper end; the mean itself where there is no interval."""
        return math.inf if self.mean is None else self.mean + (self.half or 0.0)


def t_95(degrees: int) -> float:
    """Student's t, two-sided 95%, for `degrees` of freedom, from 1."""
    assert degrees > 0, degrees
    return T_95[_DEGREES[bisect_right(_DEGREES, degrees) - 1]]


def estimate(values: Sequence[float | None]) -> Estimate:
    """The mean of one value a seed, and its interval."""
    assert values, "at least one seed"
    known = [value for value in values if value is not None]
    count = len(values)
    if len(known) < count:
        return Estimate(None, None, count)
    mean = math.fsum(known) / count
    if count == 1:
        return Estimate(mean, None, 1)
    half = t_95(count - 1) * statistics.stdev(known) / math.sqrt(count)
    return Estimate(mean, half, count)


def paired(values: Sequence[float | None], base: Sequence[float | None]) -> Estimate:
    """The mean difference to `base`, seed by seed.

    Both replays of a seed have the same requests, so what these have in common cancels out: the
    interval is much narrower than that of two means, and where it leaves out 0 they differ.
    """
    pairs = zip(values, base, strict=True)
    return estimate([None if one is None or other is None else one - other for one, other in pairs])
