"""A replay's result as one HTML page that opens from disk, in light and dark, with no network."""

import math
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any, Final

from sim.report.summary import Latencies
from sim.report.table import (
    LATENCY_COLUMNS,
    LATENCY_NAMES,
    WORKER_COLUMNS,
    seconds,
    summary_rows,
    worker_cells,
)

WIDTH: Final = 640
HEIGHT: Final = 260
LEFT: Final = 48
BOTTOM: Final = 32
POINTS: Final = 200

PAGE: Final = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --a: #2563eb; --b: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --a: #7aa7ff; --b: #ff9d6b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .75rem; text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
tr { border-bottom: 1px solid var(--line); }
table.plain td { text-align: left; } code { font-size: .9em; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
.grid { stroke: var(--line); } .a { stroke: var(--a); } .b { stroke: var(--b); }
.a, .b { fill: none; stroke-width: 2; }
.ka { color: var(--a); } .kb { color: var(--b); }
</style>
<h1>$title</h1>
<table class="plain">$summary</table>
<h2>Latency over all requests offered</h2>
<table>$latencies</table>
<p>A dash is infinite: so many requests were not answered that this figure falls on one of them.</p>
<h2>Share of requests answered within a time</h2>
<p><b class="ka">&#9473;</b> first token &nbsp; <b class="kb">&#9473;</b> whole answer</p>
$plot
<h2>Workers</h2>
<table>$workers</table>
</html>
""")


def render(result: dict[str, Any], latencies: Latencies, title: str) -> str:
    """The page as text."""
    offered = result["requests"]
    return PAGE.substitute(
        title=escape(title),
        summary="".join(_row(pair) for pair in summary_rows(result)),
        latencies=_row(("", *LATENCY_COLUMNS), tag="th")
        + "".join(
            _row((name, *(seconds(result[key][column]) for column in LATENCY_COLUMNS)))
            for key, name in LATENCY_NAMES.items()
        ),
        plot=_plot([sorted(latencies.ttft_s), sorted(latencies.e2e_s)], offered),
        workers=_row(WORKER_COLUMNS, tag="th")
        + "".join(_row(worker_cells(worker)) for worker in result["workers"]),
    )


def _row(cells: Sequence[str], tag: str = "td") -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _plot(curves: list[list[float]], offered: int) -> str:
    """Two cumulative shares over a logarithmic axis of time, as SVG."""
    values = [value for curve in curves for value in (curve[:1] + curve[-1:]) if value > 0]
    if not values:
        return "<p>No request was answered.</p>"
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))

    def across(value: float) -> float:
        place = (math.log10(max(value, 10**low)) - low) / (high - low)
        return LEFT + place * (WIDTH - LEFT - 16)

    def up(part: float) -> float:
        return 8 + (1 - part) * (HEIGHT - BOTTOM - 8)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="latency distribution">']
    for power in range(low, high + 1):
        x = across(10**power)
        parts.append(f'<path class="grid" d="M{x:.1f} 8V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{10**power:g} s</text>'
        )
    for quarter in range(5):
        y = up(quarter / 4)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - 16}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{quarter * 25}%</text>'
        )
    for name, curve in zip("ab", curves, strict=True):
        if not curve:
            continue
        indexes = sorted({round(step * (len(curve) - 1) / POINTS) for step in range(POINTS + 1)})
        line = " ".join(f"{across(curve[i]):.1f},{up((i + 1) / offered):.1f}" for i in indexes)
        parts.append(f'<polyline class="{name}" points="{line}"/>')
    return "".join(parts) + "</svg>"
