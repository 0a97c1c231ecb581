"""The loader: from a dataset of clips (`utils/records.py`) to batches on the devices."""

import copy
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from models.errors import InputError
from utils.outcomes import ends_of, expect_outcomes, lacking
from utils.records import Clip, Metadata, Shard, decode_clip, read_metadata
from utils.worker import begin_reading

BATCHES_PER_WORKER = 2  # that wait to be taken
MAX_OPEN_SHARDS = 256  # files of a split that stay open; a system's limit is often 1024 for a process


class Batch(NamedTuple):
    """A batch of clips, cut to the same length.

    frames_BTHWC: uint8; None from a token dataset whose tokens say all.
    actions_BT: `actions_BT[:, t]` leads from frame t to t + 1; None where the dataset has no actions. int32 (B, T), or
      beyond one integer (B, T, A), int32 or float32; the columns are those of `Metadata.action_columns`.
    tokens_BTN: uint16; None from a dataset of frames.
    latent_actions_BT: uint8, aligned like `actions_BT`.
    rewards_BT: float32, what each action earned; None unless asked for.
    ends_BT: uint8, how each action ended its level (see `models.ends`); None unless asked for.
    latents_BTNL: float16, in the place of tokens, from a dataset of a tokenizer that makes latents.
    weight_BT: float32, what each frame counts in a training: 1, or 0 where the last one is repeated to fill a shorter
      clip up; None where all clips are whole.
    """

    frames_BTHWC: Any = None
    actions_BT: Any = None
    tokens_BTN: Any = None
    latent_actions_BT: Any = None
    rewards_BT: Any = None
    ends_BT: Any = None
    latents_BTNL: Any = None
    weight_BT: Any = None

    def coded(self) -> Any:
        """What a token dataset holds, as `models.tokenizer.Tokenizer.code` makes it; None of a dataset of frames."""
        if self.latents_BTNL is not None:
            return self.latents_BTNL.astype(np.float32)
        return None if self.tokens_BTN is None else self.tokens_BTN.astype(np.int32)


class Source(Protocol):
    """What batches are read from: a split of a dataset (`ClipSource`), or of several (`utils.mixture`)."""

    seq_len: int
    metadata: Metadata
    outcomes: Sequence[str]

    def order(self, seed: int) -> Any:
        """The numbers of clips in the order of training, without end: a `grain.MapDataset`, seeded."""

    def windows(self, indices: Sequence[int], positions: Sequence[float]) -> Batch:
        """Clips by their numbers, each cut to `seq_len` frames at a place in [0, 1)."""


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
      outcomes: What else is read, of "reward" and "end". Since an end comes with a clip's last frame, which is in few
        windows, windows are then placed such that it comes as often as in the data.
      shortest: Frames that a clip must have at least; shorter ones than `seq_len` are filled up (`Batch.weight_BT`). 0:
        they do not join.

    Raises:
      InputError: Nothing to read: no dataset, no files, no clip that is long enough, or files that do not hold what
        the metadata says; or the clips do not tell the outcomes.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        seq_len: int,
        tokens_too: bool = False,
        outcomes: Sequence[str] = (),
        shortest: int = 0,
    ):
        self.folder, self.split, self.seq_len, self.outcomes = Path(folder), split, seq_len, outcomes
        self.shortest = min(shortest, seq_len) or seq_len
        self.metadata = read_metadata(folder)
        tokens = self.metadata.tokens
        if tokens and not tokens_too:
            raise InputError(
                f"`data_dir` {folder}: holds tokens without frames; name a dataset of frames, {tokens.frames}"
            )
        if tokens and tokens.window != seq_len:
            raise InputError(
                f"`seq_len` {seq_len}: the clips of the token dataset {folder} have {tokens.window} frames"
            )
        shards = self.metadata.splits.get(split, ())
        if not shards:
            raise InputError(f"`data_dir` {folder}: the dataset has no clips in its {split} split; generate more data")
        # Only the long enough clips, which every file begins with. Offsets map a clip to its file.
        self._counts = [shard.count(self.shortest) for shard in shards]
        if sum(self._counts) == 0:
            longest = longest_clip(str(folder), split)
            if self.shortest < seq_len:
                raise InputError(
                    f"`data_dir` {folder}: the longest clip in its {split} split has {longest} "
                    f"frame{'s' * (longest > 1)}, and {self.shortest} are needed to learn from; leave this dataset out"
                )
            raise InputError(
                f"`seq_len` {seq_len}: the longest clip in {folder}/{split} has {longest} frames; choose `seq_len` "
                f"{longest} or less, or generate longer clips"
            )
        files = [self.folder / shard.file for shard in shards]
        for file, shard in zip(files, shards, strict=True):
            _check_file(file, shard)
        self._source: ArrayRecordDataSource = ArrayRecordDataSource([str(file) for file in files])
        self._opened: set[int] = set()
        totals = [shard.count() for shard in shards]
        self._ends = np.cumsum(self._counts)
        # Clip i of this source is record i + shift of the concatenated files.
        self._shifts = np.cumsum([0, *totals[:-1]]) - np.cumsum([0, *self._counts[:-1]])
        if outcomes:
            expect_outcomes(self.clips([0])[0], outcomes, f"{folder}/{split}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, seed: int) -> Any:
        """Every clip once in each epoch, in an order of its own."""
        import grain  # not at the top: the workers of generate_dataset.py start faster without it

        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()

    def tells(self, outcomes: Sequence[str]) -> bool:
        """Whether its clips, by the first of them, tell what came of their actions: "reward", "end"."""
        return not lacking(self.clips([0])[0], outcomes)

    def position(self, start: int, length: int) -> float:
        """Where `windows` is to cut a clip of so many frames, for the window to begin at frame `start`."""
        return (start + 0.5) / self._places(length)

    def _places(self, length: int) -> int:
        # With outcomes, a window that would begin too late and run over the clip's end stops there: in a clip of L
        # frames, T of L windows do, and the last frame is as frequent among frames as it is in the data.
        return length if self.outcomes else max(length - self.seq_len, 0) + 1

    def clips(self, indices: Sequence[int]) -> list[Clip]:
        """Reads whole clips in one batched read."""
        return [
            decode_clip(record, f"{self.folder}/{self.split}: clip {i}")
            for i, record in zip(indices, self.records(indices), strict=True)
        ]

    def records(self, indices: Sequence[int]) -> Sequence[bytes]:
        """The clips as they are stored, decompressed."""
        shards = np.searchsorted(self._ends, indices, side="right")
        if len(self._opened) > MAX_OPEN_SHARDS:
            # A copy begins with no file open; the old one closes its files when the last thread has read from it.
            self._source, self._opened = copy.copy(self._source), set()
        self._opened.update(shards.tolist())
        return self._source.__getitems__([int(i + self._shifts[s]) for i, s in zip(indices, shards, strict=True)])

    def windows(self, indices: Sequence[int], positions: Sequence[float]) -> Batch:
        """Reads a batch: from each clip `seq_len` frames, from the place that `positions` (in [0, 1)) names."""
        read, of = np.unique(np.asarray(indices), return_inverse=True)  # a clip that comes twice is read once
        once = self.clips(read.tolist())
        clips = [once[i] for i in of]
        if self.metadata.tokens:
            return self._tokens(clips)
        frames = np.empty((len(clips), self.seq_len, *self.metadata.frame_shape), np.uint8)
        actions, starts = None, []
        if self.metadata.has_actions:
            shape = (len(clips), self.seq_len, *self.metadata.action_shape)
            actions = np.empty(shape, self.metadata.action_dtype)
        for i, (clip, position) in enumerate(zip(clips, positions, strict=True)):
            found = None if clip.frames_THWC is None else clip.frames_THWC.shape[1:]
            if found != self.metadata.frame_shape:
                raise InputError(
                    f"{self.folder}/{self.split}: clip {clip.clip_id} has frames {found}, the metadata says "
                    f"{self.metadata.frame_shape}; generate the data again"
                )
            start = max(min(int(position * self._places(len(clip))), len(clip) - self.seq_len), 0)
            starts.append(start)
            frames[i] = filled(clip.frames_THWC[start : start + self.seq_len], self.seq_len)
            if actions is not None:
                if clip.actions_T is None or clip.actions_T.shape[1:] != self.metadata.action_shape:
                    held = "no actions" if clip.actions_T is None else "actions unlike those of the metadata"
                    raise InputError(f"{self.folder}/{self.split}: clip {clip.clip_id} has {held}; generate again")
                actions[i] = filled(clip.actions_T[start : start + self.seq_len], self.seq_len)
        return self._with_outcomes(Batch(frames, actions, weight_BT=self._weights(clips)), clips, starts)

    def _with_outcomes(self, batch: Batch, clips: Sequence[Clip], starts: Sequence[int]) -> Batch:
        """The batch with what is asked for of the same windows' outcomes."""
        for clip in clips if self.outcomes else ():
            expect_outcomes(clip, self.outcomes, f"{self.folder}/{self.split}: clip {clip.clip_id}")

        def cut(name: str, values_of: Callable[[Clip], Any]) -> np.ndarray | None:
            if name not in self.outcomes:
                return None
            return np.stack([values_of(c)[s : s + self.seq_len] for c, s in zip(clips, starts, strict=True)])

        return batch._replace(rewards_BT=cut("reward", lambda clip: clip.rewards_T), ends_BT=cut("end", ends_of))

    def _tokens(self, clips: Sequence[Clip]) -> Batch:
        """The same from a token dataset, whose clips have `seq_len` frames, or fewer if they were short."""

        def stack(name: str, dtype: Any) -> np.ndarray | None:
            values = [getattr(clip, name) for clip in clips]
            if values[0] is None:
                return None
            return np.stack([filled(value, self.seq_len) for value in values]).astype(dtype)

        batch = Batch(
            frames_BTHWC=stack("frames_THWC", np.uint8),
            actions_BT=stack("actions_T", self.metadata.action_dtype),
            tokens_BTN=stack("tokens_TN", np.uint16),
            latent_actions_BT=stack("latent_actions_T", np.uint8),
            latents_BTNL=stack("latents_TNL", np.float16),
            weight_BT=self._weights(clips),
        )
        return self._with_outcomes(batch, clips, [0] * len(clips))

    def _weights(self, clips: Sequence[Clip]) -> np.ndarray | None:
        """What their frames count, if short clips may be among them."""
        if self.shortest == self.seq_len:
            return None
        lengths_B1 = np.array([[len(clip)] for clip in clips])
        return (np.arange(self.seq_len) < lengths_B1).astype(np.float32)


def filled(values_T: np.ndarray, length: int) -> np.ndarray:
    """Repeats the last of some values until there are as many as `length`."""
    missing = max(length - len(values_T), 0)
    return np.concatenate([values_T, np.repeat(values_T[-1:], missing, axis=0)]) if missing else values_T


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
    source: Source,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    num_workers: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    windows_per_clip: int = 1,
) -> Iterator[Batch]:
    """An endless stream of the global batches `start`, `start + 1`, ..., or of this process's share of them.

    A batch is a function of `(source, seed, batch index)` alone. Clips are shuffled by index, anew in each epoch, and
    cut at random places; the numbers of workers and processes change nothing.

    Args:
      batch_size: Clips in a global batch.
      num_workers: Worker processes that read ahead; 0 reads in threads of this process.
      rows: Which clips of each global batch to read; by default all.
      windows_per_clip: Windows of a batch, one after another, that are cut from the same clip, each from a part of its
        own of the places.
    """
    import absl.flags
    import grain

    K = windows_per_clip
    cut = lambda index, rng: (np.full(K, index), (np.arange(K) + rng.random(K)) / K)
    places = source.order(seed).random_map(cut)
    mine = np.arange(batch_size) if rows is None else np.asarray(rows)
    # An end, for without one grain's batches of one clip would be more than Python can count.
    whole = places[start * batch_size // K : 2**62].batch(batch_size // K)
    own = lambda place: source.windows(place[0].reshape(-1)[mine], place[1].reshape(-1)[mine])
    dataset = whole.map(own).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if num_workers:
        check_shared_memory(source, len(mine), num_workers)
        absl.flags.FLAGS.mark_as_parsed()  # grain's workers read flags, and no one else parses them here
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=BATCHES_PER_WORKER)
        dataset = dataset.mp_prefetch(options, worker_init_fn=begin_reading)
    return _own(iter(dataset)) if num_workers else iter(dataset)


def _own(stream: Any) -> Generator[Batch, None, None]:
    """Batches of worker processes in memory of this one's own, so that the shared one is free again at once."""
    try:
        for batch in stream:
            yield Batch(*(None if array is None else np.array(array) for array in batch))
    finally:
        stream.close()


def check_shared_memory(source: Source, batch_size: int, num_workers: int) -> None:
    """Compares what worker processes need to hand over batches with the shared memory that there is.

    Raises:
      InputError: It is too little; a worker would die in the middle of a training, of a bus error.
    """
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    one = source.windows([0], [0.0])  # of a token dataset it may have no frames
    size = batch_size * sum(array.nbytes for array in one if array is not None)
    needed = size * num_workers * (BATCHES_PER_WORKER + 1)  # and one that is being used
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"`num_workers` {num_workers}: their batches need {needed / 2**20:.0f} MiB of shared memory, {folder} has "
            f"{free / 2**20:.0f} MiB; give the container more (docker run --shm-size), or use fewer workers"
        )
