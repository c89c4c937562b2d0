"""From a matplotlib figure to SVG inside a page: it takes the page's colours, light or dark, and its font.

A figure is drawn in the marker colours INK, FAINT and PAPER; in the SVG they become CSS variables of the page. The ids of
each picture get its name, since all pictures of a page share one name space.
"""

from __future__ import annotations

import html
import io
import re

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from asgd_mpi.errors import printable

INK, FAINT, PAPER = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
FONT_SIZE = 10  # points
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: the browser's font, searchable
    "svg.hashsalt": "asgd_mpi",  # the same figure gives the same bytes
    "text.parse_math": False,  # a dollar in a run's name is a dollar
    "font.size": FONT_SIZE,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.titlesize": FONT_SIZE,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE - 1,
    "lines.linewidth": 1.6,
}


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as one <svg> element; `name` (letters, digits, hyphens) makes its ids unique, `title` describes it."""
    buffer = io.StringIO()
    _lay_out(figure)
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = printable(buffer.getvalue())  # a label may be a name out of a run directory
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        rf'\1 role="img" aria-label="{html.escape(title)}"',
        text,
        count=1,
    )
    text = re.sub(
        r"font(-family)?: ([^;\"]*?)('[^;\"]*|sans-serif[^;\"]*)",
        lambda found: f"font{found[1] or ''}: {found[2]}var(--font)",
        text,
    )
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _lay_out(figure: Figure) -> None:
    """Put the axes where they stay: savefig would draw all of the figure once more for that."""
    layout = figure.get_layout_engine()
    if layout is None:
        return
    FigureCanvasSVG(figure)  # whose letters are measured
    layout.execute(figure)
    figure.set_layout_engine(None)
