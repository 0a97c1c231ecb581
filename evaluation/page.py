"""Pages: sections of tables, charts and pictures, as one HTML file and one Markdown file.

The HTML file holds everything that it shows; the Markdown file links to pictures beside it.
"""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.charts import Bars, Chart, HeatMap, bars_svg, chart_svg, heat_map_svg
from evaluation.measured import Picture
from evaluation.table import markdown_table
from utils.video import strip, write_png

TEMPLATE = Path(__file__).with_name("report.html.jinja")
POINTS = 12  # of a chart, where it stands as a table
STRIP = 12  # frames of a film, where it stands as a picture


class Table(NamedTuple):
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Film(NamedTuple):
    """A clip to play, uint8 (T, H, W, 3), with a line of text for each frame, drawn on it.

    name: Of its file where it is a strip (without suffix).
    """

    name: str
    frames_THWC: np.ndarray
    fps: float
    texts_T: Sequence[str]
    caption: str


class Section(NamedTuple):
    """A heading, a paragraph, and blocks below; in HTML the films, then the charts come last, side by side."""

    title: str
    text: str
    blocks: Sequence[Table | Chart | Bars | HeatMap | Picture | Film]


def write_page(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes report.html, report.md and, for the latter, pictures/*.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html(title, sections))
    (folder / "report.md").write_text(markdown(title, sections))
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Film):
                block = Picture(block.name, strip([block.frames_THWC[:STRIP]]), block.caption)
            if isinstance(block, Picture):
                write_png(folder / "pictures" / f"{block.name}.png", block.image_HWC)


def html(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML, with everything in it."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    kinds = {"table": Table, "chart": (Chart, Bars), "heat_map": HeatMap, "picture": Picture, "film": Film}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    drawn: dict[type, Callable[[Any], str]] = {Chart: chart_svg, Bars: bars_svg, HeatMap: heat_map_svg}
    svg = lambda block: Markup(drawn[type(block)](block))
    environment.filters |= {"svg": svg, "data_uri": _data_uri, "film_uri": _film_uri}
    return environment.from_string(TEMPLATE.read_text()).render(title=title, sections=sections)


def _data_uri(picture: Picture) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.image_HWC).save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _film_uri(film: Film) -> str:
    """All frames of a film above each other, in one picture without loss."""
    from PIL import Image

    T, H, W, _ = film.frames_THWC.shape
    file = io.BytesIO()
    Image.fromarray(film.frames_THWC.reshape(T * H, W, 3)).save(file, format="webp", lossless=True, quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, charts as tables."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for block in section.blocks:
            if isinstance(block, Chart):
                lines += [block.title, "", *markdown_table(*_points(block)), ""]
            elif isinstance(block, Bars):
                shares = [["" if y is None else f"{y:.3f}" for y in values] for values in block.series.values()]
                rows = [[name, *row] for name, row in zip(block.names, zip(*shares, strict=True), strict=True)]
                lines += [block.title, "", *markdown_table(["", *block.series], rows), ""]
            elif isinstance(block, Table):
                lines += [*markdown_table(*block), ""]
            elif isinstance(block, HeatMap):
                shares = [[f"{share:.2f}" for share in row] for row in block.values]
                rows = [[name, *row] for name, row in zip(block.row_names, shares, strict=True)]
                lines += [block.title, "", *markdown_table(["", *block.column_names], rows), ""]
            else:
                lines += [f"![{block.caption}](pictures/{block.name}.png)", "", block.caption, ""]
    return "\n".join(lines).rstrip() + "\n"


def _points(chart: Chart) -> Table:
    """A chart as a table of some of its points."""
    x = sorted({x for line in chart.lines for x in line.x})
    chosen = [x[i] for i in sorted({round(k * (len(x) - 1) / (POINTS - 1)) for k in range(POINTS)})]
    rows = []
    for line in chart.lines:
        values = dict(zip(line.x, line.mean, strict=True))
        rows.append([line.name, *("" if values.get(x) is None else f"{values[x]:.4g}" for x in chosen)])
    return Table([chart.x_label, *(f"{x:g}" for x in chosen)], rows)
