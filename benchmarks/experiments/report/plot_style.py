"""The style of a report's plots: sizes and colours, and SVG for a page.

Knows nothing about results.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = ("#2f6fb0", "#d1662b", "#2f8a5b", "#8a5bb5", "#b8418a", "#0f8a94", "#94842a", "#6b7280")
INK, FAINT, GREY = "#1f2a37", "#c3ccd6", "#94a3b3"

_WIDTH = 3.9  # inches: on a phone that shows it 310 pixels wide, text of 9 points is 10 pixels high
_THEME = {INK: "ink", FAINT: "line", GREY: "axis", **{colour: f"c{number}" for number, colour in enumerate(COLOURS)}}


def style() -> AbstractContextManager[None]:
    """Returns the context in which plots are made and saved."""
    return mpl.rc_context(
        {
            "font.size": 9,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": FAINT,
            "grid.linewidth": 0.5,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "text.color": INK,
            "text.parse_math": False,  # names may contain dollar signs
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "svg.fonttype": "none",  # text stays text, which can be searched and read aloud
            "svg.hashsalt": "lmpipe",  # equal ids, so equal bytes, in every run
        }
    )


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Makes a figure with plots one below another.

    Args:
        count: Number of plots.
        height: Height of each plot in inches.
    """
    figure = Figure(figsize=(_WIDTH, count * height), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


def legend(figure: Figure, axes: Axes) -> None:
    """Draws the legend of one plot above all plots of its figure; long names are one below another."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, 46 // (max(map(len, labels)) + 7))
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def colour_of(number: int) -> str:
    """Returns one of a few distinct colours."""
    return COLOURS[number % len(COLOURS)]


def plain_log(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def svg_of(figure: Figure) -> str:
    """Returns a plot as an SVG element; its text is the same in every run."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def themed(svg: str, name: str) -> str:
    """Returns a plot with the colours of the page, and with ids that no other plot on the page has.

    Args:
        svg: SVG that `svg_of` returned.
        name: Name of the plot, which must be unique on the page.
    """
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
