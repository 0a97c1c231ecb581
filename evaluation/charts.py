"""Charts of a report, by matplotlib: SVG to stand within a page. The same chart gives the same text.

matplotlib is imported where it is used: importing this module does not need it.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLOURS = ("#1b6ca8", "#c8501e", "#2e8b57", "#8e5bb5", "#b8860b", "#5f6b75")
STROKES = ("-", "o"), ("--", "s"), (":", "^")
INK, FAINT = "#222222", "#e4e4e4"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # and a $ a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


class Line(NamedTuple):
    """One line of a chart; `low` and `high` bound its band and may hold None."""

    name: str
    x: Sequence[float]
    mean: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


class Chart(NamedTuple):
    """Lines over one axis; `log_x` spaces x by its logarithm, `dots` shows the points, whose x need not be whole."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False
    dots: bool = False


class Bars(NamedTuple):
    """Shares in [0, 1], or None, by name; side by side one bar for each series."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


class HeatMap(NamedTuple):
    """Shares in [0, 1] by row and column."""

    title: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    values: np.ndarray


def chart_svg(chart: Chart) -> str:
    """A chart of lines with bands, axes and a legend; empty where no value is known."""
    if all(y is None for line in chart.lines for y in line.mean):
        return ""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        kinds = itertools.product(STROKES, COLOURS)  # a colour's second line is dashed
        for line, ((stroke, mark), colour) in zip(chart.lines, itertools.cycle(kinds), strict=False):
            bounds = zip(line.x, line.low, line.high, strict=False)
            band = [(x, low, high) for x, low, high in bounds if low is not None and high is not None]
            if band:
                axes.fill_between(*zip(*band, strict=True), color=colour, alpha=0.15, linewidth=0)
            known = [(x, y) for x, y in zip(line.x, line.mean, strict=True) if y is not None]
            if not known:
                continue
            dot, look = mark if chart.dots or len(known) == 1 else "", {"linestyle": stroke, "linewidth": 1.6}
            axes.plot(*zip(*known, strict=True), color=colour, marker=dot, label=line.name, **look)
        axes.set_xlabel(chart.x_label)
        axes.grid(axis="y")
        axes.margins(x=0.1 if chart.dots else 0.02)
        if chart.log_x:
            ticks = sorted({x for line in chart.lines for x in line.x})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=not chart.dots))
        axes.figure.legend(loc="outside lower left", ncols=2)

    return _svg(chart.title, (5.0, 3.2), draw)


def heat_map_svg(heat: HeatMap) -> str:
    """A table of shares, the darker the larger."""

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        rows, columns = heat.values.shape
        shades = LinearSegmentedColormap.from_list("shares", ["white", COLOURS[0]])
        axes.pcolormesh(heat.values, cmap=shades, vmin=0, vmax=1, edgecolors="#dddddd", linewidth=0.7)
        for i, j in np.ndindex(rows, columns):
            colour = "white" if heat.values[i, j] > 0.5 else INK
            axes.text(j + 0.5, i + 0.5, f"{heat.values[i, j]:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(np.arange(columns) + 0.5, heat.column_names)
        axes.set_yticks(np.arange(rows) + 0.5, heat.row_names)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)

    rows, columns = heat.values.shape
    return _svg(heat.title, (1.1 + 0.65 * columns, 0.7 + 0.3 * rows), draw)


def bars_svg(bars: Bars) -> str:
    """Shares as bars that run to the right, one group below another."""
    rows, thick = len(bars.names), 0.8 / max(1, len(bars.series))

    def draw(axes: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        for i, ((name, values), colour) in enumerate(zip(bars.series.items(), itertools.cycle(COLOURS), strict=False)):
            places = np.arange(rows) - 0.4 + (i + 0.5) * thick
            axes.barh(places, [value or 0 for value in values], thick, color=colour, label=name)
        axes.set_yticks(np.arange(rows), bars.names)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="x")
        axes.invert_yaxis()
        axes.margins(y=0.02)
        if len(bars.series) > 1:
            axes.figure.legend(loc="outside lower left", ncols=len(bars.series))

    return _svg(bars.title, (5.0, min(8.0, 1.0 + rows * (0.12 + 0.1 * len(bars.series)))), draw)


def _svg(title: str, inches: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """What `draw` puts on axes, as an <svg> element without a date, a namespace or the ids of its groups."""
    import matplotlib
    from matplotlib.figure import Figure

    # Ids within the element are hashes, salted by its title: two charts of a page then share none.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    element = file.getvalue()
    element = element[element.index("<svg") :]
    return re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", element)
