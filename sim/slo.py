"""What a fleet is asked for: `--slo ttft_p99=2s`, and whether a point of a sweep gives it.

A point meets a target when the whole interval over seeds does, not only the mean: a fleet that is
bought on a lucky seed is too small. Latencies are at most their target, everything else at least.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final

import msgspec

from router.config import ConfigError
from sim.report.intervals import Estimate
from sim.report.metrics import Metric, Unit, figure, interval

UNITS: Final[dict[Unit, dict[str, float]]] = {
    Unit.SECONDS: {"s": 1.0, "": 1.0, "ms": 1e-3},
    Unit.SHARE: {"": 1.0, "%": 1e-2},
    Unit.RATE: {"": 1.0, "/s": 1.0},
    Unit.COUNT: {"": 1.0},
}
SHAPES: Final = {
    Unit.SECONDS: "a time above 0, such as 2s or 150ms",
    Unit.SHARE: "a share from 0 to 1, such as 0.99 or 99%",
    Unit.RATE: "a rate of requests a second, such as 12.5",
    Unit.COUNT: "a number of at least 0",
}
AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z/%]*)")


class Verdict(IntEnum):
    """Whether a target is met, from worst to best: a point is as good as its worst target."""

    MISSED = 0
    UNSURE = 1  # the mean meets it, its interval does not
    MET = 2


class Target(msgspec.Struct, frozen=True):
    """One bound: at most `value` for a latency or a count, at least for what is better high."""

    metric: Metric
    value: float

    def __str__(self) -> str:
        relation = "≥" if self.metric.more_is_better else "≤"
        return f"{self.metric.heading} {relation} {figure(self.metric, self.value)}"

    def verdict(self, estimate: Estimate) -> Verdict:
        """Whether an estimate meets it."""
        if estimate.mean is None:
            return Verdict.MISSED
        if self.metric.more_is_better:
            sure, likely = estimate.low >= self.value, estimate.mean >= self.value
        else:
            sure, likely = estimate.high <= self.value, estimate.mean <= self.value
        return Verdict.MET if sure else Verdict.UNSURE if likely else Verdict.MISSED

    def margin(self, estimate: Estimate) -> str:
        """How far it is met or missed, in words, with its interval."""
        got = f"{self.metric.heading} is {interval(self.metric, estimate)}"
        if estimate.mean is None:
            lacking = (
                "there is no such figure"
                if self.metric is Metric.HIT_RATE
                else "infinite: too many requests were not answered"
            )
            return f"{self}: missed, {lacking}"
        word = {
            Verdict.MET: "met",
            Verdict.UNSURE: "met on average, but not for sure",
            Verdict.MISSED: "missed",
        }[self.verdict(estimate)]
        off = abs(estimate.mean - self.value)
        # A share of 99.8% against 99% is told by the difference, a time by the ratio.
        apart = (
            f"{off * 100:.1f} points"
            if self.metric.unit is Unit.SHARE
            else f"{off / self.value:.0%}"
            if self.value
            else figure(self.metric, off)
        )
        side = "off" if self.verdict(estimate) is Verdict.MISSED else "to spare"
        return f"{self}: {word}; {got}, {apart} {side}"


def verdict(targets: Sequence[Target], estimates: Mapping[Metric, Estimate]) -> Verdict:
    """The worst verdict over all targets; met where there are none."""
    return min(
        (target.verdict(estimates[target.metric]) for target in targets), default=Verdict.MET
    )


def parse_target(text: str) -> Target:
    """Read one `METRIC=VALUE`. Raises `ConfigError`."""
    name, equals, amount = (part.strip() for part in text.partition("="))
    if name not in list(Metric):
        close = difflib.get_close_matches(name, list(Metric), n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(Metric)}"
        raise ConfigError(f"--slo {text}: there is no figure `{name}`; {hint}")
    metric = Metric(name)
    found = AMOUNT.fullmatch(amount)
    factor = UNITS[metric.unit].get(found[2]) if found else None
    value = float(found[1]) * factor if found and factor is not None else -1.0
    most = 1.0 if metric.unit is Unit.SHARE else 1e9
    least = 1e-9 if metric.unit is Unit.SECONDS else 0.0
    if not equals or not least <= value <= most:
        raise ConfigError(f"--slo {text}: write {name}= and {SHAPES[metric.unit]}")
    return Target(metric, value)


def parse_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """Read all `--slo`. Raises `ConfigError`."""
    targets: dict[Metric, Target] = {}
    for text in texts:
        target = parse_target(text)
        if target.metric in targets:
            raise ConfigError(f"--slo {text}: {target.metric} is given twice; remove one")
        targets[target.metric] = target
    return tuple(targets.values())
