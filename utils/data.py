"""Datasets of clips: the format on disk, and the loader.

A dataset is a folder:

    metadata.json                  what the clips are and which files hold them (`Metadata`)
    train/ val/ test/              *.array_record files, one record a clip (`Clip`)

Within a file the longest clips come first, so that the clips of at least T frames are a prefix that the metadata
alone can tell. Records are msgpack: nothing read from a dataset is ever executed.
"""

import dataclasses
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from models.errors import InputError

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Clip:
    """Consecutive frames of one episode.

    frames_THWC: uint8.
    actions_T: int32 or None; `actions_T[t]` leads from frame t to frame t + 1 (the last one leads out of the clip).
    rewards_T: float32 or None; `rewards_T[t]` was earned by `actions_T[t]`.
    level_seed: The level of the environment, or None.
    clip_id: Unique in its dataset.
    """

    frames_THWC: np.ndarray
    clip_id: str
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None
    level_seed: int | None = None


def encode_clip(clip: Clip) -> bytes:
    """Packs a clip into one self-describing record."""
    frames = clip.frames_THWC
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise ValueError(f"frames must be uint8 (T, H, W, C), not {frames.dtype} {frames.shape}")
    record: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "clip_id": clip.clip_id,
        "shape": frames.shape,
        "dtype": "uint8",
        "frames": frames.tobytes(),
        "level_seed": clip.level_seed,
    }
    for name, values, dtype in (("actions", clip.actions_T, "<i4"), ("rewards", clip.rewards_T, "<f4")):
        if values is not None:
            if len(values) != len(frames):
                raise ValueError(f"{len(values)} {name} for {len(frames)} frames")
            record[name] = np.asarray(values, dtype).tobytes()
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
        actions, rewards = fields.get("actions"), fields.get("rewards")
        return Clip(
            frames_THWC=np.frombuffer(fields["frames"], fields["dtype"]).reshape(fields["shape"]),
            clip_id=fields["clip_id"],
            actions_T=None if actions is None else np.frombuffer(actions, "<i4"),
            rewards_T=None if rewards is None else np.frombuffer(rewards, "<f4"),
            level_seed=fields.get("level_seed"),
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
class Metadata:
    """What `metadata.json` holds.

    environment: "coinrun", or a name for where the videos come from.
    frame_shape: (height, width, channels) of every frame.
    fps: Frames per second at which the clips play naturally.
    action_names: Names of the discrete actions, or None for video without actions.
    splits: Shards of "train", "val" and "test".
    made_by: Command, arguments, seeds and versions that made the dataset.
    """

    environment: str
    frame_shape: tuple[int, int, int]
    fps: float
    action_names: tuple[str, ...] | None
    splits: dict[str, tuple[Shard, ...]]
    made_by: dict[str, Any]

    @property
    def num_actions(self) -> int:
        """Number of true actions, 0 for video without actions."""
        return len(self.action_names or ())


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
            f"--data_dir {folder}: no dataset here (no metadata.json); make one with generate_dataset.py or "
            "preprocess_dataset.py, or name its folder with --data_dir"
        )
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version}, expected {FORMAT_VERSION}; generate the data again")
        names = fields["action_names"]
        return Metadata(
            environment=fields["environment"],
            frame_shape=tuple(fields["frame_shape"]),
            fps=fields["fps"],
            action_names=None if names is None else tuple(names),
            splits={s: tuple(Shard(f["file"], f["lengths"]) for f in files) for s, files in fields["splits"].items()},
            made_by=fields["made_by"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged metadata ({error!r}); generate the data again") from error


def write_shard(folder: str | Path, file: str, clips: Iterable[Clip]) -> Shard:
    """Writes clips to `folder/file`, longest first, and returns the entry for the metadata.

    The file appears under its name only when it is complete. The same clips give the same bytes.

    Raises:
      OSError: The disk is full, or cannot be written to.
    """
    clips = sorted(clips, key=lambda clip: -len(clip.frames_THWC))  # stable: equal lengths keep their order
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
        n = len(clip.frames_THWC)
        if lengths and lengths[-1][0] == n:
            lengths[-1][1] += 1
        else:
            lengths.append([n, 1])
    return Shard(file, lengths)


class Batch(NamedTuple):
    """A batch of clips, cut to the same length.

    frames_BTHWC: uint8.
    actions_BT: int32, `actions_BT[:, t]` leads from frame t to t + 1; None where the dataset has no actions.
    """

    frames_BTHWC: Any
    actions_BT: Any = None


class ClipSource:
    """Random access to the clips of one split that have at least `seq_len` frames.

    Raises:
      InputError: Nothing to read: no dataset, no files, no clip that is long enough, or files that do not hold what
        the metadata says.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int):
        self.folder, self.split, self.seq_len = Path(folder), split, seq_len
        self.metadata = read_metadata(folder)
        shards = self.metadata.splits.get(split, ())
        if not shards:
            raise InputError(f"--data_dir {folder}: the dataset has no clips in its {split} split; generate more data")
        # Only the long enough clips, which every file begins with. Offsets map a clip to its file.
        self._counts = [shard.count(seq_len) for shard in shards]
        if sum(self._counts) == 0:
            longest = max((shard.lengths[0][0] for shard in shards if shard.lengths), default=0)
            raise InputError(
                f"--seq_len {seq_len}: the longest clip in {folder}/{split} has {longest} frames; choose --seq_len "
                f"{longest} or less, or generate longer clips"
            )
        files = [self.folder / shard.file for shard in shards]
        for file, shard in zip(files, shards, strict=True):
            _check_file(file, shard)
        instructions = [str(file) for file in files]
        self._source: ArrayRecordDataSource = ArrayRecordDataSource(instructions)
        totals = [shard.count() for shard in shards]
        self._ends = np.cumsum(self._counts)
        # Clip i of this source is record i + shift of the concatenated files.
        self._shifts = np.cumsum([0, *totals[:-1]]) - np.cumsum([0, *self._counts[:-1]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def clips(self, indices: Sequence[int]) -> list[Clip]:
        """Reads whole clips in one batched read."""
        shards = np.searchsorted(self._ends, indices, side="right")
        records = self._source.__getitems__([int(i + self._shifts[s]) for i, s in zip(indices, shards, strict=True)])
        return [
            decode_clip(record, f"{self.folder}/{self.split}: clip {i}")
            for i, record in zip(indices, records, strict=True)
        ]

    def windows(self, indices: Sequence[int], positions: Sequence[float]) -> Batch:
        """Reads a batch: from each clip `seq_len` frames, from the place that `positions` (in [0, 1)) names."""
        clips = self.clips(indices)
        frames = np.empty((len(clips), self.seq_len, *self.metadata.frame_shape), np.uint8)
        actions = np.empty((len(clips), self.seq_len), np.int32) if self.metadata.action_names else None
        for i, (clip, position) in enumerate(zip(clips, positions, strict=True)):
            if clip.frames_THWC.shape[1:] != self.metadata.frame_shape:
                raise InputError(
                    f"{self.folder}/{self.split}: clip {clip.clip_id} has frames {clip.frames_THWC.shape[1:]}, the "
                    f"metadata says {self.metadata.frame_shape}; generate the data again"
                )
            start = int(position * (len(clip.frames_THWC) - self.seq_len + 1))
            frames[i] = clip.frames_THWC[start : start + self.seq_len]
            if actions is not None:
                if clip.actions_T is None:
                    raise InputError(f"{self.folder}/{self.split}: clip {clip.clip_id} has no actions; generate again")
                actions[i] = clip.actions_T[start : start + self.seq_len]
        return Batch(frames, actions)


def _check_file(file: Path, shard: Shard) -> None:
    """Refuses a file that is missing, truncated, or does not hold the records that the metadata names."""
    if not file.is_file():
        raise InputError(f"{file}: missing, though metadata.json names it; copy the whole dataset or generate it again")
    try:
        source: ArrayRecordDataSource = ArrayRecordDataSource([str(file)])
        with source:
            found = len(source)
    except Exception as error:  # array_record's C++ errors have no common type
        raise InputError(f"{file}: not a readable ArrayRecord file ({error}); copy or generate it again") from error
    if found != shard.count():
        raise InputError(f"{file}: {found} clips, but metadata.json says {shard.count()}; copy or generate it again")


def batches(
    source: ClipSource,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """An endless stream of this process's share of the global batches `start`, `start + 1`, ...

    A batch is a function of `(source, seed, batch index)` alone. Clips are shuffled by index, anew in each epoch, and
    cut at random places; the numbers of workers and processes change nothing: process p of n holds the clips
    p, p + n, p + 2n, ... of each global batch.

    Args:
      batch_size: Clips in a global batch; a multiple of `process_count`.
      num_workers: Worker processes that read ahead; 0 reads in threads of this process.
    """
    import absl.flags
    import grain  # not at the top: the workers of generate_dataset.py start faster without it

    if batch_size % process_count:
        raise InputError(f"--batch_size {batch_size}: must be a multiple of the {process_count} processes")
    places = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    places = places.random_map(lambda index, rng: (index, rng.random()))
    mine = places[start * batch_size + process_index :: process_count].batch(batch_size // process_count)
    dataset = mine.map(lambda place: source.windows(*place)).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    )
    if num_workers:
        absl.flags.FLAGS.mark_as_parsed()  # grain's workers read flags, and no one else parses them here
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    return iter(dataset)


def to_device(stream: Iterator[Batch], sharding: Any, ahead: int = 1) -> Iterator[Batch]:
    """Moves batches to the devices, `ahead` of their use, so that the copy overlaps with the running step.

    Args:
      sharding: Of the global batch; each process gives its own share.
    """
    import jax

    queue: deque[Batch] = deque()
    for batch in stream:
        queue.append(jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch))
        if len(queue) > ahead:
            yield queue.popleft()
