"""Reports: from metrics.json and pictures to one HTML file and one Markdown file. Charts are SVG, drawn here.

The HTML file holds everything that it shows; the Markdown file links to pictures beside it.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.statistics import Figure, difference
from utils.video import write_png

COLOURS = ("#1b6ca8", "#c8501e", "#2e8b57", "#8e5bb5", "#b8860b", "#5f6b75")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #bbb }
figure { margin: 1em 0; overflow-x: auto } figcaption { color: #555; font-size: .9em }
img { image-rendering: pixelated; max-width: 100% } svg { max-width: 100%; height: auto }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
"""


class Table(NamedTuple):
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Line(NamedTuple):
    """One line of a chart; `low` and `high` bound its band and may hold None."""

    name: str
    x: Sequence[float]
    mean: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


class Chart(NamedTuple):
    """Lines over one axis; `log_x` spaces x by its logarithm."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False


class HeatMap(NamedTuple):
    """Shares in [0, 1] by row and column."""

    title: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    values: np.ndarray


class Picture(NamedTuple):
    """An image, uint8 (H, W, 3), with its file name (without suffix) and what it shows."""

    name: str
    image_HWC: np.ndarray
    caption: str


class Section(NamedTuple):
    """A heading, a paragraph, and blocks below."""

    title: str
    text: str
    blocks: Sequence[Table | Chart | HeatMap | Picture]


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes report.html, report.md and, for the latter, pictures/*.png."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    lines = [f"# {title}", ""]
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        lines += [f"## {section.title}", "", section.text, ""]
        charts: list[str] = []
        for block in section.blocks:
            if isinstance(block, Chart):
                charts.append(svg_chart(block))
                lines += [block.title, "", *_markdown_table(_points(block))]
            elif isinstance(block, Table):
                body.append(_html_table(block))
                lines += _markdown_table(block)
            elif isinstance(block, HeatMap):
                body.append(svg_heat_map(block))
                rows = [
                    [name, *(f"{v:.2f}" for v in row)] for name, row in zip(block.row_names, block.values, strict=True)
                ]
                lines += [block.title, "", *_markdown_table(Table(["", *block.column_names], rows))]
            else:
                write_png(folder / "pictures" / f"{block.name}.png", block.image_HWC)
                body.append(_html_picture(block))
                lines += [f"![{block.caption}](pictures/{block.name}.png)", "", block.caption, ""]
        if charts:
            body.append(f'<div class="charts">{"".join(charts)}</div>')
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    (folder / "report.html").write_text(page + "\n".join(body) + "</html>\n")
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _markdown_table(table: Table) -> list[str]:
    rows = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _points(chart: Chart, most: int = 12) -> Table:
    """A chart as a table of some of its points."""
    x = sorted({x for line in chart.lines for x in line.x})
    chosen = [x[i] for i in sorted({round(k * (len(x) - 1) / (most - 1)) for k in range(most)})]
    rows = []
    for line in chart.lines:
        values = dict(zip(line.x, line.mean, strict=True))
        rows.append([line.name, *("" if values.get(x) is None else f"{values[x]:.4g}" for x in chosen)])
    return Table([chart.x_label, *(f"{x:g}" for x in chosen)], rows)


def _html_picture(picture: Picture) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.image_HWC).save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    caption = html.escape(picture.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as asked for."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def svg_chart(chart: Chart, width: int = 480, height: int = 300) -> str:
    """A chart of lines with bands, axes and a legend."""
    left, right, top, bottom = 52, 10, 30, 40 + 16 * ((len(chart.lines) + 1) // 2)
    points = [
        (x, y)
        for line in chart.lines
        for values in (line.mean, line.low, line.high)
        for x, y in zip(line.x, values, strict=False)
        if y is not None
    ]
    if not points:
        return ""
    place = math.log10 if chart.log_x else float
    x0, x1 = place(min(x for x, _ in points)), place(max(x for x, _ in points))
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    x1 = x1 if x1 > x0 else x0 + 1
    y1 = y1 if y1 > y0 else y0 + 1
    sx = lambda x: left + (place(x) - x0) / (x1 - x0) * (width - left - right)
    sy = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="system-ui, sans-serif" '
        f'font-size="11" role="img"><text x="{left}" y="16" font-size="13" font-weight="600">'
        f"{html.escape(chart.title)}</text>"
    ]
    for y in ticks(y0, y1):
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{sy(y):.1f}" y2="{sy(y):.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{left - 6}" y="{sy(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    x_ticks = sorted({x for line in chart.lines for x in line.x}) if chart.log_x else ticks(x0, x1, 8)
    for x in x_ticks:
        out.append(f'<text x="{sx(x):.1f}" y="{height - bottom + 14}" text-anchor="middle">{x:g}</text>')
    middle = (left + width - right) / 2
    out.append(
        f'<text x="{middle:.0f}" y="{height - bottom + 29}" text-anchor="middle" fill="#555">'
        f"{html.escape(chart.x_label)}</text>"
    )
    for i, line in enumerate(chart.lines):
        colour = COLOURS[i % len(COLOURS)]
        known = [
            (sx(x), sy(lo), sy(hi))
            for x, lo, hi in zip(line.x, line.low, line.high, strict=False)
            if lo is not None and hi is not None
        ]
        if known:
            edge = [f"{x:.1f},{hi:.1f}" for x, _, hi in known] + [f"{x:.1f},{lo:.1f}" for x, lo, _ in reversed(known)]
            out.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
        path = [f"{sx(x):.1f},{sy(y):.1f}" for x, y in zip(line.x, line.mean, strict=True) if y is not None]
        if len(path) == 1:
            cx, cy = path[0].split(",")
            out.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>')
        out.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        lx, ly = left + (i % 2) * (width - left) // 2, height - bottom + 44 + 16 * (i // 2)
        out.append(f'<rect x="{lx}" y="{ly - 8}" width="14" height="4" fill="{colour}"/>')
        out.append(f'<text x="{lx + 19}" y="{ly - 2}">{html.escape(line.name)}</text>')
    return "".join(out) + "</svg>"


def svg_heat_map(heat: HeatMap, cell: int = 58) -> str:
    """A table of shares, the darker the larger."""
    left, top, rows, columns = 90, 50, len(heat.row_names), len(heat.column_names)
    width, height = left + cell * columns + 10, top + 28 * rows + 10
    out = [
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11"><text x="0" y="14" font-size="13" font-weight="600">'
        f"{html.escape(heat.title)}</text>"
    ]
    for j, name in enumerate(heat.column_names):
        x = left + cell * (j + 0.5)
        out.append(f'<text x="{x}" y="{top - 8}" text-anchor="middle" font-size="9">{html.escape(name)}</text>')
    for i, name in enumerate(heat.row_names):
        y = top + 28 * i
        out.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{html.escape(name)}</text>')
        for j, value in enumerate(heat.values[i]):
            ink = "#fff" if value > 0.5 else "#222"
            fill = f'fill="{COLOURS[0]}" fill-opacity="{value:.3f}" stroke="#ddd"'
            out.append(f'<rect x="{left + cell * j}" y="{y}" width="{cell}" height="28" {fill}/>')
            x = left + cell * (j + 0.5)
            out.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle" fill="{ink}">{value:.2f}</text>')
    return "".join(out) + "</svg></figure>"


def figure_text(figure: dict[str, Any] | None, digits: int = 3) -> str:
    """For instance "28.312 ± 0.421"; "not measured" for none."""
    if figure is None or figure.get("mean") is None:
        return "not measured"
    text = f"{figure['mean']:.{digits}f}"
    if figure.get("low") is None:
        return text
    return f"{text} ± {(figure['high'] - figure['low']) / 2:.{digits}f}"


def sections(metrics: dict[str, Any], pictures: dict[str, Picture], speed: dict[str, Any] | None) -> list[Section]:
    """What a report holds; a part that was not measured is left out, a figure that was not says so."""
    parts = [_fidelity, _distribution, _control, _meaning, _codebooks, _stability]
    made = [part(metrics, pictures) for part in parts]
    if speed:
        rows = [
            [name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)]
            for name, value in speed.items()
            if not isinstance(value, dict)
        ]
        made.append(Section("Speed", "Of the rollouts of this report, without compiling.", [Table(["", ""], rows)]))
    return [section for section in made if section]


def figure_of(metrics: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A figure of metrics.json with its interval, or None."""
    if name not in metrics.get("intervals", {}):
        return None
    return {"mean": metrics[name]} | metrics["intervals"][name]


def _figures(metrics: dict[str, Any], rows: Sequence[tuple[str, str]], digits: int = 3) -> Table:
    cells = []
    for name, title in rows:
        found = figure_of(metrics, name)
        if found:
            cells.append([title, figure_text(found, digits), str(found["n"])])
    return Table(["", "mean ± 95 % interval", "n"], cells)


def _line(metrics: dict[str, Any], name: str, title: str) -> Line | None:
    curve = metrics["per_horizon"].get(name)
    if curve is None:
        return None
    x = [curve["first"] + i for i in range(len(curve["mean"]))]
    return Line(title, x, curve["mean"], curve["low"], curve["high"])


FRAME_METRICS = (("psnr", "PSNR, dB ↑"), ("ssim", "SSIM ↑"), ("lpips", "LPIPS ↓"), ("l1", "L1 ↓"))


def _fidelity(metrics: dict[str, Any], pictures: dict[str, Picture]) -> Section:
    named = [
        ("tokenizer", "tokenizer's reconstruction, all frames"),
        ("lam", "LAM's next frame"),
        ("rollout", "rollout from 1 frame"),
        ("copy_last_frame", "last of 1 prompt frame repeated"),
        ("reconstruction", "reconstruction of the same frames"),
        ("rollout_4", "rollout from 4 frames"),
        ("copy_last_frame_4", "last of 4 prompt frames repeated"),
        ("reconstruction_4", "reconstruction of the same frames"),
    ]
    header = ["", *(title for _, title in FRAME_METRICS), "n"]
    rows = []
    for name, title in named:
        found = [figure_of(metrics, f"{name}_{metric}") for metric, _ in FRAME_METRICS]
        if found[0]:
            digits = (2, 3, 4, 4)
            rows.append([title, *map(figure_text, found, digits), str(found[0]["n"])])
    blocks: list[Any] = [Table(header, rows)]
    for prompt in ("", "_4"):
        for metric, title in FRAME_METRICS:
            lines = [
                _line(metrics, f"rollout{prompt}_{metric}", "rollout"),
                _line(metrics, f"copy_last_frame{prompt}_{metric}", "last prompt frame repeated"),
                _line(metrics, f"reconstruction{prompt}_{metric}", "reconstruction of the truth"),
            ]
            known = [line for line in lines if line]
            if known:
                frames = "1 prompt frame" if not prompt else "4 prompt frames"
                blocks.append(Chart(f"{title}, {frames}", "frames after the prompt", known))
    blocks += [pictures[name] for name in ("rollouts", "reconstructions") if name in pictures]
    text = f"On {metrics['num_clips']} clips of the {metrics['split']} split, means over clips and frames."
    if "actions" in metrics:
        text += f" Rollouts play the {metrics['actions']} actions of each clip."
    return Section("Fidelity", text, blocks)


def _distribution(metrics: dict[str, Any], _: dict[str, Picture]) -> Section | None:
    rows = [
        ("fvd", "FVD of rollouts ↓"),
        ("fvd_floor", "FVD of real clips (floor)"),
        ("frame_distance", "Fréchet distance of rollouts' frames ↓"),
        ("frame_distance_floor", "the same of real frames (floor)"),
    ]
    if "fvd" not in metrics:
        return None
    text = (
        "Fréchet distances of rollouts, and of the real clips they began from, to as many other real clips: logits of "
        "I3D (Kinetics-400) for clips, the last feature map of the LPIPS network for frames. With few clips both are "
        "far above their limit; compare them at equal n, and with the floor. The frame distance is no FID: the network "
        "is another. Not measured means that the weights are not installed (make eval-deps), or that clips are too few "
        "or too short."
    )
    return Section("Distribution", text, [_figures(metrics, rows, 2)])


def _control(metrics: dict[str, Any], pictures: dict[str, Picture]) -> Section | None:
    if "delta_psnr_by_action" not in metrics:
        return None
    by_action = metrics["delta_psnr_by_action"]
    horizons = list(by_action)
    table = _figures(metrics, [(f"delta_psnr_t{t}", f"Δ{t} PSNR, dB ↑") for t in horizons])
    actions = list(by_action[horizons[0]])
    rows = []
    for a in actions:
        cells = [f"{figure_text(by_action[t][a], 2)} ({by_action[t][a]['n']})" for t in horizons]
        rows.append([f"action {a}", *cells])
    blocks: list[Any] = [table, Table(["leading to frame t", *(f"Δ{t} PSNR (n)" for t in horizons)], rows)]
    line = _line(metrics, "delta_psnr", "Δ PSNR")
    if line:
        blocks.append(Chart("Δ PSNR, dB", "frames after the prompt", [line]))
    if "action_sweep" in pictures:
        blocks.append(pictures["action_sweep"])
    text = (
        "Δt PSNR: by how much playing the clip's own actions beats random actions, t frames after a prompt of one "
        "frame, with the same noise. Zero: the world ignores its actions."
    )
    return Section("Controllability", text, blocks)


def _meaning(metrics: dict[str, Any], _: dict[str, Picture]) -> Section | None:
    found = metrics.get("latent_actions")
    if not found:
        return None
    table = np.array(found["table"], float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = [f"{k} ({int(row.sum())})" for k, row in enumerate(table)]
    known = {int(n): f for n, f in found["accuracy"].items() if f["mean"] is not None}
    rows = [[f"map from {n} labels", figure_text(f)] for n, f in known.items()]
    rows += [["most frequent action", figure_text(found["accuracy_majority"])]]
    rows += [["chance", f"{found['accuracy_chance']:.3f}"]]
    blocks: list[Any] = [
        _figures(metrics, [("latent_action_ami", "adjusted mutual information")]),
        HeatMap("Share of true actions for each latent one (transitions)", names, found["action_names"], shares),
        Table(["accuracy on held-out transitions", "mean ± 95 % interval"], rows),
    ]
    if known:
        x = list(known)
        flat = lambda name, y: Line(name, x, [y] * len(x))
        line = Line("best map", x, *([f[key] for f in known.values()] for key in ("mean", "low", "high")))
        lines = [line, flat("most frequent action", found["accuracy_majority"]["mean"])]
        lines.append(flat("chance", found["accuracy_chance"]))
        blocks.append(Chart("Accuracy of latent → true action", "labelled transitions", lines, log_x=True))
    text = (
        f"Latent actions against true ones on {found['transitions']} transitions; actions that do the same count as "
        "one. A map from latent to true actions is learned from some transitions and scored on other clips."
    )
    return Section("What the latent actions mean", text, blocks)


def _codebooks(metrics: dict[str, Any], pictures: dict[str, Picture]) -> Section | None:
    rows: list[list[str]] = []
    blocks: list[Any] = []
    for name, title in (("tokenizer", "tokenizer"), ("lam", "latent actions")):
        found = metrics.get(f"{name}_codebook")
        if found:
            usage, spread = (figure_of(metrics, f"{name}_codebook_{x}") for x in ("usage", "perplexity"))
            cells = [title, str(found["codes"]), figure_text(usage), figure_text(spread, 1)]
            rows.append([*cells, str(found["dead"]), str(found["tokens"])])
    if not rows:
        return None
    blocks.append(Table(["codebook", "codes", "share used", "perplexity", "unused", "tokens seen"], rows))
    if "lam_codebook" in metrics:
        counts = metrics["lam_codebook"]["counts"]
        total = max(sum(counts), 1)
        shares = [[str(k), str(n), f"{n / total:.3f}"] for k, n in enumerate(counts)]
        blocks.append(Table(["latent action", "transitions", "share"], shares))
    if "codes" in pictures:
        blocks.append(pictures["codes"])
    return Section("Codebooks", "Codes that occur on these clips; few clips leave more codes unused.", blocks)


def _stability(metrics: dict[str, Any], _: dict[str, Picture]) -> Section | None:
    if "long_rollout_sharpness" not in metrics:
        return None
    measures = (
        ("sharpness", "sharpness, 1/255"),
        ("colour_distance", "colour distance"),
        ("unchanged", "share of unchanged pixels"),
    )
    rows, blocks = [], []  # type: tuple[list[tuple[str, str]], list[Any]]
    for name, title in measures:
        rows += [(f"long_rollout_{name}", f"{title}: rollouts"), (f"real_{name}", f"{title}: real clips")]
        line = _line(metrics, f"long_rollout_{name}", "rollouts")
        if line:
            real = metrics[f"real_{name}"]
            blocks.append(
                Chart(
                    title, "frames after the prompt", [line, Line("real clips", [line.x[0], line.x[-1]], [real, real])]
                )
            )
    text = (
        f"Rollouts of {metrics['long_frames']} frames with random actions; figures are means over their last quarter. "
        "Colour distance: total variation between a frame's histogram and that of the real frames."
    )
    return Section("Stability of long rollouts", text, [_figures(metrics, rows), *blocks])


def comparison(a: dict[str, Any], b: dict[str, Any]) -> str:
    """A table of how b differs from a, both metrics.json; a star marks a difference beyond its 95 % interval.

    Figures on the same clips are compared clip by clip, which is far sharper.
    """
    same = a.get("clips_digest") == b.get("clips_digest")
    rows = [("", "first", "second", "difference", "")]
    for name in a["intervals"]:
        first, second = figure_of(a, name), figure_of(b, name)
        if first is None or second is None or first["mean"] is None or second["mean"] is None:
            continue
        one, two = (_to_figure(x) for x in (first, second))
        values = [np.array(m["per_clip"].get(name) or [], float) for m in (a, b)]
        paired = same and len(values[0]) == len(values[1]) > 1
        change = difference(one, two, (values[0], values[1]) if paired else None)
        half = (change.high - change.low) / 2
        beyond = "*" if change.low > 0 or change.high < 0 else ""
        spread = f"± {half:.4f}" if math.isfinite(half) else ""
        rows.append((name, f"{one.mean:.4f}", f"{two.mean:.4f}", f"{change.mean:+.4f} {spread}", beyond))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    how = "the same clips, compared one by one" if same else "different clips, compared as independent"
    return "\n".join(line.rstrip() for line in lines) + f"\n* beyond the 95 % interval; {how}"


def _to_figure(figure: dict[str, Any]) -> Figure:
    low, high = (math.nan if figure[key] is None else figure[key] for key in ("low", "high"))
    return Figure(figure["mean"], low, high, figure["n"])
