"""Pages: nothing is fetched, nothing escapes, and every chart is one that plotly knows."""

import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from plotly.offline import get_plotlyjs

from sim.experiment import Point
from sim.report import charts, pages
from sim.report.intervals import Estimate
from sim.report.metrics import Metric
from sim.report.page import Page
from sim.report.summary import CURVE_SHARES, Latencies, curve
from sim.report.table import BEST, Table
from sim.report.timeline import Held, ResidencyRow, Timeline
from sim.slo import Target

LINE = Timeline(
    at_s=(0.0, 1.0, 2.0),
    queued=(0, 3, 1),
    load_at_s=(0.0, 2.0),
    in_flight={"w-0": (1.0, 2.5), "w-1": (0.0, 1.0)},
    rate_at_s=(1.0, 2.0),
    hit_rate=(None, 0.5),
    cold_loads_per_s=(0.0, 2.0),
    residency_s=(0.0, 1.0, 2.0),
    residency=(ResidencyRow("w-0", "a", (0, 3, 2)), ResidencyRow("w-1", "b", (1, 1, 1))),
    omitted="Shown: some.",
)
CURVE = tuple(0.01 * (index + 1) for index in range(len(CURVE_SHARES)))


def figures(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="chart-\d+">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def a_point(**choice: str | int) -> Point:
    return Point(dict(choice), dict.fromkeys(Metric, (0.5, 0.6)), 3.0, (), (), CURVE, CURVE, LINE)


def every_page() -> dict[str, str]:
    points = [a_point(workers=1, slots=4), a_point(workers=2, slots=4), a_point(workers=2, slots=8)]
    target = (Target(Metric.TTFT_P99, 2.0), Target(Metric.ATTAINMENT, 0.9))
    table = Table(("", "p50"), (("a", BEST + "1 ms"), ("b", "-")), "figures")
    policies = [a_point(policy="a"), a_point(policy="b")]
    return {
        "compare": pages.compare_page("Policies", policies, "policy", [table], ["note"]),
        "sweep": pages.sweep_page(
            "Sweep", ["answer", "  more"], points, target, [table], shown=points[0], yaml="a: 1"
        ),
    }


@pytest.fixture(scope="module", params=["compare", "sweep"])
def page(request: pytest.FixtureRequest) -> str:
    return every_page()[request.param]


def test_nothing_is_fetched(page: str) -> None:
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page)
    assert "http" not in own.replace("http-equiv", "")
    assert not re.search(r"<(link|img|iframe|script[^>]* src)|@import|url\(|src=", own)
    # What the library might reach for, the browser refuses.
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', own)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert "connect-src" not in policy[1]


def test_a_page_has_both_themes_and_the_narrow_layout(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert '"light":' in page
    assert '"dark":' in page


def test_charts_are_what_plotly_knows(page: str) -> None:
    found = figures(page)
    assert len(found) > 6
    for figure in found:
        plotly.graph_objects.Figure(figure)
        assert "color" not in re.sub(r'"colorbar":', "", json.dumps(figure)), "that is a theme's"
    for theme in charts.THEMES.values():
        plotly.graph_objects.layout.Template(theme)


def test_infinity_has_no_place_on_a_curve() -> None:
    half = curve([1.0, 2.0], 4)
    chart = charts.distribution({"x": half, "none": [None] * len(CURVE_SHARES)}, "time")
    (line, empty) = chart["data"]
    assert max(line["y"]) == 0.5, "the rest was never answered"
    assert empty["x"] == []
    plotly.graph_objects.Figure(chart)


def test_an_axis_of_words_and_one_of_doublings() -> None:
    def kind(values: list[Any]) -> object:
        points = [(value, Estimate(0.5, 0.1, 3)) for value in values]
        return charts.against({"x": points}, "p", Metric.ATTAINMENT)["layout"]["xaxis"].get("type")

    assert kind(["a", "b"]) == "category"
    assert kind([4, 8, 64]) == "log"
    assert kind([0, 8, 64]) is None
    assert kind([2, 3, 4]) is None
    bars = charts.against({"x": [(1, Estimate(0.95, 0.2, 3))]}, "p", Metric.HIT_RATE)
    assert bars["data"][0]["error_y"]["array"] == [pytest.approx(0.05)], "no share is above 1"


def test_what_is_shown_is_bounded(tmp_path: Path) -> None:
    points = [a_point(workers=workers) for workers in range(1, 400)]
    page = pages.sweep_page("Many", [], points, (), [], shown=None)
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < 400_000
    assert "of 399 points" in own
    tmp_path.joinpath("x.html").write_text(page)


def test_text_is_escaped() -> None:
    page = Page("<script>alert(1)</script>")
    page.table(Table(("<b>",), (("</td><i>",),)))
    page.chart(charts.over_time({"</script><i>": ([0.0], [1.0])}, "y"), 'a "quoted" <i>')
    text = page.render().replace(get_plotlyjs(), "")
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert "</script><i>" not in text


def test_a_page_of_one_replay_with_nothing_answered() -> None:
    result = {
        "policy": "p", "seed": 0, "requests": 2, "completed": 0, "rejected": 2, "failed": 0,
        "unfinished": 0, "goodput_rps": 0.0, "calibrations": {}, "digest": "d", "workers": [],
        "ttft_s": dict.fromkeys(("mean", "p50", "p90", "p99")),
        "itl_s": dict.fromkeys(("mean", "p50", "p90", "p99")),
        "e2e_s": dict.fromkeys(("mean", "p50", "p90", "p99")),
        "adapters": {"hits": 0, "joins": 0, "cold_loads": 0, "evictions": 0, "hit_rate": None},
        "slo": {"ttft_s": 2, "itl_s": 0.1, "attainment": 0.0},
        "sim": {"virtual_s": 1.0, "wall_s": 1.0, "requests_per_wall_s": 2.0, "peak_rss_mib": 1.0},
    }  # fmt: skip
    for figure in figures(pages.replay_page("None", result, Latencies(), LINE)):
        plotly.graph_objects.Figure(figure)


def test_a_slot_is_shown_by_the_most_telling_of_what_it_holds() -> None:
    assert sorted(Held) == [Held.COLD, Held.RESIDENT, Held.IN_USE, Held.LOADING]
    assert set(charts.HELD_NAMES) == set(Held)
