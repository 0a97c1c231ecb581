"""Makes a token dataset: the frozen encoders run once, instead of in every step of the dynamics model's training."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.errors import InputError
from models.genie import fingerprint, load_lam, load_tokenizer
from utils.data import ClipSource
from utils.records import SPLITS, Clip, Shard, TokenInfo, read_metadata, write_metadata, write_shard

SHARD_CLIPS = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes what a tokenizer and a LAM make of a dataset's frames; train_dynamics.py takes it as its --data_dir."""

    tokenizer_checkpoint: str = "runs/tokenizer"
    """--ckpt_dir of the tokenizer's training."""
    lam_checkpoint: str = ""
    """--ckpt_dir of the LAM's training; empty leaves latent actions out (for --use_gt_actions)."""
    data_dir: str = "data/coinrun"
    """Dataset of frames."""
    output_dir: str = "data/coinrun_tokens"
    """Dataset to write; must not exist yet."""
    seq_len: int = 16
    """Frames in a clip, the --seq_len of the training to come: tokens depend on the frames before them in the clip."""
    stride: int = 0
    """Frames from the start of a clip to that of the next; 0: --seq_len, so that each frame occurs once."""
    batch_size: int = 32
    """Clips encoded at a time."""

    def __post_init__(self):
        for name, least in (("seq_len", 2), ("stride", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {least}")


def windows(source: ClipSource, stride: int) -> Iterator[Clip]:
    """All clips of a split, cut to `seq_len` frames."""
    T = source.seq_len
    for first in range(0, len(source), 64):
        for clip in source.clips(range(first, min(first + 64, len(source)))):
            assert clip.frames_THWC is not None
            for start in range(0, len(clip) - T + 1, stride):
                cut = slice(start, start + T)
                yield Clip(
                    frames_THWC=clip.frames_THWC[cut],
                    clip_id=f"{clip.clip_id}@{start}",
                    actions_T=None if clip.actions_T is None else clip.actions_T[cut],
                    rewards_T=None if clip.rewards_T is None else clip.rewards_T[cut],
                    level_seed=clip.level_seed,
                )


def main(cfg: Config) -> None:
    metadata, folder = read_metadata(cfg.data_dir), Path(cfg.output_dir)
    if (folder / "metadata.json").exists():
        raise InputError(f"--output_dir {folder}: holds a dataset already; choose another folder, or delete it")
    tokenizer = load_tokenizer(cfg.tokenizer_checkpoint)
    lam = load_lam(cfg.lam_checkpoint) if cfg.lam_checkpoint else None
    for name, model in (("tokenizer", tokenizer), ("lam", lam)):
        if model and model.cfg.frame_shape != metadata.frame_shape:
            raise InputError(
                f"--{name}_checkpoint: made for frames of {model.cfg.frame_shape}, but {cfg.data_dir} has "
                f"{metadata.frame_shape}"
            )

    for flag, codes, most in (
        ("tokenizer", tokenizer.cfg.num_codes, 2**16),
        ("lam", lam.cfg.num_codes if lam else 0, 2**8),
    ):
        if codes > most:
            raise InputError(f"--{flag}_checkpoint: {codes} codes; a token dataset holds at most {most}")

    @jax.jit
    def encode(frames_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        frames = frames_BTHWC.astype(jnp.float32) / 255
        return tokenizer.encode(frames), lam.infer(frames) if lam else None

    def encoded(clips: list[Clip]) -> list[Clip]:
        # The last batch is filled up, so that nothing compiles twice.
        frames = np.stack([clip.frames_THWC for clip in clips + clips[-1:] * (cfg.batch_size - len(clips))])  # type: ignore[misc]
        tokens_BTN, actions_BTm1 = jax.tree.map(np.asarray, encode(frames))
        made = []
        for i, clip in enumerate(clips):
            latent = None if actions_BTm1 is None else np.append(actions_BTm1[i], 0).astype(np.uint8)
            made.append(
                dataclasses.replace(
                    clip, frames_THWC=None, tokens_TN=tokens_BTN[i].astype(np.uint16), latent_actions_T=latent
                )
            )
        return made

    splits: dict[str, tuple[Shard, ...]] = {}
    with tqdm(unit=" clips", disable=None) as progress:
        for split in SPLITS:
            if not metadata.splits.get(split):
                continue
            shards: list[Shard] = []
            done: list[Clip] = []
            waiting: list[Clip] = []
            for clip in windows(ClipSource(cfg.data_dir, split, cfg.seq_len), cfg.stride or cfg.seq_len):
                waiting.append(clip)
                if len(waiting) == cfg.batch_size:
                    done += encoded(waiting)
                    progress.update(len(waiting))
                    waiting = []
                if len(done) >= SHARD_CLIPS:
                    shards.append(write_shard(folder, f"{split}/{len(shards):05d}.array_record", done))
                    done = []
            if waiting:
                done += encoded(waiting)
                progress.update(len(waiting))
            if done:
                shards.append(write_shard(folder, f"{split}/{len(shards):05d}.array_record", done))
            splits[split] = tuple(shards)
    info = TokenInfo(
        tokenizer=fingerprint(tokenizer),
        lam=fingerprint(lam) if lam else None,
        window=cfg.seq_len,
        frames=os.path.abspath(cfg.data_dir),
    )
    write_metadata(folder, dataclasses.replace(metadata, splits=splits, made_by=dataclasses.asdict(cfg), tokens=info))
    size = sum((folder / shard.file).stat().st_size for shards in splits.values() for shard in shards)
    count = sum(shard.count() for shards in splits.values() for shard in shards)
    print(f"{count:,} clips of {cfg.seq_len} frames as tokens, {size / 1e6:,.1f} MB: {folder}")
