"""What an evaluation gives; several worlds side by side: one table, and what quality costs of time."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.charts import Chart, Line
from evaluation.fidelity import pooled_psnr
from evaluation.measured import Measured, write_json
from evaluation.page import Section, Table, write_page
from evaluation.report import AFTER_PROMPT, Metrics, Pictures, sections
from evaluation.statistics import NOT_MEASURED, Figure, jackknife
from evaluation.table import METRICS, OF_SEVERAL, WORLDS, figure_of, figure_text
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation of one checkpoint gave: metrics.json, the pictures of its report, and speed.json."""

    metrics: dict[str, Any]
    pictures: Pictures
    speed: dict[str, Any]

    @property
    def frame_ms(self) -> float:
        """Milliseconds for each frame of the rollouts."""
        return 1000 / self.speed["rollout_frames_per_second"]

    def write(self, folder: Path, title: str) -> None:
        """Writes the report: metrics.json, speed.json and the page."""
        write_json(folder / "metrics.json", self.metrics)
        write_json(folder / "speed.json", self.speed)
        speed = self.speed if self.metrics["kind"] == "world" else None
        write_page(folder, title, sections(self.metrics, self.pictures, speed))
        print(f"wrote {folder}/report.html, report.md, metrics.json and speed.json")


def names_of(checkpoints: Sequence[str]) -> dict[str, str]:
    """Checkpoints by names that tell them apart: the ends of their paths, as short as can be.

    Raises:
      InputError: One is given twice.
    """
    paths = [Path(checkpoint).resolve().parts[1:] for checkpoint in checkpoints]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["-".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, checkpoints, strict=True))
    raise InputError(f"`checkpoint` {' '.join(checkpoints)}: one of them is given twice")


def compare_worlds(results: Mapping[str, Result]) -> tuple[dict[str, Any], list[Section]]:
    """What the metrics.json of all worlds together holds, and the report's sections.

    Args:
      results: By name; of the same clips.
    """
    figures = {name: _figures(result.metrics) for name, result in results.items()}
    setting = ("split", "seed", "dtype", "num_clips", "rollout_clips", "clips_digest", "clip_levels", "perceptual_net")
    first = next(iter(results.values())).metrics
    joint = {name: Measured(figures=of).to_json() for name, of in figures.items()}
    pages = [_table(results, joint), _curves(results), _pictures(results)]
    return {"worlds": joint} | {key: first[key] for key in setting}, pages


def _figures(metrics: Metrics) -> dict[str, Figure]:
    """Of one world, those of the table by key."""
    found: dict[str, Figure] = {}
    for key in WORLDS:
        of = figure_of(metrics, key)
        if of:
            mean, low, high = (np.nan if of[part] is None else of[part] for part in ("mean", "low", "high"))
            found[key] = Figure(mean, low, high, of["n"])
    levels = np.array(metrics["clip_levels"][: metrics["rollout_clips"]])
    mse = [np.array(metrics["per_clip"][f"{key}_mse"]) for key in ("copy_last_frame", "rollout")]
    ahead = lambda still, rolled: pooled_psnr(rolled).mean - pooled_psnr(still).mean
    found["margin"] = jackknife(ahead, *mse, groups=[levels, levels])
    for key, combine in (("sharpness", np.divide), ("unchanged", np.subtract)):
        last = [metrics["per_horizon"][f"{of}_{key}"]["mean"][-1] for of in ("rollout", "real")]
        value = NOT_MEASURED if None in last else Figure(float(combine(*last)), np.nan, np.nan, len(levels))
        found[f"last_{key}"] = value
    return {key: found[key] for key in WORLDS if key in found}


def _table(results: Mapping[str, Result], joint: Mapping[str, Metrics]) -> Section:
    keys = [key for key in WORLDS if any(key in of["intervals"] for of in joint.values())]
    rows = []
    for name, result in results.items():
        of = joint[name]
        cells = [figure_text(figure_of(of, key), WORLDS[key].digits) for key in keys]
        rows.append([name, f"{result.frame_ms:.3g}", *cells])
    blocks: list[Any] = [Table(["", "ms a frame ↓", *(WORLDS[key].title for key in keys)], rows)]
    for key in ("margin", "last_sharpness"):
        points = [Line(name, [results[name].frame_ms], [joint[name][key]]) for name in results]
        blocks.append(Chart(f"{WORLDS[key].title}, against time", "milliseconds a frame", points, dots=True))
    known = {name: of for name, of in joint.items() if of["last_sharpness"] is not None}
    front = [Line(name, [of["last_sharpness"]], [of["margin"]]) for name, of in known.items()]
    blocks.append(
        Chart(f"{WORLDS['margin'].title}, against sharpness", WORLDS["last_sharpness"].title, front, dots=True)
    )
    first = next(iter(results.values()))
    clips, size, device = first.metrics["rollout_clips"], first.speed["batch_size"], first.speed["device"]
    text = (
        f"Rollouts of {clips} clips, the same for all, from 1 frame; times are of {size} clips at a time on {device}. "
        + " ".join(f"{metric.name.capitalize()}: {metric.says}" for metric in OF_SEVERAL)
    )
    return Section("Worlds", text, blocks)


def _curves(results: Mapping[str, Result]) -> Section:
    """Frame by frame: how far a world is ahead of a picture that stands still, and its motion beside the truth's."""
    curves = {name: result.metrics["per_horizon"] for name, result in results.items()}
    first = next(iter(curves.values()))

    def line(name: str, mean: Sequence[float | None]) -> Line:
        return Line(name, range(1, len(mean) + 1), mean)

    still = first["copy_last_frame_psnr"]["mean"]
    ahead = [
        line(name, [y - x for x, y in zip(still, of["rollout_psnr"]["mean"], strict=True)])
        for name, of in curves.items()
    ]
    charts = [Chart(WORLDS["margin"].title, AFTER_PROMPT, ahead)]
    for key in ("sharpness", "unchanged"):
        lines = [line(name, of[f"rollout_{key}"]["mean"]) for name, of in curves.items()]
        truth = line("truth", first[f"real_{key}"]["mean"])
        charts.append(Chart(METRICS[f"long_rollout_{key}"].title, AFTER_PROMPT, [truth, *lines]))
    return Section("Frame by frame", "Each world's own report is in the folder of its name.", charts)


def _pictures(results: Mapping[str, Result]) -> Section:
    shown = [
        result.pictures["rollouts"]._replace(name=f"rollouts-{name}", caption=f"{name}: truth over its rollouts.")
        for name, result in results.items()
    ]
    return Section("Rollouts", "From the first frames of the same clips, each with its own actions.", shown)
