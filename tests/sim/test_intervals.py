"""Intervals over seeds, figures and targets, on numbers that can be checked by hand."""

import math
from random import Random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import ConfigError
from sim.report.intervals import T_95, Estimate, estimate, paired, t_95
from sim.report.metrics import Metric, figure, interval
from sim.slo import Target, Verdict, parse_target, parse_targets, verdict


def test_quantiles_of_t() -> None:
    # In closed form for one and two degrees of freedom, and the normal's for very many.
    assert t_95(1) == pytest.approx(math.tan(math.pi * 0.475), abs=5e-4)
    assert t_95(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), abs=5e-4)
    assert t_95(10_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=0.03)
    values = list(T_95.values())
    assert values == sorted(values, reverse=True)
    assert t_95(35) == t_95(30), "the wider of two rows"


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = Random(1)
    covered = 0
    for _ in range(2_000):
        sample = estimate([rng.gauss(3, 2) for _ in range(5)])
        covered += sample.low <= 3 <= sample.high
    assert 0.935 < covered / 2_000 < 0.965


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0], Estimate(2.0, None, 1)),
        ([1.0, 3.0], Estimate(2.0, pytest.approx(12.706), 2)),  # type: ignore[arg-type]
        ([2.0, 2.0, 2.0], Estimate(2.0, 0.0, 3)),
        ([1.0, None, 3.0], Estimate(None, None, 3)),
    ],
)
def test_estimates(values: list[float | None], expected: Estimate) -> None:
    assert estimate(values) == expected


@given(
    st.lists(st.floats(0, 1e3), min_size=2, max_size=9),
    st.floats(-5, 5),
)
def test_what_seeds_have_in_common_cancels_out(base: list[float], shift: float) -> None:
    difference = paired([value + shift for value in base], list(base))
    assert difference.mean == pytest.approx(shift, abs=1e-9)
    assert difference.half == pytest.approx(0, abs=1e-9)


def test_a_difference_to_infinity_is_none() -> None:
    assert paired([1.0, None], [1.0, 1.0]).mean is None


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        (Metric.TTFT_P99, 0.0123, "12.3 ms"),
        (Metric.TTFT_P99, 0.4321, "432 ms"),
        (Metric.E2E_P99, 12.3456, "12.35 s"),
        (Metric.TTFT_P99, None, "-"),
        (Metric.ATTAINMENT, 0.9876, "98.8%"),
        (Metric.GOODPUT, 4.567, "4.57/s"),
        (Metric.COLD_LOADS, 1234.4, "1,234"),
    ],
)
def test_figures_for_people(metric: Metric, value: float | None, text: str) -> None:
    assert figure(metric, value) == text


def test_an_interval_has_the_unit_of_its_mean() -> None:
    assert interval(Metric.TTFT_P50, Estimate(0.0812, 0.0004, 5)) == "81.2 ±0.4 ms"
    assert interval(Metric.TTFT_P50, Estimate(-0.2, 0.01, 5), sign=True) == "-200 ±10 ms"
    assert interval(Metric.HIT_RATE, Estimate(0.9, None, 1)) == "90.0%"
    assert interval(Metric.TTFT_P99, Estimate(None, None, 3)) == "-"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ttft_p99=2s", 2), ("ttft_p99=2", 2), ("itl_p99=100ms", 0.1), ("e2e_mean=1.5 s", 1.5),
        ("attainment=0.99", 0.99), ("attainment=99%", 0.99), ("hit_rate=80%", 0.8),
        ("goodput=12.5", 12.5), ("cold_loads=0", 0),
    ],
)  # fmt: skip
def test_targets(text: str, value: float) -> None:
    target = parse_target(text)
    assert target.value == pytest.approx(value)
    assert target.metric == text.partition("=")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft=2s", "there is no figure `ttft`; did you mean `ttft_p"),
        ("xyzzy=2s", "there is no figure `xyzzy`; known: ttft_p50"),
        ("ttft_p99", "write ttft_p99= and a time above 0, such as 2s or 150ms"),
        ("ttft_p99=2m", "a time above 0"),
        ("ttft_p99=0s", "a time above 0"),
        ("ttft_p99=-1s", "a time above 0"),
        ("attainment=99", "a share from 0 to 1, such as 0.99 or 99%"),
        ("attainment=2s", "a share from 0 to 1"),
    ],
)
def test_bad_targets(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_target(text)
    assert message in str(refused.value)


def test_a_target_is_given_once() -> None:
    with pytest.raises(ConfigError, match="ttft_p99 is given twice"):
        parse_targets(["ttft_p99=1s", "ttft_p99=2s"])


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (0.8, 0.1, Verdict.MET),
        (0.8, None, Verdict.MET),
        (0.95, 0.1, Verdict.UNSURE),
        (1.05, 0.1, Verdict.MISSED),
        (None, None, Verdict.MISSED),
    ],
)
def test_a_target_is_met_by_the_whole_interval(
    mean: float | None, half: float | None, expected: Verdict
) -> None:
    target = Target(Metric.TTFT_P99, 1.0)
    got = Estimate(mean, half, 3)
    assert target.verdict(got) is expected
    words = {Verdict.MET: ": met;", Verdict.UNSURE: "not for sure", Verdict.MISSED: ": missed"}
    assert words[expected] in target.margin(got)


def test_more_attainment_is_better_and_the_worst_target_decides() -> None:
    share = Target(Metric.ATTAINMENT, 0.99)
    assert share.verdict(Estimate(1.0, 0.0, 3)) is Verdict.MET
    assert share.verdict(Estimate(0.98, 0.0, 3)) is Verdict.MISSED
    estimates = {Metric.ATTAINMENT: Estimate(1.0, 0.0, 3), Metric.TTFT_P99: Estimate(3.0, 0.0, 3)}
    assert verdict([share, Target(Metric.TTFT_P99, 2.0)], estimates) is Verdict.MISSED
    assert verdict([], estimates) is Verdict.MET
