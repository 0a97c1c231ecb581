"""Measures a world, a tokenizer or a LAM on held-out clips.

    python evaluate.py --checkpoint runs/dynamics --data_dir data/coinrun
    python evaluate.py --compare runs/a/evaluation/metrics.json runs/b/evaluation/metrics.json

Writes report.html, report.md, metrics.json (the same for the same command on the same machine) and speed.json; beside
the checkpoint action_labels.json, the true action that each latent one mostly stands for. LPIPS, FVD and the frame
distance need the weights that `make eval-deps` installs. The demo's world takes about two minutes on two CPU cores.
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from evaluation import measures as ev
from evaluation.perceptual import load_i3d, load_lpips
from evaluation.report import Picture, comparison, sections, write_report
from models.errors import InputError
from models.genie import World, load, read_config
from models.lam import LAM
from models.nn import Compute
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from utils.cli import run
from utils.data import ClipSource, frames_folder
from utils.video import strip, sweep, upscale

SHOWN = 4  # clips in a picture
SWEEP_FRAMES = 8  # for which an action is held in the picture of the action sweep


@dataclasses.dataclass(frozen=True)
class Config(SamplingConfig):
    """Measures a checkpoint; its architecture comes from the checkpoint alone. Zeros stand for defaults by device."""

    checkpoint: str = "runs/dynamics"
    """--ckpt_dir of the training of a world, a tokenizer or a LAM."""
    data_dir: str = ""
    """Dataset of the clips; default: the one that the checkpoint was trained on."""
    output_dir: str = ""
    """Where to write; default: evaluation/ in the checkpoint's folder."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the clips."""
    num_clips: int = 0
    """Clips to measure on, or all if there are fewer; 0: 64, on a CPU 32."""
    rollout_clips: int = 0
    """How many of them to roll out; 0: all, on a CPU 8."""
    fvd_clips: int = 0
    """Clips for FVD and the frame distance, and as many others to compare with; 0, and at most: --rollout_clips."""
    long_frames: int = 0
    """Frames of the long rollouts; 0: 500, on a CPU 32."""
    batch_size: int = 0
    """Clips at a time, which changes speed and memory alone; 0: 64, on a CPU 4."""
    perceptual_net: Literal["alexnet", "vgg16"] = "alexnet"
    """Network of LPIPS and of the frame distance."""
    seed: int = 0
    """Of the choice of clips and of sampling."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the models; auto takes bfloat16 on a GPU."""
    deterministic: bool = True
    """On a GPU, the same figures in every run: kernels are then not chosen by trial, which costs some speed."""
    compile_cache: str = "~/.cache/jafar"
    """Folder of compiled programs, for quick restarts; empty for none."""
    compare: tuple[str, str] | None = None
    """Two metrics.json: prints by how much the second differs from the first, and measures nothing."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_clips", "rollout_clips", "fvd_clips", "long_frames", "batch_size"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive, or 0 for the default")


def with_defaults(cfg: Config) -> Config:
    """Fills in what depends on the device."""
    cpu = jax.default_backend() == "cpu"
    num_clips = cfg.num_clips or (32 if cpu else 64)
    rollout_clips = min(num_clips, cfg.rollout_clips or (8 if cpu else num_clips))
    return dataclasses.replace(
        cfg,
        num_clips=num_clips,
        rollout_clips=rollout_clips,
        fvd_clips=min(rollout_clips, cfg.fvd_clips or rollout_clips),
        long_frames=cfg.long_frames or (32 if cpu else 500),
        batch_size=cfg.batch_size or (4 if cpu else 64),
        dtype=cfg.dtype if cfg.dtype != "auto" else "bfloat16" if jax.default_backend() == "gpu" else "float32",
    )


def measure_tokenizer(
    tokenizer: Tokenizer, cfg: Config, truth: np.ndarray, results: ev.Results, compare: ev.Compare, pictures: dict
) -> dict[str, np.ndarray]:
    """Reconstructions and the codebook; returns the frame metrics (B, T)."""
    frames, tokens = ev.run_tokenizer(tokenizer, truth, cfg.batch_size)
    scores = compare(frames, truth)
    results.add_scores("tokenizer", scores, first=0)
    counts = ev.measure_codes(results, "tokenizer", tokens, tokenizer.cfg.num_codes)
    codes = ev.code_pictures(truth, tokens, counts, tokenizer.cfg.patch_size)
    columns = min(16, len(codes))
    grid = upscale(codes[: len(codes) // columns * columns], -(-32 // tokenizer.cfg.patch_size))
    sheet = strip(grid.reshape(-1, columns, *grid.shape[1:]))
    _add(pictures, "codes", sheet, "The most used codes of the tokenizer: mean patch of each, most used first.")
    rows = [row for pair in zip(truth[:SHOWN], frames[:SHOWN], strict=True) for row in pair]
    _add(pictures, "reconstructions", strip(rows), "Truth over the tokenizer's reconstruction.")
    return scores


def measure_lam(
    lam: LAM, cfg: Config, pool: ev.Clips, source: ClipSource, results: ev.Results, compare: ev.Compare
) -> np.ndarray:
    """Next frames, codebook and meaning of latent actions; returns those of the whole pool (B, Tm1)."""
    frames, actions = ev.run_lam(lam, pool.frames_BTHWC, cfg.batch_size)
    n = cfg.num_clips
    results.add_scores("lam", compare(frames[:n], pool.frames_BTHWC[:n, 1:]))
    ev.measure_codes(results, "lam", actions, lam.cfg.num_codes)
    names = source.metadata.action_names
    if names and pool.actions_BT is not None:
        merged, to_merged = ev.merge_actions(names, source.metadata.environment)
        ev.measure_meaning(results, actions, to_merged[pool.actions_BT[:, :-1]], lam.cfg.num_codes, merged, cfg.seed)
    return actions


def measure_world(
    play: ev.Player,
    world: World,
    cfg: Config,
    pool: ev.Clips,
    actions: np.ndarray,
    reconstructed: dict[str, np.ndarray],
    results: ev.Results,
    compare: ev.Compare,
    lpips: Any,
    pictures: dict,
) -> None:
    """Everything that takes rollouts; `actions` (B, Tm1) are those of the whole pool."""
    n, A = cfg.rollout_clips, world.num_actions
    truth, actions = pool.frames_BTHWC[:n], actions[:n]
    reconstructed = {name: values[:n] for name, values in reconstructed.items()}
    played = ev.measure_rollouts(results, play, compare, truth, actions, reconstructed)
    whole = np.concatenate([truth[:, :1], played[1]], axis=1)
    rows = [row for pair in zip(truth[:SHOWN], whole[:SHOWN], strict=True) for row in pair]
    _add(pictures, "rollouts", strip(rows), "Truth over rollouts from the first frame with the truth's actions.")
    ev.measure_control(results, play, compare, truth, actions, played[1], A, cfg.seed)
    held = np.broadcast_to(np.arange(A)[:16, None], (min(A, 16), min(SWEEP_FRAMES, truth.shape[1] - 1)))
    prompts = np.repeat(truth[:1, :1], len(held), axis=0)
    held_out = np.concatenate([prompts, play(prompts, held, np.zeros(len(held)))], axis=1)
    found = results.details.get("latent_actions")
    names = [x["name"] for x in ev.action_labels(found["table"], found["action_names"])] if found else [""] * A
    caption = "One prompt; in each row one action is held throughout (beside it, the true action it mostly stands for)."
    _add(pictures, "action_sweep", sweep(held_out, names), caption)

    m = min(cfg.fvd_clips, len(truth), len(pool.frames_BTHWC) // 2)
    others = pool.frames_BTHWC[len(pool.frames_BTHWC) - m :]
    ev.measure_distribution(results, whole[:m], truth[:m], others, load_i3d(), lpips, min(cfg.batch_size, 16))

    few = truth[: min(cfg.batch_size, len(truth))]
    random = np.random.default_rng(cfg.seed + 1).integers(0, A, (len(few), cfg.long_frames), np.int32)
    long = np.concatenate([few[:, :1], play(few[:, :1], random)], axis=1)
    ev.measure_stability(results, long, pool.frames_BTHWC)
    results.details["long_frames"] = cfg.long_frames


def write_action_labels(
    cfg: Config, results: ev.Results, world: World | None, source: ClipSource, pool: ev.Clips
) -> None:
    """Names for the buttons of play.py: see `evaluation.action_labels`."""
    names, found = source.metadata.action_names, results.details.get("latent_actions")
    if found:
        labels = ev.action_labels(found["table"], found["action_names"])
    elif world is not None and world.lam is None and names and pool.actions_BT is not None:
        labels = ev.action_labels(np.diag(np.bincount(pool.actions_BT.reshape(-1), minlength=len(names))), names)
    else:
        return
    _write_json(Path(cfg.checkpoint) / "action_labels.json", labels)


def main(cfg: Config) -> None:
    if cfg.compare:
        print(comparison(*(read_metrics(path) for path in cfg.compare)))
        return
    began = time.perf_counter()
    if cfg.deterministic:  # before anything touches a device
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if cfg.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cfg.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    cfg = with_defaults(cfg)
    stored = read_config(cfg.checkpoint)
    kind = stored["kind"]
    model = load(cfg.checkpoint, kind, Compute(dtype=cfg.dtype))  # type: ignore[arg-type]
    world = model if kind == "world" else None
    tokenizer = world.tokenizer if world else model if kind == "tokenizer" else None
    lam = world.lam if world else model if kind == "lam" else None

    data_dir = cfg.data_dir or frames_folder(stored["train"]["data_dir"])
    source = ClipSource(data_dir, cfg.split, world.cfg.window if world else stored["train"]["seq_len"])
    shape = (tokenizer.cfg if tokenizer else model.cfg).frame_shape
    if source.metadata.frame_shape != shape:
        raise InputError(
            f"--data_dir {data_dir}: frames of {source.metadata.frame_shape}, the checkpoint's are {shape}"
        )
    # More clips than are measured: others to compare real clips with, and enough labelled transitions.
    labelled = math.ceil(2 * ev.LABELLED[-1] / (source.seq_len - 1))
    pool = ev.choose_clips(source, max(2 * cfg.num_clips, labelled), cfg.seed)
    found = len(pool.frames_BTHWC)
    cfg = dataclasses.replace(cfg, num_clips=min(cfg.num_clips, found), rollout_clips=min(cfg.rollout_clips, found))
    truth = pool.frames_BTHWC[: cfg.num_clips]

    results, pictures = ev.Results(), {}  # type: ignore[var-annotated]
    lpips = load_lpips(cfg.perceptual_net)
    compare = ev.frame_metrics(lpips)
    reconstructed, actions = {}, None
    if tokenizer:
        print(f"tokenizer, on {len(truth)} clips", flush=True)
        reconstructed = measure_tokenizer(tokenizer, cfg, truth, results, compare, pictures)
    if lam:
        print(f"latent actions, on {len(pool.frames_BTHWC)} clips", flush=True)
        actions = measure_lam(lam, cfg, pool, source, results, compare)
    speed: dict[str, Any] = {"device": jax.devices()[0].device_kind, "batch_size": cfg.batch_size}
    if world:
        if actions is None:
            if pool.actions_BT is None or source.metadata.num_actions != world.num_actions:
                raise InputError(
                    f"--data_dir {data_dir}: this world was trained on true actions, which are missing here"
                )
            actions = pool.actions_BT[:, :-1]
        print(f"rollouts, on {cfg.rollout_clips} clips", flush=True)
        sampling = SamplingConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(SamplingConfig)})
        play = ev.Player(world, sampling, cfg.batch_size, cfg.seed)
        measure_world(play, world, cfg, pool, actions, reconstructed, results, compare, lpips, pictures)
        per_second = play.frames / play.seconds
        speed |= {"rollout_frames_per_second": round(per_second, 2), "maskgit_steps": cfg.steps}
        speed |= {"milliseconds_per_step_of_a_batch": round(1000 * cfg.batch_size / per_second, 2)}
        results.details["actions"] = "inferred" if lam else "true"
        results.details["sampling"] = dataclasses.asdict(sampling)
    results.details |= {
        "kind": kind,
        "split": cfg.split,
        "seed": cfg.seed,
        "dtype": cfg.dtype,
        "num_clips": cfg.num_clips,
        "rollout_clips": cfg.rollout_clips if world else 0,
        "clips_digest": ev.digest(truth),
        "perceptual_net": cfg.perceptual_net if lpips else None,
    }
    metrics = results.to_json()
    folder = Path(cfg.output_dir or Path(cfg.checkpoint) / "evaluation")
    _write_json(folder / "metrics.json", metrics)
    _write_json(folder / "speed.json", speed | {"wall_seconds": round(time.perf_counter() - began, 1)})
    try:
        write_action_labels(cfg, results, world, source, pool)
    except OSError as error:  # somebody else's checkpoint, perhaps; the measurements are not lost for that
        print(f"warning: no labels of the actions for play.py: {error}", file=sys.stderr)
    write_report(folder, f"{kind.capitalize()} {cfg.checkpoint}", sections(metrics, pictures, speed if world else None))
    for name in ("tokenizer_psnr", "lam_psnr", "rollout_psnr", "copy_last_frame_psnr", "delta_psnr_t4", "fvd"):
        if name in metrics:
            print(f"{name:>22} {'not measured' if metrics[name] is None else format(metrics[name], '.3f')}")
    print(f"wrote {folder}/report.html, report.md, metrics.json and speed.json")


def read_metrics(path: str) -> dict[str, Any]:
    """Reads a metrics.json of this script.

    Raises:
      InputError: It is missing, or something else.
    """
    try:
        metrics = json.loads(Path(path).read_text())
        if not isinstance(metrics["intervals"], dict):
            raise TypeError("intervals")
        return metrics
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare {path}: not a metrics.json of evaluate.py ({error!r})") from error


def _add(pictures: dict[str, Picture], name: str, image: np.ndarray, caption: str) -> None:
    image = image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)
    pictures[name] = Picture(name, image, caption)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    run(main, Config)
