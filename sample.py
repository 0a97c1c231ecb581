"""Rolls out a trained world from prompt frames and sets the result against the truth.

    python sample.py --checkpoint runs/dynamics
    python sample.py --checkpoint runs/dynamics --actions sweep      # sweep.png: what each action does

Writes rollout.gif, rollout.mp4 (truth over prediction, the action on each frame), rollout.png (a strip of the frames)
and rollout.json (PSNR and SSIM of each frame).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from evaluation.clips import to_uint8
from evaluation.rollouts import Player
from models.errors import InputError
from models.genie import Inference, World, load_world, stored_sampling
from models.sampling import SamplingFlags, rollout
from player.actions import read_actions, spoken
from player.chosen import check_columns, known_actions, listed_actions, random_like, swept_actions
from player.controls import controls_of
from utils.actions import ActionColumn
from utils.checkpoint import data_of, output_of
from utils.cli import run
from utils.data import Batch, ClipSource, batches, longest_clip
from utils.metrics import pooled_psnr, ssim
from utils.video import label, strip, sweep, upscale, write_png, write_video


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags, Inference):
    """Samples videos from a world; its architecture comes from the checkpoint alone."""

    checkpoint: str = "runs/dynamics"
    """--ckpt_dir of the world's training, or an exported world."""
    output_dir: str = ""
    """Where to write; default: samples/ in the checkpoint's folder, or in runs/worlds/<name> of an exported one."""
    data_dir: str = ""
    """Dataset of the prompts; default: the one that the world was trained on."""
    split: str = "val"
    """Split of the prompts: train, val or test."""
    actions: str = "inferred"
    """inferred: the latent actions of the true video (a world of true actions takes those); random; true: the dataset's
    actions; a list such as 0,3,3,5 (or of columns, forward+jump,camera_x=-10,none), repeated to the end; or sweep: from
    the first prompt, one row for each action, held throughout, in one picture."""
    prompt_frames: int = 1
    """Frames to start from."""
    num_frames: int = 0
    """Frames to predict; 0 fills the window that the world was trained on."""
    num_clips: int = 8
    """Rollouts, from as many clips."""
    shown_clips: int = 4
    """How many of them to draw."""
    scale: int = 3
    """Enlargement of the frames that are written."""
    seed: int = 0
    """Of the choice of clips and of sampling."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt_frames", "num_clips", "shown_clips", "scale"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")
        if self.num_frames < 0:
            raise InputError(f"`num_frames` {self.num_frames}: must not be negative")

    @property
    def from_truth(self) -> bool:
        """Whether the actions are those of the true video, so that the result can be compared with it."""
        return self.actions in ("inferred", "true")


def read_clips(cfg: Config, world: World, num_frames: int) -> tuple[ClipSource, Batch]:
    """The clips to start from, in which the frames to predict follow if the actions are to come from there."""
    data_dir = cfg.data_dir or data_of(cfg.checkpoint)
    length = cfg.prompt_frames + num_frames
    longest = longest_clip(data_dir, cfg.split)
    if cfg.from_truth and 0 < longest < length:
        raise InputError(
            f"`num_frames` {num_frames}: the longest clip in {data_dir}/{cfg.split} has {longest} frames, and with "
            f"`actions` {cfg.actions} the truth must be as long; choose fewer, or `actions` random or a list"
        )
    source = ClipSource(data_dir, cfg.split, length if cfg.from_truth else min(length, world.cfg.window))
    if source.metadata.frame_shape != world.cfg.frame_shape:
        raise InputError(
            f"`data_dir` {data_dir}: frames of {source.metadata.frame_shape}, but the world was trained on "
            f"{world.cfg.frame_shape}"
        )
    return source, next(batches(source, cfg.num_clips, cfg.seed))


def choose_actions(
    cfg: Config, world: World, clips: Batch, columns: Sequence[ActionColumn], num_frames: int
) -> np.ndarray:
    """Actions (B, num_frames), int32 or rows, that lead to the frames to predict; of a sweep, a clip for each."""
    B = len(clips.frames_BTHWC)
    if cfg.actions == "random":
        return random_like(world, cfg.seed, B, num_frames)
    if cfg.actions == "true" and world.lam is not None:
        raise InputError("`actions` true: this world was trained on latent actions; use inferred, random or a list")
    if cfg.from_truth:
        if world.lam is None and clips.actions_BT is None:
            raise InputError(f"`actions` {cfg.actions}: the dataset has none; use random or a list")
        return known_actions(world, clips, cfg.prompt_frames - 1 + num_frames)[:, cfg.prompt_frames - 1 :]
    if cfg.actions == "sweep":
        return swept_actions(world, columns)[0][:, None].repeat(num_frames, axis=1)
    given = listed_actions(world, cfg.actions, columns)
    steps = given[np.arange(num_frames) % len(given)]
    return np.broadcast_to(steps, (B, *steps.shape))


def draw(
    cfg: Config, truth: np.ndarray, predicted: np.ndarray, said: list[list[str]], fps: float, folder: Path
) -> None:
    """Writes the pictures. Frames are uint8 (B, T, H, W, C); beyond the truth's end its last frame stays.

    Args:
      said: What the actions are called that lead to frames 1 ... T - 1.
    """
    truth = np.concatenate([truth, truth[:, -1:].repeat(predicted.shape[1] - truth.shape[1], axis=1)], axis=1)
    truth, predicted = upscale(truth, cfg.scale), upscale(predicted, cfg.scale)
    frames = []
    for t in range(predicted.shape[1]):
        names = ["prompt" if t < cfg.prompt_frames else row[t - 1] for row in said]
        top = [label(frame, f"truth {t}") for frame in truth[:, t]]
        bottom = [label(frame, name) for frame, name in zip(predicted[:, t], names, strict=True)]
        frames.append(np.concatenate([np.concatenate(top, axis=1), np.concatenate(bottom, axis=1)]))
    video = np.stack(frames)
    for name in ("rollout.gif", "rollout.mp4"):
        write_video(folder / name, video, fps)
    rows = np.stack([truth, predicted], axis=1).reshape(-1, *truth.shape[1:])
    write_png(folder / "rollout.png", strip(rows))


def compare(truth: jax.Array, predicted: jax.Array, prompt_frames: int) -> dict[str, list[float]]:
    """Prints and returns PSNR and SSIM of each predicted frame, and the PSNR of the last prompt frame repeated.

    Frames (B, T, H, W, C) are in [0, 1]; the truth's begin with the prompt.
    """
    future = truth[:, prompt_frames:]
    copied = jnp.broadcast_to(truth[:, prompt_frames - 1 : prompt_frames], future.shape)
    scores = {
        "psnr": pooled_psnr(predicted, future),
        "ssim": jnp.mean(ssim(predicted, future), axis=0),
        "copy_last_frame_psnr": pooled_psnr(copied, future),
    }
    table = {name: [round(float(v), 4) for v in values] for name, values in scores.items()}
    print(f"{'frame':>5} {'PSNR':>7} {'SSIM':>7}   PSNR of the prompt frame repeated")
    line = "{:>5} {:7.2f} {:7.3f}   {:7.2f}"
    for i, row in enumerate(zip(*table.values(), strict=True)):
        print(line.format(prompt_frames + i, *row))
    print(line.format("mean", *map(np.mean, table.values())))
    return table


def main(cfg: Config) -> None:
    world = load_world(cfg.checkpoint, cfg.compute)
    num_frames = cfg.num_frames or world.cfg.window - cfg.prompt_frames
    if num_frames < 1:
        raise InputError(f"`prompt_frames` {cfg.prompt_frames}: must be from 1 to {world.cfg.window - 1}")
    source, clips = read_clips(cfg, world, num_frames)
    truth = jnp.asarray(clips.frames_BTHWC, jnp.float32) / 255
    columns = check_columns(world, source, clips)
    between = known_actions(world, clips, cfg.prompt_frames - 1)
    chosen = choose_actions(cfg, world, clips, columns, num_frames)
    sampling = cfg.over(stored_sampling(cfg.checkpoint))
    folder = Path(cfg.output_dir or output_of(cfg.checkpoint, "samples"))
    if cfg.actions == "sweep":
        rows = len(chosen)
        prompt, before = (x[:1].repeat(rows, axis=0) for x in (clips.frames_BTHWC[:, : cfg.prompt_frames], between))
        play = Player(world, sampling, rows, cfg.seed)
        video = play(prompt, np.concatenate([before, chosen], axis=1), np.zeros(rows))  # the same noise in each row
        video = np.concatenate([prompt, video], axis=1)
        true_names = source.metadata.action_names if world.lam is None else None
        labels = read_actions(cfg.checkpoint, world.num_actions, true_names)
        names = swept_actions(world, columns)[1] or [action.name for action in labels]
        write_png(folder / "sweep.png", sweep(video, names))
        print(f"wrote {folder}/sweep.png")
        return
    prompt, actions = truth[:, : cfg.prompt_frames], np.concatenate([between, chosen], axis=1)
    predicted = rollout(world, prompt, jnp.asarray(actions), jax.random.key(cfg.seed), sampling)
    video = np.asarray(to_uint8(jnp.concatenate([prompt, predicted], axis=1)))
    shown, controls = slice(min(cfg.shown_clips, cfg.num_clips)), controls_of(world.cfg.dynamics, columns)
    said = [[spoken(a, controls.columns if controls else ()) for a in row] for row in actions[shown]]
    draw(cfg, clips.frames_BTHWC[shown], video[shown], said, source.metadata.fps, folder)
    if cfg.from_truth:
        table = compare(truth, predicted, cfg.prompt_frames)
        (folder / "rollout.json").write_text(json.dumps({"clips": cfg.num_clips} | table, indent=2))
    print(f"wrote {folder}/rollout.gif, rollout.mp4 and rollout.png")


if __name__ == "__main__":
    run(main, Config)
