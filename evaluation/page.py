"""Pages: sections of tables, charts and pictures, as one HTML file and one Markdown file.

The HTML file holds everything that it shows; the Markdown file links to pictures beside it.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.charts import Chart, HeatMap, chart_svg, heat_map_svg
from evaluation.measured import Picture
from evaluation.table import markdown_table
from utils.video import write_png

TEMPLATE = Path(__file__).with_name("report.html.jinja")
POINTS = 12  # of a chart, where it stands as a table


class Table(NamedTuple):
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A heading, a paragraph, and blocks below; in HTML the charts come last, side by side."""

    title: str
    text: str
    blocks: Sequence[Table | Chart | HeatMap | Picture]


def write_page(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes report.html, report.md and, for the latter, pictures/*.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html(title, sections))
    (folder / "report.md").write_text(markdown(title, sections))
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                write_png(folder / "pictures" / f"{block.name}.png", block.image_HWC)


def html(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML, with everything in it."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    kinds = {"table": Table, "chart": Chart, "heat_map": HeatMap, "picture": Picture}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    svg = lambda block: Markup(chart_svg(block) if isinstance(block, Chart) else heat_map_svg(block))
    environment.filters |= {"svg": svg, "data_uri": _data_uri}
    return environment.from_string(TEMPLATE.read_text()).render(title=title, sections=sections)


def _data_uri(picture: Picture) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.image_HWC).save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, charts as tables."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for block in section.blocks:
            if isinstance(block, Chart):
                lines += [block.title, "", *markdown_table(*_points(block)), ""]
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
