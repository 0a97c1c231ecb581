"""Reports: what is shown of a metrics.json and its pictures, section by section."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.charts import Chart, HeatMap, Line
from evaluation.measured import Picture
from evaluation.page import Section, Table
from evaluation.table import (
    ACCURACY,
    CHANGED,
    CODEBOOKS,
    CODES,
    CONTROL,
    DELTA_PSNR,
    DISTRIBUTION,
    DRIFT,
    FRAMES,
    MEANING,
    METRICS,
    MODELS,
    OUTCOMES,
    ROLLOUTS,
    VIDEOS,
    Metric,
    figure_of,
    figure_text,
)

Metrics = Mapping[str, Any]
"""What metrics.json holds."""
Pictures = Mapping[str, Picture]
INTERVAL = "mean ± 95 % interval"
AFTER_PROMPT = "frames after the prompt"


def sections(metrics: Metrics, pictures: Pictures, speed: Metrics | None) -> list[Section]:
    """What a report holds; a part that was not measured is left out, a figure that was not says so."""
    parts = [_fidelity, _motion, _distribution, _control, _buttons, _meaning, _outcomes, _codebooks]
    parts += [_stability, _sampling]
    made = [part(metrics, pictures) for part in parts]
    if speed:
        rows = [
            [name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)]
            for name, value in speed.items()
        ]
        made.append(Section("Speed", "Of the rollouts of this report, without compiling.", [Table(["", ""], rows)]))
    return [section for section in made if section]


def _figures(metrics: Metrics, shown: Sequence[Metric]) -> Table:
    found = [(metric, figure_of(metrics, metric.key)) for metric in shown]
    rows = [[metric.title, figure_text(f, metric.digits), str(f["n"])] for metric, f in found if f]
    return Table(["", INTERVAL, "n"], rows)


def _line(metrics: Metrics, key: str, name: str) -> Line | None:
    curve = metrics["per_horizon"].get(key)
    if curve is None:
        return None
    x = [curve["first"] + i for i in range(len(curve["mean"]))]
    return Line(name, x, curve["mean"], curve["low"], curve["high"])


def _fidelity(metrics: Metrics, pictures: Pictures) -> Section:
    rows = []
    shown = (*FRAMES, CHANGED)
    for subject in (*MODELS, *ROLLOUTS):
        found = [figure_of(metrics, subject.of(metric).key) for metric in shown]
        if found[0]:
            cells = [figure_text(f, m.digits) if f else "" for f, m in zip(found, shown, strict=True)]
            rows.append([subject.name, *cells, str(found[0]["n"])])
    blocks: list[Any] = [Table(["", *(metric.title for metric in shown), "n"], rows)]
    for prompt, subjects in (("1 prompt frame", ROLLOUTS[:4]), ("4 prompt frames", ROLLOUTS[4:])):
        for metric in FRAMES:
            lines = [_line(metrics, subject.of(metric).key, subject.name) for subject in subjects]
            known = [line for line in lines if line]
            if known:
                blocks.append(Chart(f"{metric.title}, {prompt}", AFTER_PROMPT, known))
    blocks += [pictures[name] for name in ("rollouts", "reconstructions") if name in pictures]
    levels = len(set(metrics["clip_levels"][: metrics["num_clips"]]))
    text = f"On {metrics['num_clips']} clips of {levels} levels of the {metrics['split']} split, means over clips and "
    text += "frames; intervals count clips of one level as dependent."
    if "actions" in metrics:
        text += f" Rollouts play the {metrics['actions']} actions of each clip."
    return Section("Fidelity", text, blocks)


def _motion(metrics: Metrics, _: Pictures) -> Section | None:
    charts = []
    for metric in (metric for metric in DRIFT if f"rollout_{metric.key}" in metrics["per_horizon"]):
        named = {"rollout": "rollouts", "real": "truth"}
        lines = [_line(metrics, f"{key}_{metric.key}", name) for key, name in named.items()]
        charts.append(Chart(metric.title, AFTER_PROMPT, [line for line in lines if line]))
    text = "A world that stands still leaves its pixels unchanged; one that dissolves loses its sharpness."
    return Section("Motion", text, charts) if charts else None


def _distribution(metrics: Metrics, _: Pictures) -> Section | None:
    if "fvd" not in metrics:
        return None
    text = (
        "Fréchet distances of rollouts, and of the real clips they began from, to as many other real clips: logits of "
        "I3D (Kinetics-400) for clips, the last feature map of the LPIPS network for frames. With few clips both are "
        "far above their limit; compare them at equal n, and with the floor. The frame distance is no FID: the network "
        "is another. Not measured means that the weights are not installed (make eval-deps), or that clips are too few "
        "or too short."
    )
    return Section("Distribution", text, [_figures(metrics, DISTRIBUTION)])


def _control(metrics: Metrics, pictures: Pictures) -> Section | None:
    if "delta_psnr_by_action" not in metrics:
        return None
    by_action = metrics["delta_psnr_by_action"]
    horizons = list(by_action)
    rows = []
    for action in by_action[horizons[0]]:
        found = [by_action[t][action] for t in horizons]
        rows.append([f"action {action}", *(f"{figure_text(f, DELTA_PSNR.digits)} ({f['n']})" for f in found)])
    header = ["leading to frame t", *(f"{METRICS[f'{DELTA_PSNR.key}_t{t}'].name} (n)" for t in horizons)]
    blocks: list[Any] = [_figures(metrics, CONTROL), *([Table(header, rows)] if rows else [])]
    line = _line(metrics, DELTA_PSNR.key, DELTA_PSNR.name)
    if line:
        blocks.append(Chart(DELTA_PSNR.title, AFTER_PROMPT, [line]))
    if "action_sweep" in pictures:
        blocks.append(pictures["action_sweep"])
    return Section("Controllability", f"{DELTA_PSNR.name}: {DELTA_PSNR.says}", blocks)


def _buttons(metrics: Metrics, _: Pictures) -> Section | None:
    found = metrics.get("buttons")
    if not found:
        return None
    rows = [
        [f"action {i}", b["name"], f"{b['right']:+.2f}", f"{b['up']:+.2f}", f"{b['agree']} of {b['prompts']}"]
        for i, b in enumerate(found)
    ]
    header = ["", "name", "to the right, pixels per frame", "up, pixels per frame", "prompts that agree"]
    text = (
        "How the player moves while an action is held, in comparison to the idle one, from prompts after which the LAM "
        "saw that action: by the picture's shift the other way, or, where the picture stands, by that of what is at "
        "its centre. A prompt agrees if the named direction is the larger one and has its sign."
    )
    return Section("Buttons", text, [Table(header, rows)])


def _meaning(metrics: Metrics, _: Pictures) -> Section | None:
    found = metrics.get("latent_actions")
    if not found:
        return None
    table = np.array(found["table"], float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = [f"{k} ({int(row.sum())})" for k, row in enumerate(table)]
    accuracy, chance = _figures(metrics, ACCURACY), found["accuracy_chance"]
    rows = [*(row[:2] for row in accuracy.rows), ["chance", f"{chance:.3f}"]]
    blocks: list[Any] = [
        _figures(metrics, MEANING),
        HeatMap("Share of true actions for each latent one (transitions)", names, found["action_names"], shares),
        Table(["accuracy on held-out transitions", INTERVAL], rows),
    ]
    known = {int(n): f for n, f in found["accuracy"].items() if f["mean"] is not None}
    if known:
        x = list(known)
        flat = lambda name, y: Line(name, x, [y] * len(x))
        best = Line("best map", x, *([f[key] for f in known.values()] for key in ("mean", "low", "high")))
        pairs = Line("… of pairs", x, [found["accuracy_pair"][str(n)]["mean"] for n in x])
        majority = flat(METRICS["action_accuracy_majority"].name, found["accuracy_majority"]["mean"])
        lines = [best, pairs, majority, flat("chance", chance)]
        blocks.append(Chart("Accuracy of latent → true action", "labelled transitions", lines, log_x=True))
    text = (
        f"Latent actions against true ones on {found['transitions']} transitions; actions that do the same count as "
        "one. A map from latent to true actions is learned from some transitions and scored on other clips."
    )
    return Section("What the latent actions mean", text, blocks)


def _codebooks(metrics: Metrics, pictures: Pictures) -> Section | None:
    rows = []
    for book in CODEBOOKS:
        found = metrics.get(book.key)
        if found:
            figures = [figure_text(figure_of(metrics, book.of(metric).key), metric.digits) for metric in CODES]
            rows.append([book.name, str(found["codes"]), *figures, str(found["dead"]), str(found["tokens"])])
    if not rows:
        return None
    header = ["codebook", "codes", *(metric.title for metric in CODES), "unused", "tokens seen"]
    blocks: list[Any] = [Table(header, rows)]
    if "lam_codebook" in metrics:
        counts = metrics["lam_codebook"]["counts"]
        total = max(sum(counts), 1)
        shares = [[str(k), str(n), f"{n / total:.3f}"] for k, n in enumerate(counts)]
        blocks.append(Table(["latent action", "transitions", "share"], shares))
    if "codes" in pictures:
        blocks.append(pictures["codes"])
    return Section("Codebooks", "Codes that occur on these clips; few clips leave more codes unused.", blocks)


def _outcomes(metrics: Metrics, _: Pictures) -> Section | None:
    if "outcome_clips" not in metrics:
        return None
    text = (
        f"Of {metrics['outcome_clips']} clips. Rollouts go on from their second frame, for {metrics['outcome_steps']} "
        "steps; scores that tell nothing have the base rate for their average precision."
    )
    return Section("Rewards and ends", text, [_figures(metrics, OUTCOMES)])


def _stability(metrics: Metrics, _: Pictures) -> Section | None:
    if "long_frames" not in metrics:
        return None
    rollouts, real = VIDEOS
    blocks: list[Any] = [_figures(metrics, [video.of(metric) for metric in DRIFT for video in VIDEOS])]
    for metric in DRIFT:
        line = _line(metrics, rollouts.of(metric).key, rollouts.name)
        if line:
            level = metrics[real.of(metric).key]
            lines = [line, Line(real.name, [line.x[0], line.x[-1]], [level, level])]
            blocks.append(Chart(metric.title, AFTER_PROMPT, lines))
    text = (
        f"Rollouts of {metrics['long_frames']} frames with actions of held-out clips, strung together; figures are "
        "means over their last quarter. "
        + " ".join(f"{metric.name.capitalize()}: {metric.says[0].lower()}{metric.says[1:]}" for metric in DRIFT)
    )
    return Section("Stability of long rollouts", text, blocks)


def _sampling(metrics: Metrics, _: Pictures) -> Section | None:
    found = metrics.get("sampling_sweep")
    if not found:
        return None
    figures = {
        "psnr": "PSNR, pooled, dB",
        "psnr_mean": "mean of PSNRs, dB",
        "unchanged": "unchanged pixels less the real share",
        "sharpness": "sharpness over the real one",
    }
    rows = [
        [
            row["order"],
            f"{row['temperature']:g}",
            str(row["steps"]),
            *("not measured" if row[key] is None else f"{row[key]:.3f}" for key in figures),
        ]
        for row in found
    ]
    blocks: list[Any] = [Table(["order", "temperature", "steps", *figures.values()], rows)]
    ways: dict[str, list[Metrics]] = {}
    for row in found:
        ways.setdefault(f"{row['order']}, T {row['temperature']:g}", []).append(row)
    for key, title in figures.items():
        lines = [Line(way, [row["steps"] for row in of], [row[key] for row in of]) for way, of in ways.items()]
        blocks.append(Chart(title, "steps per frame", lines, log_x=True))
    front = [Line(way, [row["sharpness"] for row in of], [row["psnr"] for row in of]) for way, of in ways.items()]
    blocks.append(Chart(f"{figures['psnr']}, against sharpness", figures["sharpness"], front, dots=True))
    return Section("Ways of sampling", "The same clips from their first frame on, all frames after it.", blocks)
