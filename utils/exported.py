"""Exported worlds: slim folders to pass on, which sample.py, play.py and evaluate.py take as they take a training's.

    config.json           as of a training, without its paths
    parameters.npz        all variables, in half precision (models/genie.py reads it)
    action_labels.json    what the actions do, where evaluate.py found out
    data/                 a few validation clips, to start from and to measure on
    README.md             how it was made, and how good it is

Nothing is written into such a folder: what a training's folder would hold besides goes to runs/<name of the folder>.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from models.errors import InputError
from models.genie import PARAMETERS, World, read_config
from utils.data import ClipSource, frames_folder, longest_clip
from utils.records import Clip, write_metadata, write_shard

PATHS = ("ckpt_dir", "data_dir", "tokenizer_checkpoint", "lam_checkpoint", "compile_cache", "coordinator", "entity")
"""Training flags that mean nothing elsewhere."""


def is_exported(checkpoint: str | Path) -> bool:
    """Whether a folder holds an exported world instead of a training."""
    return (Path(checkpoint) / PARAMETERS).is_file()


def data_of(checkpoint: str | Path) -> str:
    """The dataset of frames that belongs to a checkpoint: that of its training, or the clips that it was exported with.

    Raises:
      InputError: There is no checkpoint, or no dataset.
    """
    if is_exported(checkpoint):
        return str(Path(checkpoint) / "data")
    return frames_folder(read_config(checkpoint)["train"]["data_dir"])


def output_of(checkpoint: str | Path, name: str = "") -> Path:
    """Where what is made of a checkpoint goes by default: into its folder, but never into an exported world's."""
    folder = Path("runs") / Path(checkpoint).resolve().name if is_exported(checkpoint) else Path(checkpoint)
    return folder / name


def write_parameters(folder: Path, world: World) -> None:
    """Writes all variables of a world in half precision.

    Raises:
      InputError: A value is beyond half precision's range.
    """
    arrays: dict[str, Any] = {}
    for path, value in nnx.to_flat_state(nnx.state(world)):
        array = np.asarray(value[...])
        name = "/".join(map(str, path))
        if array.dtype == np.float32:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                raise InputError(f"{name}: holds values beyond half precision, up to {np.abs(value[...]).max():.3g}")
        arrays[name] = array
    np.savez(folder / PARAMETERS, **arrays)


def write_config(folder: Path, run: str, sampling: Any) -> None:
    """Writes the configuration of a training, without paths, with the way of sampling that the world is to have."""
    config = read_config(run)
    config.pop("command", None)
    train = {name: value for name, value in config["train"].items() if name not in PATHS}
    config["train"] = train | {"sampling": dataclasses.asdict(sampling)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_clips(folder: Path, data_dir: str, num_clips: int, num_frames: int, seed: int) -> int:
    """Writes a dataset of windows of validation clips, from as many levels as there are; returns how many."""
    length = min(num_frames, longest_clip(data_dir, "val"))
    source = ClipSource(data_dir, "val", max(length, 1))
    rng = np.random.default_rng(seed)
    by_level: dict[Any, list[Clip]] = {}
    for clip in source.clips(rng.permutation(len(source)).tolist()):
        by_level.setdefault(clip.level_seed, []).append(clip)
    turns = [(turn, clip) for clips in by_level.values() for turn, clip in enumerate(clips)]
    chosen = [clip for _, clip in sorted(turns, key=lambda pair: pair[0])][:num_clips]
    cut = []
    for clip in chosen:
        at = int(rng.integers(len(clip) - length + 1))
        parts = {f: getattr(clip, f) for f in ("frames_THWC", "actions_T", "rewards_T")}
        parts = {f: None if values is None else values[at : at + length] for f, values in parts.items()}
        cut.append(dataclasses.replace(clip, **parts))
    shard = write_shard(folder, "val/00000.array_record", cut)
    made_by = {"command": "export.py", "of": source.metadata.made_by}
    splits = {"train": (), "val": (shard,), "test": ()}
    write_metadata(folder, dataclasses.replace(source.metadata, splits=splits, made_by=made_by))
    return len(cut)
