"""Figures as SVG that follows a page's colours, and as one PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from remoe_edge.measure.rows import Row
from remoe_edge.report.figures import LIGHT, Figure, Palette, figures

_WIDE, _NARROW = 540, 340
"""Widths in CSS pixels of drawings for two columns on a desktop, and for a telephone."""
PNG_DPI = 144
_MARKER = "#0a0b{:02x}"
_NAMES = ("text", "muted", "grid", "background", "mmap", "resident", *(f"series-{index}" for index in range(6)))
# Colours that nobody would choose stand for CSS variables.
_MARKED = {name: _MARKER.format(index) for index, name in enumerate(_NAMES)}
_THEMED = Palette(
    **{name: _MARKED[name] for name in (field.name for field in fields(Palette)) if name != "series"},
    series=tuple(_MARKED[f"series-{index}"] for index in range(6)),
)


def svg(figure: Figure, *, narrow: bool) -> str:
    """An SVG element without a fixed size; colours are the CSS variables --text, --muted, --series-0 and so on."""
    width, height = (_NARROW if narrow else _WIDE), figure.height(narrow)
    with canvas(width, height) as drawing:
        figure.draw(drawing.subplots(), _THEMED, narrow)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for name, marker in _MARKED.items():
        text = text.replace(marker, f"var(--{name})")
    # The font is the page's. Ids have to be different in all drawings of a page.
    text = re.sub(r"(font(?:-family)?: (?:[0-9.]+px )?)'[^;\"]+", r"\1var(--font)", text)
    prefix = f"{figure.name}-{'narrow' if narrow else 'wide'}-"
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{prefix}", text)
    head = f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{figure.title}" '
    head += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + text[text.index(">") + 1 :]


def write_png(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """All figures as one picture, two in a row. `path` is replaced if it exists; it may be a temporary name."""
    shown = figures(rows)
    lines = math.ceil(len(shown) / 2) or 1
    heights = [
        max((figure.height(False) for figure in shown[2 * line : 2 * line + 2]), default=1) for line in range(lines)
    ]
    with canvas(2 * _WIDE + 60, sum(heights) + 60 * lines + 50) as drawing:
        drawing.patch.set_facecolor(LIGHT.background)
        drawing.suptitle(title, fontsize=13, color=LIGHT.text, x=0.01, ha="left")
        grid = drawing.add_gridspec(lines, 2, height_ratios=heights)
        for index, figure in enumerate(shown):
            axes = drawing.add_subplot(grid[index // 2, index % 2])
            figure.draw(axes, LIGHT, False)
            # The legend, of two columns, lies between title and drawing.
            legend = axes.get_legend()
            above = -(-len(legend.get_texts()) // 2) if legend else 0
            axes.set_title(figure.title, fontsize=13, color=LIGHT.text, loc="left", pad=10 + 17 * above, weight="bold")
        drawing.savefig(path, format="png", dpi=PNG_DPI)


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure whose points are CSS pixels."""
    # Slow to import, and needed nowhere else.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "remoe-edge", "font.family": "sans-serif", "font.size": 11}
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    with matplotlib.rc_context(settings):
        drawing = Drawing(figsize=(width / 72, height / 72), dpi=72, layout=engine)
        FigureCanvasAgg(drawing)
        yield drawing
