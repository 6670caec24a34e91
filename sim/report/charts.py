"""The charts of a page, as plotly's own JSON: `data` and `layout`, without a colour in either.

Colours belong to a theme, so that one chart serves light and dark: the page's script gives each the
theme of the moment as a template (see page.js). Every series is bounded before it comes here; lines
differ in dash as well as in colour. `tests/sim/test_report.py` holds each chart and theme against
plotly's schema.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from sim.report.intervals import Estimate
from sim.report.metrics import Metric, Unit
from sim.report.summary import CURVE_SHARES
from sim.report.timeline import Held, Timeline
from sim.slo import Target

Chart: TypeAlias = dict[str, Any]
Curve: TypeAlias = Sequence[float | None]

DECADES_SPLIT: Final = 3  # of a logarithmic axis: up to here its decades have ticks within
LOG_FROM: Final = 10  # an axis of latencies that differ by more is logarithmic
DOUBLED_FROM: Final = 16  # values that span more are doublings rather than steps
TICKS_MAX: Final = 12
DASHED_MAX: Final = 2  # lines over time that differ in dash as well
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart with any colour vision, darkened for
# a light ground and lightened for a dark one to a contrast of 4.5 and more; without its yellow.
LIGHT: Final = (
    "#0062a3",
    "#b34700",
    "#00704f",
    "#a03d78",
    "#4d4d4d",
    "#2a7ab0",
    "#7a5c00",
    "#5b3fa0",
)
DARK: Final = (
    "#6cb8f0",
    "#ff9a4d",
    "#3fd0a0",
    "#f0a0cc",
    "#c8c8c8",
    "#a5d5ff",
    "#e8c84a",
    "#b9a5ff",
)
HELD_NAMES: Final = {
    Held.COLD: "not held",
    Held.RESIDENT: "idle",
    Held.IN_USE: "in use",
    Held.LOADING: "loading",
}


def _theme(
    *, text: str, grid: str, ground: str, colours: Sequence[str], held: Sequence[str]
) -> dict[str, Any]:
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "automargin": True}
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": text, "family": "system-ui, sans-serif", "size": 12},
            "colorway": list(colours),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": ground, "bordercolor": grid, "font": {"color": text}},
        },
        "data": {
            "heatmap": [
                {
                    "colorscale": [
                        [(index + edge) / len(held), colour]
                        for index, colour in enumerate(held)
                        for edge in (0, 1)
                    ],
                    "colorbar": {"outlinecolor": grid, "tickcolor": grid},
                }
            ]
        },
    }


THEMES: Final = {
    "light": _theme(
        text="#1f2328",
        grid="#d5d9de",
        ground="#ffffff",
        colours=LIGHT,
        held=("#eef0f2", "#a9c9e6", "#0062a3", "#d95f02"),
    ),
    "dark": _theme(
        text="#e6e8eb",
        grid="#3a4048",
        ground="#1c2026",
        colours=DARK,
        held=("#20252b", "#2f5f8a", "#7cc4ff", "#ff9a4d"),
    ),
}


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401  (plotly's)
    xaxis = {"title": {"text": x}, **more.pop("xaxis", {})}
    yaxis = {"title": {"text": y}, "rangemode": "tozero", **more.pop("yaxis", {})}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return {
        "xaxis": xaxis,
        "yaxis": yaxis,
        "legend": legend,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "hovermode": "x unified",
        **more,
    }


def _line(name: str, number: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401  (plotly's)
    dash = DASHES[number % len(DASHES)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "line": {"dash": dash, "width": 2},
        **more,
    }


def distribution(curves: Mapping[str, Curve], label: str) -> Chart:
    """The share of all requests offered that were answered within a time; a lost one never is."""
    data = []
    for number, (name, curve) in enumerate(curves.items()):
        known = [
            (value, share)
            for value, share in zip(curve, CURVE_SHARES, strict=True)
            if value is not None
        ]
        data.append(
            _line(
                name,
                number,
                x=[_short(max(value, 1e-6)) for value, _ in known],
                y=[share for _, share in known],
                hovertemplate="%{y:.1%} within %{x:.3g} s",
            )
        )
    layout = _layout(
        label,
        "requests offered",
        xaxis=_log_axis([value for line in data for value in line["x"]]),
        yaxis={"tickformat": ".0%", "range": [0, 1.01]},
        hovermode="closest",
    )
    return {"data": data, "layout": layout}


def _log_axis(seconds: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of time whose ticks are whole: 1, 2, 5, or 1 alone over many decades."""
    if not seconds:
        return {"type": "log"}
    low, high = math.log10(min(seconds)), math.log10(max(seconds))
    steps = (1, 2, 5) if high - low <= DECADES_SPLIT else (1,)
    ticks = [
        step * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for step in steps
    ]
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g} s" if tick >= 1 else f"{tick * 1000:g} ms" for tick in ticks],
        "hoverformat": ".3g",
    }


def over_time(series: Mapping[str, tuple[Sequence[float], Curve]], label: str, **y: Any) -> Chart:  # noqa: ANN401  (an axis of plotly's)
    """Lines over virtual time; None is a gap."""
    data = [
        _line(
            name,
            number if len(series) <= DASHED_MAX else 0,  # more dashes than that are but noise
            x=[_short(at_s) for at_s in times],
            y=[None if value is None else _short(value) for value in values],
        )
        for number, (name, (times, values)) in enumerate(series.items())
    ]
    return {
        "data": data,
        "layout": _layout("virtual time", label, xaxis={"ticksuffix": " s"}, yaxis=y),
    }


def residency(timeline: Timeline) -> Chart:
    """Which adapter is where, over time: a row for each adapter of each worker."""
    rows = timeline.residency
    names = [f"{row.worker} {row.adapter}" for row in rows]
    firsts = {row.worker: name for row, name in reversed(list(zip(rows, names, strict=True)))}
    cell = {
        "type": "heatmap",
        "x": [_short(at_s) for at_s in timeline.residency_s],
        "y": names,
        "z": [list(row.held) for row in rows],
        "zmin": -0.5,
        "zmax": len(Held) - 0.5,
        "ygap": 1,
        "hovertemplate": "%{y} at %{x} s<extra></extra>",
        "colorbar": {
            "orientation": "h",
            "y": 1,
            "yanchor": "bottom",
            "thickness": 10,
            "len": 0.7,
            "x": 0,
            "xanchor": "left",
            "tickvals": [held.value for held in Held],
            "ticktext": [HELD_NAMES[held] for held in Held],
        },
    }
    layout = _layout(
        "virtual time",
        "",
        xaxis={"ticksuffix": " s"},
        yaxis={"autorange": "reversed", "tickfont": {"size": 9}, "showgrid": False},
        hovermode="closest",
        # Where there is no room for the name of every row: the worker's, at its first.
        meta={"narrow": {"tickvals": list(firsts.values()), "ticktext": list(firsts)}},
    )
    return {"data": [cell], "layout": layout}


def against(
    lines: Mapping[str, Sequence[tuple[Any, Estimate]]],
    path: str,
    metric: Metric,
    target: Target | None = None,
) -> Chart:
    """One figure against one axis, a line for each choice of the others, with intervals."""
    data = []
    values = list(dict.fromkeys(value for line in lines.values() for value, _ in line))
    for number, (name, points) in enumerate(lines.items()):
        above, below = _bars([estimate for _, estimate in points], metric)
        data.append(
            _line(
                name,
                number,
                mode="lines+markers",
                x=[value for value, _ in points],
                y=[estimate.mean for _, estimate in points],
                connectgaps=False,
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": above,
                    "arrayminus": below,
                    "visible": any(below),
                    "thickness": 1,
                },
            )
        )
    xaxis: dict[str, Any] = {}
    if not all(isinstance(value, int | float) for value in values):
        xaxis = {"type": "category"}
    elif len(values) <= TICKS_MAX:
        xaxis = {"tickvals": values, "ticktext": [f"{value:g}" for value in values]}
        if min(values) > 0 and max(values) >= DOUBLED_FROM * min(values):
            xaxis["type"] = "log"
    if target is not None:
        ends = (
            [values[0], values[-1]]
            if xaxis.get("type") == "category"
            else [min(values), max(values)]
        )
        level = [target.value, target.value]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"asked for: {target}",
                "x": ends,
                "y": level,
                "line": {"dash": "dot", "width": 1},
                "hoverinfo": "skip",
            }
        )
    heights = [value for line in data for value in line["y"] if value]
    axes: dict[Unit, dict[str, Any]] = {
        Unit.SECONDS: {"ticksuffix": " s", "hoverformat": ".3g"},
        Unit.SHARE: {"tickformat": ".0%", "hoverformat": ".1%"},
        Unit.RATE: {"hoverformat": ".2f"},
        Unit.COUNT: {"hoverformat": ",.0f"},
    }
    layout = _layout(
        path,
        metric.heading + (", requests/s" if metric.unit is Unit.RATE else ""),
        xaxis=xaxis,
        yaxis=_log_axis(heights)
        if metric.unit is Unit.SECONDS and heights and max(heights) > LOG_FROM * min(heights)
        else axes[metric.unit],
    )
    return {"data": data, "layout": layout}


def _bars(estimates: Sequence[Estimate], metric: Metric) -> tuple[list[float], list[float]]:
    """Half intervals up and down, as far as there can be such values."""
    most = 1.0 if metric.unit is Unit.SHARE else math.inf
    known = [(estimate.mean or 0.0, estimate.half or 0.0) for estimate in estimates]
    above = [max(0.0, min(half, most - mean)) for mean, half in known]
    return above, [min(half, mean) for mean, half in known]


def _short(value: float) -> float:
    """Five significant digits: more than can be seen, and half the page's size."""
    return float(f"{value:.5g}")
