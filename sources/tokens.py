"""Makes a token dataset: the frozen encoders run once, instead of in every step of the dynamics model's training."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.errors import InputError
from models.genie import fingerprint, load_lam, load_tokenizer
from models.lam import LAM
from models.tokenizer import Tokenizer
from utils.data import ClipSource, filled, longest_clip
from utils.records import SPLITS, Clip, Shard, TokenInfo, read_metadata, write_metadata, write_shard

SHARD_CLIPS = 8192
SHARD_CLIPS_OF_MORE = 512  # where latents, or the frames too, are stored


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """Writes what a tokenizer and a LAM make of a dataset's frames; train_dynamics.py takes it as its --data_dir. Of a
    tokenizer of kind mae these are latents, of half precision."""

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
    """Frames from the start of a clip to that of the next; 0: --seq_len. The last one ends where its clip does, where
    levels end."""
    batch_size: int = 32
    """Clips encoded at a time."""
    pad_short: bool = False
    """Write clips shorter than --seq_len too, for a training with --pad_short."""

    def __post_init__(self):
        for name, least in (("seq_len", 2), ("stride", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least {least}")


def windows(source: ClipSource, stride: int) -> Iterator[Clip]:
    """All clips of a split, cut to `seq_len` frames; shorter ones as they are."""
    T = source.seq_len
    for first in range(0, len(source), 64):
        for clip in source.clips(range(first, min(first + 64, len(source)))):
            assert clip.frames_THWC is not None
            last = max(len(clip) - T, 0)
            for start in dict.fromkeys((*range(0, last, stride), last)):
                cut = slice(start, start + T)
                yield Clip(
                    frames_THWC=clip.frames_THWC[cut],
                    clip_id=f"{clip.clip_id}@{start}",
                    actions_T=None if clip.actions_T is None else clip.actions_T[cut],
                    rewards_T=None if clip.rewards_T is None else clip.rewards_T[cut],
                    level_seed=clip.level_seed,
                    terminated_T=None if clip.terminated_T is None else clip.terminated_T[cut],
                    truncated_T=None if clip.truncated_T is None else clip.truncated_T[cut],
                    success=clip.success,
                )


def write_tokens(options: TokenOptions) -> None:
    """Writes the token dataset.

    Raises:
      InputError: The models do not fit the frames or the format, or the dataset exists.
    """
    metadata, folder = read_metadata(options.data_dir), Path(options.output_dir)
    if (folder / "metadata.json").exists():
        raise InputError(f"`output_dir` {folder}: holds a dataset already; choose another folder, or delete it")
    tokenizer = load_tokenizer(options.tokenizer_checkpoint)
    lam = load_lam(options.lam_checkpoint) if options.lam_checkpoint else None
    _check("tokenizer", tokenizer, 2**16, metadata.frame_shape, options.data_dir)
    if lam:
        _check("lam", lam, 2**8, metadata.frame_shape, options.data_dir)
    if tokenizer.cfg.closed_loop:
        print("note: tokens of a closed loop depend on the pictures shown, so training encodes anew; the LAM is saved")
    encode = _encoder(tokenizer, lam, options.batch_size, options.seq_len)
    more = tokenizer.cfg.motion_reach or tokenizer.cfg.kind == "mae"
    shard_clips = SHARD_CLIPS_OF_MORE if more else SHARD_CLIPS

    shortest, sources = 2 if options.pad_short else options.seq_len, {}
    for split in filter(metadata.splits.get, SPLITS):
        if split == "test" and longest_clip(options.data_dir, split) < shortest:  # trainings do without
            print(f"note: no clip of {options.data_dir}/{split} has {shortest} frames; it is left out")
        else:
            sources[split] = ClipSource(options.data_dir, split, options.seq_len, shortest=shortest)
    splits: dict[str, tuple[Shard, ...]] = {}
    with tqdm(unit=" clips", disable=None) as progress:
        for split, source in sources.items():
            remaining = windows(source, options.stride or options.seq_len)
            shards: list[Shard] = []
            done: list[Clip] = []
            while clips := list(itertools.islice(remaining, options.batch_size)):
                done += encode(clips)
                progress.update(len(clips))
                if len(done) >= shard_clips:
                    shards.append(write_shard(folder, f"{split}/{len(shards):05d}.array_record", done))
                    done = []
            if done:
                shards.append(write_shard(folder, f"{split}/{len(shards):05d}.array_record", done))
            splits[split] = tuple(shards)
    info = TokenInfo(
        tokenizer=fingerprint(tokenizer),
        lam=fingerprint(lam) if lam else None,
        window=options.seq_len,
        frames=os.path.abspath(options.data_dir),
    )
    made_by = dataclasses.asdict(options)
    write_metadata(folder, dataclasses.replace(metadata, splits=splits, made_by=made_by, tokens=info))
    size = sum((folder / shard.file).stat().st_size for shards in splits.values() for shard in shards)
    count = sum(shard.count() for shards in splits.values() for shard in shards)
    made = "latents" if tokenizer.cfg.kind == "mae" else "tokens"
    print(f"{count:,} clips of {options.seq_len} frames as {made}, {size / 1e6:,.1f} MB: {folder}")


def _check(name: str, model: Tokenizer | LAM, most: int, frame_shape: tuple, data_dir: str) -> None:
    """Refuses a model that is for other frames, or has more codes than the format has room for."""
    if model.cfg.frame_shape != frame_shape:
        raise InputError(
            f"`{name}_checkpoint`: made for frames of {model.cfg.frame_shape}, but {data_dir} has {frame_shape}"
        )
    if model.cfg.num_codes > most:
        raise InputError(f"`{name}_checkpoint`: {model.cfg.num_codes} codes; a token dataset holds at most {most}")


def _encoder(
    tokenizer: Tokenizer, lam: LAM | None, batch_size: int, seq_len: int
) -> Callable[[Sequence[Clip]], list[Clip]]:
    """A function from at most `batch_size` clips of at most `seq_len` frames to clips of tokens, or of latents."""

    as_latents = tokenizer.cfg.kind == "mae"

    @jax.jit
    def encode(frames_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        frames = frames_BTHWC.astype(jnp.float32) / 255
        return tokenizer.code(frames), lam.infer(frames) if lam else None

    def encoded(clips: Sequence[Clip]) -> list[Clip]:
        # The last batch is filled up, so that nothing compiles twice, and short clips are: no token sees a later frame.
        whole = [filled(clip.frames_THWC, seq_len) for clip in (*clips, *[clips[-1]] * (batch_size - len(clips)))]  # type: ignore[arg-type]
        made_BTNX, codes_BTm1 = jax.tree.map(np.asarray, encode(np.stack(whole)))
        return [
            dataclasses.replace(
                clip,
                # Tokens of changes do not say what a patch shows, which the dynamics model may want to see.
                frames_THWC=clip.frames_THWC if tokenizer.cfg.motion_reach else None,
                tokens_TN=None if as_latents else made_BTNX[i, : len(clip)].astype(np.uint16),
                latents_TNL=made_BTNX[i, : len(clip)].astype(np.float16) if as_latents else None,
                latent_actions_T=None if lam is None else np.append(codes_BTm1[i, : len(clip) - 1], 0).astype(np.uint8),
            )
            for i, clip in enumerate(clips)
        ]

    return encoded
