"""Measures a world, a tokenizer or a LAM on held-out clips.

    python evaluate.py --checkpoint runs/dynamics --data_dir data/coinrun
    python evaluate.py --compare runs/a/evaluation/metrics.json runs/b/evaluation/metrics.json

Writes report.html, report.md, metrics.json (the same for the same command on the same machine) and speed.json; beside
the checkpoint action_labels.json, what each action does. LPIPS, FVD and the frame distance need the weights that
`make eval-deps` installs.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax

from evaluation.actions import with_names
from evaluation.buttons import measure_buttons
from evaluation.clips import digest
from evaluation.comparison import comparison
from evaluation.measured import Measured, read_metrics
from evaluation.page import write_page
from evaluation.report import sections
from evaluation.rollouts import Player
from evaluation.sampling import measure_sampling
from evaluation.suite import Plan, measure_lam, measure_tokenizer, measure_world, set_up, true_actions
from evaluation.table import HEADLINES, METRICS
from models.errors import InputError
from models.genie import load, read_config, stored_sampling
from models.nn import Compute
from models.sampling import SamplingFlags
from utils.checkpoint import data_of, output_of
from utils.cli import DEFAULT_CACHE, run, set_up_jax
from utils.data import ClipSource


@dataclasses.dataclass(frozen=True)
class Config(Plan, SamplingFlags):
    """Measures a checkpoint; its architecture comes from the checkpoint alone. Zeros stand for defaults by device."""

    checkpoint: str = "runs/dynamics"
    """--ckpt_dir of the training of a world, a tokenizer or a LAM, or an exported world."""
    data_dir: str = ""
    """Dataset of the clips; default: the one that the checkpoint was trained on."""
    output_dir: str = ""
    """Where to write; default: evaluation/ in the checkpoint's folder, or in runs/worlds/<name> of an exported one."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the clips."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the models; auto takes bfloat16 on a GPU."""
    deterministic: bool = True
    """On a GPU, the same figures in every run: kernels are then not chosen by trial, which costs some speed."""
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""
    compare: tuple[str, str] | None = None
    """Two metrics.json: prints by how much the second differs from the first, and measures nothing."""

    def __post_init__(self):
        Plan.__post_init__(self)
        SamplingFlags.__post_init__(self)


def main(cfg: Config) -> None:
    if cfg.compare:
        print(comparison(*(read_metrics(path, "compare") for path in cfg.compare)))
        return
    began = time.perf_counter()
    set_up_jax(cfg.compile_cache, cfg.deterministic)
    stored = read_config(cfg.checkpoint)
    kind, dtype = stored["kind"], cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    model = load(cfg.checkpoint, kind, Compute(dtype=dtype))
    world = model if kind == "world" else None
    tokenizer = world.tokenizer if world else model if kind == "tokenizer" else None
    lam = world.lam if world else model if kind == "lam" else None
    frame_shape = model.cfg.frame_shape
    bench = set_up(cfg, open_clips(cfg, stored, frame_shape))

    measured, labels, reconstruction = Measured(), None, None
    speed: dict[str, Any] = {"device": jax.devices()[0].device_kind, "batch_size": bench.plan.batch_size}
    if tokenizer:
        print(f"tokenizer, on {len(bench.truth)} clips", flush=True)
        of_tokenizer, reconstruction = measure_tokenizer(bench, tokenizer)
        measured |= of_tokenizer
    if lam:
        print(f"latent actions, on {len(bench.pool.frames_BTHWC)} clips", flush=True)
        of_lam, actions, labels = measure_lam(bench, lam)
        measured |= of_lam
    if world:
        if not lam:
            actions, labels = true_actions(bench, world)
        print(f"rollouts, on {bench.plan.rollout_clips} clips", flush=True)
        sampling = cfg.over(stored_sampling(cfg.checkpoint))
        play = Player(world, sampling, bench.plan.batch_size, cfg.seed)
        if lam:
            buttons = measure_buttons(play, bench.pool.frames_BTHWC, actions, world.num_actions, cfg.seed)
            measured |= buttons
            labels = with_names(labels, buttons.details["buttons"], actions)
        measured |= measure_world(bench, play, actions, reconstruction, labels)
        played = {"actions": "inferred" if lam else "true", "sampling": dataclasses.asdict(sampling)}
        measured |= Measured(details=played)
        step_ms = 1000 * bench.plan.batch_size / play.frames_per_second
        speed |= {"rollout_frames_per_second": round(play.frames_per_second, 2), "steps_per_frame": sampling.steps}
        speed |= {"milliseconds_per_step_of_a_batch": round(step_ms, 2)}
        if cfg.sweep_sampling:
            print("rollouts with other steps, orders and temperatures", flush=True)
            n = bench.plan.rollout_clips
            clips = bench.truth[:n], actions[:n]
            measured |= measure_sampling(bench.compare, world, *clips, bench.plan.batch_size, cfg.seed)
    setting = {
        "kind": kind,
        "split": cfg.split,
        "seed": cfg.seed,
        "dtype": dtype,
        "num_clips": bench.plan.num_clips,
        "rollout_clips": bench.plan.rollout_clips if lam or world else 0,
        "clips_digest": digest(bench.truth),
        "clip_levels": bench.pool.levels_B,
        "perceptual_net": cfg.perceptual_net if bench.lpips else None,
    }
    metrics = (measured | Measured(details=setting)).to_json()
    folder = Path(cfg.output_dir or output_of(cfg.checkpoint, "evaluation"))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "speed.json", speed | {"wall_seconds": round(time.perf_counter() - began, 1)})
    if labels:
        try:
            write_json(output_of(cfg.checkpoint, "action_labels.json"), [dataclasses.asdict(label) for label in labels])
        except OSError as error:  # somebody else's checkpoint, perhaps; the measurements are not lost for that
            print(f"warning: no labels of the actions for play.py: {error}", file=sys.stderr)
    title = f"{kind.capitalize()} {cfg.checkpoint}"
    write_page(folder, title, sections(metrics, measured.pictures, speed if world else None))
    summarise(metrics)
    print(f"wrote {folder}/report.html, report.md, metrics.json and speed.json")


def open_clips(cfg: Config, stored: dict[str, Any], frame_shape: tuple[int, int, int]) -> ClipSource:
    """The clips to measure on, as long as those of the training that `stored` describes."""
    data_dir = cfg.data_dir or data_of(cfg.checkpoint)
    window = stored["model"]["window"] if stored["kind"] == "world" else stored["train"]["seq_len"]
    source = ClipSource(data_dir, cfg.split, window)
    found = source.metadata.frame_shape
    if found != frame_shape:
        raise InputError(f"`data_dir` {data_dir}: frames of {found}, the checkpoint's are {frame_shape}")
    return source


def summarise(metrics: dict[str, Any]) -> None:
    """Prints the figures that sum a report up."""
    for metric in (METRICS[key] for key in HEADLINES if key in metrics):
        value = metrics[metric.key]
        text = "not measured" if value is None else f"{value:.3f} {metric.unit}".rstrip()
        print(f"{metric.key:>22} {text}")


def write_json(path: Path, value: Any) -> None:
    """Writes a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    run(main, Config)
