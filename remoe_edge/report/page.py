"""A report as one web page that needs nothing else: no network, no fonts, no libraries."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from remoe_edge import __version__
from remoe_edge.measure.rows import Row
from remoe_edge.report.conditions import conditions
from remoe_edge.report.draw import svg
from remoe_edge.report.figures import Figure, figures
from remoe_edge.report.labels import row_label
from remoe_edge.report.summary import headline, lead, remarks
from remoe_edge.report.table import columns

_OUTPUT_CHARACTERS = 2000


def html_report(rows: Sequence[Row], *, title: str, notes: Sequence[str] = ()) -> str:
    """The page. `title` names the benchmark; `notes` are sentences shown below the summary."""
    cards = "\n".join([_table(rows), *map(_figure, figures(rows)), _conditions(rows), _outputs(rows)])
    said = "".join(f"<li>{escape(text)}</li>" for text in [*remarks(rows), *notes])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="remoe-edge {__version__}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_packaged("page.css")}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline(rows))}</p>
<p class="lead">{escape(lead(rows))}</p>
<ul class="remarks">{said}</ul>
</header>
<div class="cards">
{cards}
</div>
<footer>TPOT = (time of the last token - time of the first) / (tokens - 1), batch 1, greedy; of several prompts the
mean, then the median over repetitions. Limit = max(resident TPOT, bytes that had to be read / storage bandwidth).
Intervals are 95 % bootstraps; ratios are Hodges-Lehmann estimates over runs of the same prompt and repetition.
remoe-edge {__version__}</footer>
</main>
<script>
{_packaged("page.js")}</script>
</body>
</html>
"""


def _figure(figure: Figure) -> str:
    return f"""<section id="{figure.name}">
<h2>{escape(figure.title)}</h2>
<p>{escape(figure.caption)}</p>
<div class="wide-only">{svg(figure, narrow=False)}</div>
<div class="narrow">{svg(figure, narrow=True)}</div>
</section>"""


def _table(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    heads = "".join(
        f'<th scope="col" title="{escape(column.title)}"><button type="button">{escape(column.name)}</button></th>'
        for column in shown
    )
    lines = []
    for row in rows:
        label = escape(row_label(row, rows))
        if row["tpot_ms"] is None:
            text = f"{row['status']}: {row['reason']}"
            cells = f'<td class="failed" data-value="" colspan="{len(shown)}">{escape(text)}</td>'
        else:
            values = [column.value(row) for column in shown]
            cells = "".join(
                f'<td data-value="{"" if value is None else value}">{escape(column.text(row))}</td>'
                for column, value in zip(shown, values, strict=True)
            )
            if row["status"] != "ok":
                label += f' <span class="failed">{escape(row["status"])}</span>'
        lines.append(f'<tr><th scope="row" data-value="{escape(row_label(row, rows))}">{label}</th>{cells}</tr>')
    return f"""<section class="wide" id="table">
<h2>Results</h2>
<div class="scroll"><table class="sortable">
<thead><tr><th scope="col"><button type="button">arm</button></th>{heads}</tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody>
</table></div>
</section>"""


def _conditions(rows: Sequence[Row]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in conditions(rows))
    return f'<section class="wide" id="conditions"><h2>Conditions</h2><dl>{items}</dl></section>'


def _outputs(rows: Sequence[Row]) -> str:
    """What was put out after each prompt: once where arms agree."""
    texts: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for output in row["outputs"]:
            texts.setdefault((output["prompt"], output["text"]), []).append(row_label(row, rows))
    if not texts:
        return ""
    total = sum(row["tpot_ms"] is not None for row in rows)
    parts = []
    for (prompt, text), labels in texts.items():
        who = "all arms" if len(labels) == total else ", ".join(labels)
        cut = text if len(text) <= _OUTPUT_CHARACTERS else text[:_OUTPUT_CHARACTERS] + " \u2026"
        parts.append(f"<details><summary>{escape(prompt)}, {escape(who)}</summary><pre>{escape(cut)}</pre></details>")
    return f'<section class="wide" id="outputs"><h2>What the model put out</h2>{"".join(parts)}</section>'


def _packaged(name: str) -> str:
    return (resources.files("remoe_edge") / "report" / name).read_text(encoding="utf-8")
