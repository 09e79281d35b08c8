"""A report as Markdown, for issues and documents."""

from __future__ import annotations

from collections.abc import Sequence

from remoe_edge.measure.rows import TPOT_FORMULA, Row
from remoe_edge.report.conditions import conditions
from remoe_edge.report.labels import row_label
from remoe_edge.report.summary import headline, lead, remarks
from remoe_edge.report.table import columns


def markdown_report(rows: Sequence[Row], *, title: str, notes: Sequence[str] = ()) -> str:
    """Summary, table and conditions."""
    shown = columns(rows)
    said = [*remarks(rows), *notes]
    lines = [
        f"# {title}",
        "",
        f"**{headline(rows)}** {lead(rows)}".strip(),
        "",
        *(f"- {text}" for text in said),
        "",
    ]
    lines.append(f"| arm | {' | '.join(column.name for column in shown)} |")
    lines.append(f"|---|{'---:|' * len(shown)}")
    for row in rows:
        if row["tpot_ms"] is None:
            cells = [f"{row['status']}: {row['reason']}"] + [""] * (len(shown) - 1)
        else:
            cells = [column.text(row) for column in shown]
        lines.append(f"| {' | '.join(map(_cell, [row_label(row, rows), *cells]))} |")
    lines += ["", f"{TPOT_FORMULA}, median over repetitions.", ""]
    lines += [f"- {name}: {value}" for name, value in conditions(rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
