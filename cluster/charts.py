"""What the charts of Keel's pages share: an empty chart in their style, and a chart as base64 of SVG. matplotlib is
imported when a chart is drawn, without pyplot: no global state and no display, fit for any thread."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # so that a file of charts needs no matplotlib of its own
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D


def empty_chart(title: str, x_label: str, y_label: str, *, size_inches: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def second_scale(axes: Axes, y_label: str, *, colour: str, first_colour: str) -> Axes:
    """A second vertical scale, on the right. Each scale is labelled in the colour of its curve."""
    other = axes.twinx()
    other.set_ylabel(y_label, fontsize=8, color=colour)
    other.tick_params(axis="y", labelsize=8, colors=colour)
    other.spines[["top", "left"]].set_visible(False)
    axes.yaxis.label.set_color(first_colour)
    axes.tick_params(axis="y", colors=first_colour)
    return other


def svg_base64(figure: Figure) -> str:
    """The same figure gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "keel"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
