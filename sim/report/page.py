"""One self-contained HTML page: text, tables, charts. Opens from disk, in light and dark.

Nothing is fetched: the plotting library stands in the page, and the page's own content policy
forbids the browser to reach for anything else. What has no script sees the text and the tables.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any, Final

from sim.report.charts import THEMES, Chart
from sim.report.table import BEST, Table

FILES: Final = resources.files("sim.report")
POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
PAGE: Final = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
$library
<script type="application/json" id="themes">$themes</script>
<script>
$script
</script>
</body>
</html>
""")


class Page:
    """Collects sections from top to bottom; `render` gives the page."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._charts = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def answers(self, lines: Sequence[str]) -> None:
        """Lines of words that matter most; an indented one belongs to the one before."""
        items = "".join(
            f'<li class="{"sub" if line.startswith("  ") else "top"}">{escape(line.strip())}</li>'
            for line in lines
        )
        self._parts.append(f'<ul class="answers">{items}</ul>')

    def code(self, text: str) -> None:
        """Text to be copied."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, table: Table) -> None:
        """A table, which scrolls by itself where the window is narrower."""
        head = "".join(
            f'<th scope="col"{_kind(index, table)}>{escape(column)}</th>'
            for index, column in enumerate(table.columns)
        )
        head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
        body = "".join(
            "<tr>" + "".join(_cell(index, cell, table) for index, cell in enumerate(row)) + "</tr>"
            for row in table.rows
        )
        caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
        self._parts.append(
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(table.title or "table")}">'
            f"<table>{caption}{head}<tbody>{body}</tbody></table></div>"
        )

    def chart(self, chart: Chart, caption: str, *, height: int = 320) -> None:
        """A chart with words that say what it shows."""
        self._charts += 1
        name = f"chart-{self._charts}"
        self._parts.append(
            f'<figure><figcaption>{escape(caption)}</figcaption><div class="chart" role="img" '
            f'aria-label="{escape(caption)}" data-chart="{name}" data-height="{height}"></div>'
            f'<script type="application/json" id="{name}">{_json(chart)}</script></figure>'
        )

    def render(self) -> str:
        """The page as text."""
        library = ""
        if self._charts:
            # Only here: a run that writes no page does not load it.
            from plotly.offline import get_plotlyjs  # noqa: PLC0415

            library = f"<script>{get_plotlyjs()}</script>"
        return PAGE.substitute(
            policy=POLICY,
            title=escape(self._title),
            style=(FILES / "page.css").read_text(encoding="utf-8").strip(),
            body="\n".join(self._parts),
            library=library,
            themes=_json(THEMES),
            script=(FILES / "page.js").read_text(encoding="utf-8").strip(),
        )


def _json(value: Any) -> str:  # noqa: ANN401  (any JSON)
    """JSON that may stand in a script element: no end tag can occur in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c")


def _kind(index: int, table: Table) -> str:
    return ' class="word"' if index < table.words else ""


def _cell(index: int, cell: str, table: Table) -> str:
    if cell.startswith(BEST):
        return f"<td{_kind(index, table)}><strong>{escape(cell.removeprefix(BEST))}</strong></td>"
    return f"<td{_kind(index, table)}>{escape(cell)}</td>"
