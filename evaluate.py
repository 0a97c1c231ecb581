"""Measures a world, a tokenizer or a LAM on held-out clips.

    python evaluate.py --checkpoint runs/dynamics --data_dir data/coinrun
    python evaluate.py --checkpoint runs/a runs/b runs/c    # worlds in one table, on the same clips
    python evaluate.py --compare runs/a/evaluation/metrics.json runs/b/evaluation/metrics.json

Writes report.html, report.md, metrics.json (the same for the same command on the same machine) and speed.json; beside
the checkpoint action_labels.json, what each action does. LPIPS, FVD and the frame distance need the weights that
`make eval-deps` installs.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax

from evaluation.actions import with_names
from evaluation.clips import digest
from evaluation.comparison import comparison
from evaluation.measured import Measured, read_metrics, write_json
from evaluation.outcomes import measure_heads
from evaluation.page import write_page
from evaluation.rollouts import Player
from evaluation.sampling import measure_sampling
from evaluation.suite import (
    Bench,
    Plan,
    measure_lam,
    measure_presses,
    measure_tokenizer,
    measure_world,
    set_up,
    true_actions,
)
from evaluation.table import HEADLINES, METRICS
from evaluation.worlds import Result, compare_worlds, names_of
from models.errors import InputError
from models.genie import Inference, load, read_config, stored_model_config, stored_sampling
from models.sampling import SamplingFlags
from utils.actions import ActionLabel
from utils.checkpoint import data_of, labels_file, output_of
from utils.cli import DEFAULT_CACHE, run, set_up_jax
from utils.data import ClipSource

HEAD_CLIPS = 8  # times as many clips as for all else, or all that there are: ends are rare


@dataclasses.dataclass(frozen=True)
class Config(Plan, SamplingFlags, Inference):
    """Measures a checkpoint; its architecture comes from the checkpoint alone. Zeros stand for defaults by device."""

    checkpoint: tuple[str, ...] = ("runs/dynamics",)
    """--ckpt_dir of the training of a world, a tokenizer or a LAM, or an exported world; or of several worlds, for a
    report of each and one of all."""
    data_dir: str = ""
    """Dataset of the clips; default: the one that the (first) checkpoint was trained on."""
    output_dir: str = ""
    """Where to write; default: evaluation/ in the checkpoint's folder, or in runs/worlds/<name> of an exported one; of
    several runs/comparison."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the clips."""
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
    set_up_jax(cfg.compile_cache, cfg.deterministic)
    checkpoints = names_of(cfg.checkpoint)
    stored = {name: read_config(checkpoint) for name, checkpoint in checkpoints.items()}
    several, source, bench = len(stored) > 1, open_clips(cfg, list(stored.values())), None
    folder = Path(cfg.output_dir or ("runs/comparison" if several else output_of(cfg.checkpoint[0], "evaluation")))
    results: dict[str, Result] = {}
    kinds = {name: config["kind"] for name, config in stored.items()}
    for name, checkpoint in checkpoints.items():
        if kinds[name] in ("agent", "actor_critic"):
            raise InputError(f"`checkpoint` {checkpoint}: holds a policy, which evaluate_policy.py measures")
        if several and kinds[name] != "world":
            raise InputError(f"`checkpoint` {checkpoint}: holds a {kinds[name]}; several checkpoints must be worlds")
        expect_frames(source, checkpoint, kinds[name])
    for name, checkpoint in checkpoints.items():
        began, kind = time.perf_counter(), kinds[name]
        model = load(checkpoint, kind, cfg.compute)
        bench = bench or set_up(cfg, source)
        result, labels = measure(cfg, checkpoint, kind, model, bench)
        result.speed["wall_seconds"] = round(time.perf_counter() - began, 1)
        result.write(folder / name if several else folder, f"{kind.capitalize()} {checkpoint}")
        summarise(result.metrics)
        if labels:
            write_labels(checkpoint, labels)
        results[name] = result
    if several:
        metrics, parts = compare_worlds(results)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "speed.json", {name: result.speed for name, result in results.items()})
        write_page(folder, "Worlds", parts)
        print(f"wrote {folder}/report.html, report.md, metrics.json and speed.json of all together")


def measure(
    cfg: Config, checkpoint: str, kind: str, model: Any, bench: Bench
) -> tuple[Result, list[ActionLabel] | None]:
    """Measures one checkpoint; also what its actions do, where that is known."""
    world = model if kind == "world" else None
    tokenizer = world.tokenizer if world else model if kind == "tokenizer" else None
    lam = world.lam if world else model if kind == "lam" else None
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
        sampling = cfg.over(stored_sampling(checkpoint))
        play = Player(world, sampling, bench.plan.batch_size, cfg.seed)
        if lam:
            buttons = measure_presses(bench, lam, play)
            measured |= buttons
            labels = with_names(labels, buttons.details["buttons"], actions)
        measured |= measure_world(bench, play, actions, reconstruction, labels)
        n = HEAD_CLIPS * bench.plan.num_clips
        measured |= measure_heads(world, bench.source, sampling, n, bench.plan.batch_size, cfg.seed)
        played = {"actions": "inferred" if lam else "true", "sampling": dataclasses.asdict(sampling)}
        measured |= Measured(details=played)
        step_ms = 1000 * bench.plan.batch_size / play.frames_per_second
        speed |= {"rollout_frames_per_second": round(play.frames_per_second, 2), "steps_per_frame": sampling.steps}
        speed |= {"milliseconds_per_step_of_a_batch": round(step_ms, 2)}
        if cfg.sweep_sampling:
            print("rollouts with other steps, orders and temperatures", flush=True)
            n = bench.plan.rollout_clips
            clips = bench.truth[:n], actions[:n]
            measured |= measure_sampling(bench.compare, world, *clips, bench.plan.batch_size, cfg.seed, sampling)
    setting = {
        "kind": kind,
        "split": cfg.split,
        "seed": cfg.seed,
        "dtype": cfg.compute.dtype,
        "quant": cfg.quant,
        "num_clips": bench.plan.num_clips,
        "rollout_clips": bench.plan.rollout_clips if lam or world else 0,
        "clips_digest": digest(bench.truth),
        "clip_levels": bench.pool.levels_B,
        "perceptual_net": cfg.perceptual_net if bench.lpips else None,
    }
    metrics = (measured | Measured(details=setting)).to_json()
    return Result(metrics, measured.pictures, speed), labels


def open_clips(cfg: Config, stored: list[dict[str, Any]]) -> ClipSource:
    """The clips to measure on, as long as those of the trainings that `stored` describes, the shortest of them."""
    windows = [of["model"]["window"] if of["kind"] == "world" else of["train"]["seq_len"] for of in stored]
    return ClipSource(cfg.data_dir or data_of(cfg.checkpoint[0]), cfg.split, min(windows))


def expect_frames(source: ClipSource, checkpoint: str, kind: str) -> None:
    """Refuses a model of frames of another size than the clips have."""
    expected, found = stored_model_config(checkpoint, kind).frame_shape, source.metadata.frame_shape
    if found != expected:
        raise InputError(f"`data_dir` {source.folder}: frames of {found}, those of {checkpoint} are {expected}")


def write_labels(checkpoint: str, labels: list[ActionLabel]) -> None:
    """Writes what each action does, where play.py finds it."""
    try:
        write_json(labels_file(checkpoint), [dataclasses.asdict(label) for label in labels])
    except OSError as error:  # somebody else's checkpoint, perhaps; the measurements are not lost for that
        print(f"warning: no labels of the actions for play.py: {error}", file=sys.stderr)


def summarise(metrics: dict[str, Any]) -> None:
    """Prints the figures that sum a report up."""
    for metric in (METRICS[key] for key in HEADLINES if key in metrics):
        value = metrics[metric.key]
        text = "not measured" if value is None else f"{value:.3f} {metric.unit}".rstrip()
        print(f"{metric.key:>22} {text}")


if __name__ == "__main__":
    run(main, Config)
