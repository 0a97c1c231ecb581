"""Datasets of clips: the format on disk.

A dataset is a folder:

    metadata.json                  what the clips are and which files hold them (`Metadata`)
    train/ val/ test/              *.array_record files, one record a clip (`Clip`)

Within a file the longest clips come first, so that the clips of at least T frames are a prefix that the metadata
alone can tell. Records are msgpack: nothing read from a dataset is ever executed.

A token dataset (`preprocess_dataset.py tokens`) holds what a tokenizer and a LAM make of frames, in their place.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from models.errors import InputError
from utils.actions import ActionColumn, column_from

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")

# Here, not with the game, for the sake of datasets of CoinRun from before metadata.json held these.
COINRUN_SAME_ACTIONS = dict.fromkeys("DAWSQE", "NONE")  # not DOWN, which falls through a crate
COINRUN_IDLE_ACTION = "NONE"

PER_FRAME = (
    *("frames_THWC", "actions_T", "rewards_T", "tokens_TN", "latents_TNL", "latent_actions_T"),
    *("terminated_T", "truncated_T"),
)
"""Fields of a clip that have a value for each frame."""
_ACTION_DTYPES = ("<i4", "<f4")  # of discrete and of real actions
_MADE_DTYPES = {"tokens": "<u2", "latents": "<f2"}  # of what a tokenizer makes


@dataclasses.dataclass(frozen=True)
class Clip:
    """Consecutive frames of one episode, or their tokens.

    frames_THWC: uint8; None in a token dataset whose tokens say all (see `TokenInfo`).
    actions_T: None, or the actions; `actions_T[t]` leads from frame t to frame t + 1 (the last one leads out of the
      clip). int32 (T,); beyond one integer (T, A): int32 if all columns are discrete, else float32 (`ActionColumn`).
    rewards_T: float32 or None; `rewards_T[t]` was earned by `actions_T[t]`.
    level_seed: The level of the environment, or None.
    clip_id: Unique in its dataset.
    tokens_TN: uint16; None in a dataset of frames, and of a tokenizer that makes latents.
    latents_TNL: float16, normalised (`Tokenizer.encode_latents`); None but of such a one.
    latent_actions_T: uint8, aligned like `actions_T`, the last one 0; None without a LAM.
    terminated_T: bool or None; whether `actions_T[t]` ended the episode or its level, by death, goal or otherwise.
    truncated_T: bool or None; whether `actions_T[t]` was the last one because time was up.
    success: Whether the level that the clip is from was solved in the end; None where that is not known.
    """

    frames_THWC: np.ndarray | None
    clip_id: str
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None
    level_seed: int | None = None
    tokens_TN: np.ndarray | None = None
    latents_TNL: np.ndarray | None = None
    latent_actions_T: np.ndarray | None = None
    terminated_T: np.ndarray | None = None
    truncated_T: np.ndarray | None = None
    success: bool | None = None

    def __len__(self) -> int:
        """Frames."""
        return len(next(x for x in (self.tokens_TN, self.latents_TNL, self.frames_THWC) if x is not None))


def encode_clip(clip: Clip) -> bytes:
    """Packs a clip into one self-describing record."""
    frames = clip.frames_THWC
    record: dict[str, Any] = {"version": FORMAT_VERSION, "clip_id": clip.clip_id, "level_seed": clip.level_seed}
    if frames is not None:
        if frames.dtype != np.uint8 or frames.ndim != 4:
            raise ValueError(f"frames must be uint8 (T, H, W, C), not {frames.dtype} {frames.shape}")
        record |= {"shape": frames.shape, "dtype": "uint8", "frames": frames.tobytes()}
    for name, made in (("tokens", clip.tokens_TN), ("latents", clip.latents_TNL)):
        if made is not None:
            kept = {} if frames is None else {"frames_shape": frames.shape}
            dtype = _MADE_DTYPES[name]
            record |= {"shape": made.shape, "dtype": dtype, name: np.asarray(made, dtype).tobytes()} | kept
    action_dtype = _ACTION_DTYPES[0]
    if clip.actions_T is not None and clip.actions_T.ndim == 2:
        action_dtype = _ACTION_DTYPES[clip.actions_T.dtype.kind == "f"]
        record |= {"action_dtype": action_dtype, "action_columns": clip.actions_T.shape[1]}
    for name, values, dtype in (
        ("actions", clip.actions_T, action_dtype),
        ("rewards", clip.rewards_T, "<f4"),
        ("latent_actions", clip.latent_actions_T, "u1"),
        ("terminated", clip.terminated_T, "u1"),
        ("truncated", clip.truncated_T, "u1"),
    ):
        if values is not None:
            if len(values) != len(clip):
                raise ValueError(f"{len(values)} {name} for {len(clip)} frames")
            record[name] = np.asarray(values, dtype).tobytes()
    if clip.success is not None:
        record["success"] = clip.success
    return msgpack.packb(record)


def decode_clip(record: bytes, source: str = "record") -> Clip:
    """Unpacks a record; `source` names it in errors.

    Raises:
      InputError: The record is truncated, foreign, or of another format version.
    """
    try:
        fields = msgpack.unpackb(record)
        version = fields["version"]
        if version != FORMAT_VERSION:
            raise InputError(f"{source}: record format {version}, expected {FORMAT_VERSION}; generate the data again")

        def array(name: str, dtype: str) -> np.ndarray | None:
            return None if name not in fields else np.frombuffer(fields[name], dtype)

        frames = array("frames", "u1")
        made = {name: array(name, dtype) for name, dtype in _MADE_DTYPES.items()}
        made = {name: values.reshape(fields["shape"]) for name, values in made.items() if values is not None}
        if not made and frames is None:
            raise KeyError("frames")
        shape = fields.get("frames_shape", fields["shape"])
        if (action_dtype := fields.get("action_dtype", "<i4")) not in _ACTION_DTYPES:
            raise ValueError(f"actions of type {action_dtype}")
        actions = array("actions", action_dtype)
        if actions is not None and "action_columns" in fields:
            actions = actions.reshape(-1, fields["action_columns"])
        return Clip(
            frames_THWC=None if frames is None else frames.reshape(shape),
            clip_id=fields["clip_id"],
            actions_T=actions,
            rewards_T=array("rewards", "<f4"),
            level_seed=fields.get("level_seed"),
            tokens_TN=made.get("tokens"),
            latents_TNL=made.get("latents"),
            latent_actions_T=array("latent_actions", "u1"),
            terminated_T=array("terminated", "?"),
            truncated_T=array("truncated", "?"),
            success=fields.get("success"),
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise InputError(f"{source}: not a clip record ({error}); the file is damaged or foreign") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of clips.

    file: Path within the dataset folder, for instance "train/00000.array_record".
    lengths: Pairs (frames in a clip, number of such clips), longest first, in the order of the records.
    """

    file: str
    lengths: Sequence[Sequence[int]]

    def count(self, min_length: int = 1) -> int:
        """The number of clips of at least `min_length` frames; they are the first records of the file."""
        return sum(count for length, count in self.lengths if length >= min_length)


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What made the tokens of a token dataset.

    tokenizer, lam: Fingerprints (`models.genie.fingerprint`); no LAM, no latent actions.
    window: Frames in each clip, at most. Tokens depend on the frames before them from the first on: clips stay whole.
    frames: Path of the dataset of frames.
    """

    tokenizer: str
    lam: str | None
    window: int
    frames: str

    def expect(self, parts: dict[str, str]) -> None:
        """Refuses models other than those that made the tokens, by name and fingerprint.

        Raises:
          InputError: They differ.
        """
        for name, value in parts.items():
            stored = getattr(self, name)
            if stored != value:
                raise InputError(
                    f"`{name}_checkpoint`: the tokens of `data_dir` were made with another {name} ({stored}, given "
                    f"{value}); give that one, or make the tokens anew with preprocess_dataset.py tokens"
                )


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `metadata.json` holds.

    environment: "coinrun", or a name for where the videos come from.
    frame_shape: (height, width, channels) of every frame.
    fps: Frames per second at which the clips play naturally.
    action_names: Names of the discrete actions; None for video without actions, and beyond one integer.
    splits: Shards of "train", "val" and "test".
    made_by: Command, arguments, seeds and versions that made the dataset.
    tokens: Of a token dataset; None where there are frames.
    same_actions: Names of actions that always do what another one does, each with the other one's name.
    idle_action: Name of the action that does nothing, or None.
    action_columns: What the columns of actions beyond one integer mean; empty where there are no such.
    levels: Of a recorded dataset: how many levels "ended", how many were "solved" (None where that is not told), and
      the mean of the "rewards" earned in one (None where none ended); None where it is not known.
    """

    environment: str
    frame_shape: tuple[int, int, int]
    fps: float
    action_names: tuple[str, ...] | None
    splits: dict[str, tuple[Shard, ...]]
    made_by: dict[str, Any]
    tokens: TokenInfo | None = None
    same_actions: dict[str, str] = dataclasses.field(default_factory=dict)
    idle_action: str | None = None
    action_columns: tuple[ActionColumn, ...] = ()
    levels: dict[str, Any] | None = None

    @property
    def num_actions(self) -> int:
        """Number of true actions, 0 for video without actions, and for actions beyond one integer."""
        return len(self.action_names or ())

    @property
    def has_actions(self) -> bool:
        return bool(self.action_names or self.action_columns)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Of a frame's action: () for one integer, else (A,)."""
        return (len(self.action_columns),) if self.action_columns else ()

    @property
    def action_dtype(self) -> type[np.generic]:
        """int32 where all that an action says is discrete, else float32."""
        return np.float32 if any(column.values is None for column in self.action_columns) else np.int32


def write_metadata(folder: str | Path, metadata: Metadata) -> None:
    """Writes `metadata.json` in one step; a folder without it is not a dataset, so write it last."""
    fields = dataclasses.asdict(metadata)
    summary = {
        split: {"clips": sum(s.count() for s in shards), "frames": sum(n * k for s in shards for n, k in s.lengths)}
        for split, shards in metadata.splits.items()
    }
    text = json.dumps(
        {"format_version": FORMAT_VERSION, "num_actions": metadata.num_actions, "summary": summary} | fields
    )
    temporary = Path(folder) / "metadata.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, Path(folder) / "metadata.json")


def read_metadata(folder: str | Path) -> Metadata:
    """Reads `metadata.json`.

    Raises:
      InputError: The folder or the file is missing, damaged, or of another format version.
    """
    path = Path(folder) / "metadata.json"
    if not path.is_file():
        raise InputError(
            f"`data_dir` {folder}: no dataset here (no metadata.json); make one with generate_dataset.py or "
            "preprocess_dataset.py, or name its folder with `data_dir`"
        )
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version}, expected {FORMAT_VERSION}; generate the data again")
        names, tokens = fields["action_names"], fields.get("tokens")
        if fields["environment"] == "coinrun":
            fields = {"same_actions": COINRUN_SAME_ACTIONS, "idle_action": COINRUN_IDLE_ACTION} | fields
        return Metadata(
            environment=fields["environment"],
            frame_shape=tuple(fields["frame_shape"]),
            fps=fields["fps"],
            action_names=None if names is None else tuple(names),
            splits={s: tuple(Shard(f["file"], f["lengths"]) for f in files) for s, files in fields["splits"].items()},
            made_by=fields["made_by"],
            tokens=TokenInfo(**tokens) if tokens else None,
            same_actions=dict(fields.get("same_actions", {})),
            idle_action=fields.get("idle_action"),
            action_columns=tuple(map(column_from, fields.get("action_columns", ()))),
            levels=fields.get("levels"),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged metadata ({error!r}); generate the data again") from error


def write_shard(folder: str | Path, file: str, clips: Iterable[Clip]) -> Shard:
    """Writes clips to `folder/file`, longest first, and returns the entry for the metadata.

    The file appears under its name only when it is complete. The same clips give the same bytes.

    Raises:
      OSError: The disk is full, or cannot be written to.
    """
    clips = sorted(clips, key=lambda clip: -len(clip))  # stable: equal lengths keep their order
    path = Path(folder) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        # zstd:1 writes faster than the default level 3 and takes 5 % more space.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for clip in clips:
            writer.write(encode_clip(clip))
        writer.close()
        os.replace(temporary, path)
    except RuntimeError as error:  # array_record's own; a full disk is one
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    lengths: list[list[int]] = []
    for clip in clips:
        n = len(clip)
        if lengths and lengths[-1][0] == n:
            lengths[-1][1] += 1
        else:
            lengths.append([n, 1])
    return Shard(file, lengths)
