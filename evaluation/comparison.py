"""Comparisons: by how much one metrics.json differs from another."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.fidelity import pooled_psnr
from evaluation.statistics import Figure, difference, jackknife
from evaluation.table import METRICS, figure_of


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """A table of how b differs from a, both metrics.json; a star marks a difference beyond its 95 % interval.

    Figures on the same clips are compared clip by clip, which is far sharper.
    """
    same = a.get("clips_digest") == b.get("clips_digest")
    rows = [("", "unit", "first", "second", "difference", "")]
    for key in a["intervals"]:
        first, second = figure_of(a, key), figure_of(b, key)
        if first is None or second is None or first["mean"] is None or second["mean"] is None:
            continue
        one, two = (_to_figure(x) for x in (first, second))
        # A pooled PSNR is no mean over clips: its difference is that of the clips' pooled errors.
        mse = key.removesuffix("psnr") + "mse"
        pooled = mse in a["per_clip"] and mse in b["per_clip"]
        values = [np.array(m["per_clip"].get(mse if pooled else key) or [], float) for m in (a, b)]
        paired = same and len(values[0]) == len(values[1]) > 1
        levels = np.array(a["clip_levels"][: len(values[0])]) if paired and "clip_levels" in a else None
        if paired and pooled:
            change = jackknife(lambda x, y: pooled_psnr(y).mean - pooled_psnr(x).mean, *values, groups=[levels, levels])
        else:
            change = difference(one, two, (values[0], values[1]) if paired else None, levels)
        half = (change.high - change.low) / 2
        marks = "*" * (change.low > 0 or change.high < 0) + "~" * (same and not paired)
        spread = f"± {half:.4f}" if math.isfinite(half) else ""
        unit = f"{METRICS[key].unit} {METRICS[key].arrow}".strip() if key in METRICS else ""
        rows.append((key, unit, f"{one.mean:.4f}", f"{two.mean:.4f}", f"{change.mean:+.4f} {spread}", marks))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    one_by_one = "the same clips, compared one by one, but for ~, compared as independent"
    how = one_by_one if same else "different clips, compared as independent"
    arrows = "↑ more is better, ↓ less is better"
    return "\n".join(line.rstrip() for line in lines) + f"\n{arrows}; * beyond the 95 % interval; {how}"


def _to_figure(figure: Mapping[str, Any]) -> Figure:
    low, high = (math.nan if figure[key] is None else figure[key] for key in ("low", "high"))
    return Figure(figure["mean"], low, high, figure["n"])
