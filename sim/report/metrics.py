"""The figures that answers are given in: their place in a result, their unit, which way is better."""

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Any, assert_never

import msgspec

from sim.report.intervals import Estimate


class Unit(Enum):
    """What a figure counts."""

    SECONDS = "s"
    SHARE = "%"
    RATE = "/s"
    COUNT = ""


class Metric(StrEnum):
    """A figure of a replay's result, by the name that `--slo` takes."""

    TTFT_P50 = "ttft_p50"
    TTFT_P90 = "ttft_p90"
    TTFT_P99 = "ttft_p99"
    TTFT_MEAN = "ttft_mean"
    ITL_P50 = "itl_p50"
    ITL_P90 = "itl_p90"
    ITL_P99 = "itl_p99"
    ITL_MEAN = "itl_mean"
    E2E_P50 = "e2e_p50"
    E2E_P90 = "e2e_p90"
    E2E_P99 = "e2e_p99"
    E2E_MEAN = "e2e_mean"
    GOODPUT = "goodput"
    ATTAINMENT = "attainment"
    HIT_RATE = "hit_rate"
    COLD_LOADS = "cold_loads"

    @property
    def unit(self) -> Unit:
        """What it counts."""
        match self:
            case Metric.GOODPUT:
                return Unit.RATE
            case Metric.ATTAINMENT | Metric.HIT_RATE:
                return Unit.SHARE
            case Metric.COLD_LOADS:
                return Unit.COUNT
            case _:
                return Unit.SECONDS

    @property
    def more_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return self in {Metric.GOODPUT, Metric.ATTAINMENT, Metric.HIT_RATE}

    @property
    def heading(self) -> str:
        """Its column's heading."""
        latency, _, rank = self.value.partition("_")
        match self.unit:
            case Unit.SECONDS:
                return f"{latency.upper()} {rank}"
            case Unit.RATE | Unit.SHARE | Unit.COUNT:
                return TITLES[self]
            case _ as never:
                assert_never(never)

    def of(self, result: Mapping[str, Any]) -> float | None:
        """Its value in a replay's result; None is infinite, or that there is none."""
        latency, _, rank = self.value.partition("_")
        match self:
            case Metric.GOODPUT:
                value = result["goodput_rps"]
            case Metric.ATTAINMENT:
                value = result["slo"]["attainment"]
            case Metric.HIT_RATE | Metric.COLD_LOADS:
                value = result["adapters"][self.value]
            case _:
                value = result[f"{latency}_s"][rank]
        return None if value is None else float(value)


TITLES = {
    Metric.GOODPUT: "goodput",
    Metric.ATTAINMENT: "SLO attained",
    Metric.HIT_RATE: "hit rate",
    Metric.COLD_LOADS: "cold loads",
}
# The columns of every table.
SHOWN = (
    Metric.TTFT_P50,
    Metric.TTFT_P99,
    Metric.E2E_P50,
    Metric.E2E_P99,
    Metric.GOODPUT,
    Metric.ATTAINMENT,
    Metric.HIT_RATE,
    Metric.COLD_LOADS,
)


class _Scale(msgspec.Struct, frozen=True):
    factor: float
    digits: int
    suffix: str


def _scale(unit: Unit, size: float) -> _Scale:
    match unit:
        case Unit.SECONDS:
            if size < 1:
                return _Scale(1000, 1 if size < 0.1 else 0, " ms")  # noqa: PLR2004
            return _Scale(1, 2 if size < 100 else 0, " s")  # noqa: PLR2004
        case Unit.SHARE:
            return _Scale(100, 1, "%")
        case Unit.RATE:
            return _Scale(1, 2, "/s")
        case Unit.COUNT:
            return _Scale(1, 0, "")
        case _ as never:
            assert_never(never)


def figure(metric: Metric, value: float | None) -> str:
    """One value for people to read; a dash where it is infinite, or there is none."""
    if value is None:
        return "-"
    scale = _scale(metric.unit, abs(value))
    return f"{value * scale.factor:,.{scale.digits}f}{scale.suffix}"


def interval(metric: Metric, value: Estimate, *, sign: bool = False) -> str:
    """A mean with half its interval, both in the mean's unit: `81.2 ±0.4 ms`."""
    if value.mean is None:
        return "-"
    scale = _scale(metric.unit, max(abs(value.mean), value.half or 0.0))
    mean = f"{value.mean * scale.factor:{'+' if sign else ''},.{scale.digits}f}"
    if value.half is None:
        return f"{mean}{scale.suffix}"
    return f"{mean} ±{value.half * scale.factor:,.{scale.digits}f}{scale.suffix}"
