"""Datasets of clips: the format on disk, and the loader.

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
import signal
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
    """Consecutive frames of one episode, or their tokens.

    frames_THWC: uint8; None in a token dataset.
    actions_T: int32 or None; `actions_T[t]` leads from frame t to frame t + 1 (the last one leads out of the clip).
    rewards_T: float32 or None; `rewards_T[t]` was earned by `actions_T[t]`.
    level_seed: The level of the environment, or None.
    clip_id: Unique in its dataset.
    tokens_TN: uint16; None in a dataset of frames.
    latent_actions_T: uint8, aligned like `actions_T`, the last one 0; None without a LAM.
    """

    frames_THWC: np.ndarray | None
    clip_id: str
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None
    level_seed: int | None = None
    tokens_TN: np.ndarray | None = None
    latent_actions_T: np.ndarray | None = None

    def __len__(self) -> int:
        """Frames."""
        held = self.frames_THWC if self.frames_THWC is not None else self.tokens_TN
        assert held is not None
        return len(held)


def encode_clip(clip: Clip) -> bytes:
    """Packs a clip into one self-describing record."""
    frames, tokens = clip.frames_THWC, clip.tokens_TN
    record: dict[str, Any] = {"version": FORMAT_VERSION, "clip_id": clip.clip_id, "level_seed": clip.level_seed}
    if frames is not None:
        if frames.dtype != np.uint8 or frames.ndim != 4:
            raise ValueError(f"frames must be uint8 (T, H, W, C), not {frames.dtype} {frames.shape}")
        record |= {"shape": frames.shape, "dtype": "uint8", "frames": frames.tobytes()}
    else:
        assert tokens is not None
        record |= {"shape": tokens.shape, "dtype": "<u2", "tokens": np.asarray(tokens, "<u2").tobytes()}
    for name, values, dtype in (
        ("actions", clip.actions_T, "<i4"),
        ("rewards", clip.rewards_T, "<f4"),
        ("latent_actions", clip.latent_actions_T, "u1"),
    ):
        if values is not None:
            if len(values) != len(clip):
                raise ValueError(f"{len(values)} {name} for {len(clip)} frames")
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

        def array(name: str, dtype: str) -> np.ndarray | None:
            return None if name not in fields else np.frombuffer(fields[name], dtype)

        held = "tokens" if "tokens" in fields else "frames"
        content = np.frombuffer(fields[held], fields["dtype"]).reshape(fields["shape"])
        return Clip(
            frames_THWC=content if held == "frames" else None,
            clip_id=fields["clip_id"],
            actions_T=array("actions", "<i4"),
            rewards_T=array("rewards", "<f4"),
            level_seed=fields.get("level_seed"),
            tokens_TN=content if held == "tokens" else None,
            latent_actions_T=array("latent_actions", "u1"),
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
    window: Frames in each clip. Tokens depend on the frames before them from the clip's first on, so clips stay whole.
    frames: Path of the dataset of frames.
    """

    tokenizer: str
    lam: str | None
    window: int
    frames: str


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `metadata.json` holds.

    environment: "coinrun", or a name for where the videos come from.
    frame_shape: (height, width, channels) of every frame.
    fps: Frames per second at which the clips play naturally.
    action_names: Names of the discrete actions, or None for video without actions.
    splits: Shards of "train", "val" and "test".
    made_by: Command, arguments, seeds and versions that made the dataset.
    tokens: Of a token dataset; None where there are frames.
    """

    environment: str
    frame_shape: tuple[int, int, int]
    fps: float
    action_names: tuple[str, ...] | None
    splits: dict[str, tuple[Shard, ...]]
    made_by: dict[str, Any]
    tokens: TokenInfo | None = None

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
        names, tokens = fields["action_names"], fields.get("tokens")
        return Metadata(
            environment=fields["environment"],
            frame_shape=tuple(fields["frame_shape"]),
            fps=fields["fps"],
            action_names=None if names is None else tuple(names),
            splits={s: tuple(Shard(f["file"], f["lengths"]) for f in files) for s, files in fields["splits"].items()},
            made_by=fields["made_by"],
            tokens=TokenInfo(**tokens) if tokens else None,
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


class Batch(NamedTuple):
    """A batch of clips, cut to the same length.

    frames_BTHWC: uint8; None from a token dataset.
    actions_BT: int32, `actions_BT[:, t]` leads from frame t to t + 1; None where the dataset has no actions.
    tokens_BTN: uint16; None from a dataset of frames.
    latent_actions_BT: uint8, aligned like `actions_BT`.
    """

    frames_BTHWC: Any = None
    actions_BT: Any = None
    tokens_BTN: Any = None
    latent_actions_BT: Any = None


def frames_folder(folder: str) -> str:
    """The dataset itself, or the dataset of frames that a token dataset was made from."""
    tokens = read_metadata(folder).tokens
    return tokens.frames if tokens else folder


def longest_clip(folder: str, split: str) -> int:
    """Frames of the longest clip of a split, 0 if there is none."""
    shards = read_metadata(folder).splits.get(split, ())
    return max((shard.lengths[0][0] for shard in shards if shard.lengths), default=0)


class ClipSource:
    """Random access to the clips of one split that have at least `seq_len` frames.

    Args:
      folder: The dataset's.
      split: "train", "val" or "test".
      seq_len: Frames that `windows` cuts from a clip.
      tokens_too: Whether a token dataset will do.

    Raises:
      InputError: Nothing to read: no dataset, no files, no clip that is long enough, or files that do not hold what
        the metadata says.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int, tokens_too: bool = False):
        self.folder, self.split, self.seq_len = Path(folder), split, seq_len
        self.metadata = read_metadata(folder)
        tokens = self.metadata.tokens
        if tokens and not tokens_too:
            raise InputError(
                f"--data_dir {folder}: holds tokens without frames; name a dataset of frames, {tokens.frames}"
            )
        if tokens and tokens.window != seq_len:
            raise InputError(
                f"--seq_len {seq_len}: the clips of the token dataset {folder} have {tokens.window} frames"
            )
        shards = self.metadata.splits.get(split, ())
        if not shards:
            raise InputError(f"--data_dir {folder}: the dataset has no clips in its {split} split; generate more data")
        # Only the long enough clips, which every file begins with. Offsets map a clip to its file.
        self._counts = [shard.count(seq_len) for shard in shards]
        if sum(self._counts) == 0:
            longest = longest_clip(str(folder), split)
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
        return [
            decode_clip(record, f"{self.folder}/{self.split}: clip {i}")
            for i, record in zip(indices, self.records(indices), strict=True)
        ]

    def records(self, indices: Sequence[int]) -> Sequence[bytes]:
        """The clips as they are stored, decompressed."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return self._source.__getitems__([int(i + self._shifts[s]) for i, s in zip(indices, shards, strict=True)])

    def windows(self, indices: Sequence[int], positions: Sequence[float]) -> Batch:
        """Reads a batch: from each clip `seq_len` frames, from the place that `positions` (in [0, 1)) names."""
        clips = self.clips(indices)
        if self.metadata.tokens:
            return self._tokens(clips)
        frames = np.empty((len(clips), self.seq_len, *self.metadata.frame_shape), np.uint8)
        actions = np.empty((len(clips), self.seq_len), np.int32) if self.metadata.action_names else None
        for i, (clip, position) in enumerate(zip(clips, positions, strict=True)):
            found = None if clip.frames_THWC is None else clip.frames_THWC.shape[1:]
            if found != self.metadata.frame_shape:
                raise InputError(
                    f"{self.folder}/{self.split}: clip {clip.clip_id} has frames {found}, the metadata says "
                    f"{self.metadata.frame_shape}; generate the data again"
                )
            start = int(position * (len(clip) - self.seq_len + 1))
            frames[i] = clip.frames_THWC[start : start + self.seq_len]  # type: ignore[index]
            if actions is not None:
                if clip.actions_T is None:
                    raise InputError(f"{self.folder}/{self.split}: clip {clip.clip_id} has no actions; generate again")
                actions[i] = clip.actions_T[start : start + self.seq_len]
        return Batch(frames, actions)

    def _tokens(self, clips: Sequence[Clip]) -> Batch:
        """The same from a token dataset, whose clips have `seq_len` frames."""

        def stack(name: str, dtype: Any) -> np.ndarray | None:
            values = [getattr(clip, name) for clip in clips]
            return None if values[0] is None else np.stack(values).astype(dtype)

        return Batch(
            actions_BT=stack("actions_T", np.int32),
            tokens_BTN=stack("tokens_TN", np.uint16),
            latent_actions_BT=stack("latent_actions_T", np.uint8),
        )


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
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
    return iter(dataset)


def _ignore_interrupts(worker: int, workers: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training itself ends its workers, after it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
