"""What is in a dataset's files: every record read once, part by part, in worker processes (inspect_dataset.py).

A thumbnail of 8 × 8 grey cells is kept of every frame: enough to tell pictures apart, and 64 bytes.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from models.errors import InputError
from utils.actions import ActionColumn
from utils.records import Clip, Metadata, Shard, decode_clip

PART_BYTES = 32 * 2**20  # raw frames that a worker takes at once
READ_BYTES = 4 * 2**20  # of which this much at a time
CELLS = 8  # of a thumbnail, each way


class Part(NamedTuple):
    """Records that follow one another in a file.

    file: Within the dataset's folder.
    first: Number of the first record.
    lengths: Frames of each, by the metadata.
    num_actions: 0 for a dataset without actions, or with columns.
    columns: Of actions beyond one integer.
    """

    folder: str
    split: str
    file: str
    first: int
    lengths: tuple[int, ...]
    frame_shape: tuple[int, int, int]
    num_actions: int
    columns: tuple[ActionColumn, ...]


class Place(NamedTuple):
    """Where a clip lies."""

    split: str
    file: str
    record: int


class Damage(NamedTuple):
    """Records that cannot be read, from `place` on; of a file that cannot be opened, all that it should hold."""

    place: Place
    clips: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Scan:
    """What was found. Arrays with N have an entry for each clip that could be read, those with F for each frame.

    clip_ids, levels: Of each clip; a level is None where it is unknown.
    lengths_N: Frames.
    clip_digests_N, action_digests_N: uint64, equal for equal frames and equal actions; 0 without actions.
    unchanged_N: Share of the pixels that are the same in the next frame, a mean over the clip; NaN for one frame.
    still_N: Transitions in which no pixel changes.
    rewards_N2: How many rewards are not 0, and their sum; NaN without rewards.
    reward_values: How often each reward occurs, the first so many of them.
    ends_N3: Actions that ended an episode, terminated and truncated, NaN where that is not told; and whether the one
      that ends in the clip was a success, NaN where none does or that is not told.
    wrong_actions_N: Actions that the metadata does not name.
    frame_digests_F: uint64.
    thumbnails_FZ: uint8, grey means of the cells of each frame.
    action_counts, action_changes: By split, for each action how often it was taken within a clip, and the sum of the
      shares of pixels that changed after it.
    column_counts: For each column of actions beyond one integer, by its name, how often each value occurs; of real
      numbers, how often they lie in each of `BINS`.
    """

    places: list[Place]
    clip_ids: list[str]
    levels: list[int | None]
    damaged: list[Damage]
    lengths_N: np.ndarray
    clip_digests_N: np.ndarray
    action_digests_N: np.ndarray
    unchanged_N: np.ndarray
    still_N: np.ndarray
    rewards_N2: np.ndarray
    reward_values: dict[float, int]
    ends_N3: np.ndarray
    wrong_actions_N: np.ndarray
    frame_digests_F: np.ndarray
    thumbnails_FZ: np.ndarray
    action_counts: dict[str, np.ndarray]
    action_changes: dict[str, np.ndarray]
    column_counts: dict[str, np.ndarray]

    @property
    def starts_N(self) -> np.ndarray:
        """Number of each clip's first frame."""
        return np.cumsum(self.lengths_N) - self.lengths_N

    def of_split(self, split: str) -> np.ndarray:
        """Which clips are of a split, bool (N,)."""
        return np.array([place.split == split for place in self.places], bool)


BINS = np.array([-1.5, -0.5, 0.5, 1.5])
"""Borders of the bins for real numbers, in scales from their mean."""
MOST_REWARDS = 1000  # different ones that are counted


def parts_of(folder: str | Path, metadata: Metadata) -> list[Part]:
    """Cuts a dataset into parts of about `PART_BYTES` for the workers.

    Raises:
      InputError: It holds tokens, which nobody can look at.
    """
    if metadata.tokens:
        raise InputError(f"{folder}: holds tokens; inspect the dataset of frames, {metadata.tokens.frames}")
    frame_bytes = int(np.prod(metadata.frame_shape))
    parts = []
    for split, shards in metadata.splits.items():
        for shard in shards:
            for first, lengths in _cut(shard, max(1, PART_BYTES // frame_bytes)):
                common = (metadata.frame_shape, metadata.num_actions, metadata.action_columns)
                parts.append(Part(str(folder), split, shard.file, first, lengths, *common))
    return parts


def _cut(shard: Shard, most_frames: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Runs of records with at most about `most_frames` frames: the first one's number, and the lengths."""
    first, run, frames = 0, [], 0
    for length in (length for length, count in shard.lengths for _ in range(count)):
        run.append(int(length))
        frames += length
        if frames >= most_frames:
            yield first, tuple(run)
            first, run, frames = first + len(run), [], 0
    if run:
        yield first, tuple(run)


def scan_part(part: Part) -> Scan:
    """Reads a part; what cannot be read is told in `damaged`."""
    found: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(Scan)}
    counts, changes = np.zeros(part.num_actions, np.int64), np.zeros(part.num_actions)
    rewards: dict[float, int] = {}
    columns = {c.name: np.zeros(len(c.values) if c.values else len(BINS) + 1, np.int64) for c in part.columns}
    for record, clip in read_records(part):
        place = Place(part.split, part.file, record)
        reason = clip if isinstance(clip, str) else _fault(clip, part)
        if reason or isinstance(clip, str):
            found["damaged"].append(Damage(place, len(part.lengths) if record < 0 else 1, reason))
            continue
        frames, actions = clip.frames_THWC, clip.actions_T
        assert frames is not None
        digests = np.array([_digest(frame) for frame in frames], np.uint64)
        unchanged = unchanged_pixels(frames)
        found["places"].append(place)
        found["clip_ids"].append(clip.clip_id)
        found["levels"].append(clip.level_seed)
        found["lengths_N"].append(len(frames))
        found["frame_digests_F"].append(digests)
        found["clip_digests_N"].append(_digest(digests))
        found["action_digests_N"].append(0 if actions is None else _digest(actions))
        found["unchanged_N"].append(unchanged.mean() if len(unchanged) else np.nan)
        found["still_N"].append(np.count_nonzero(unchanged == 1))
        found["thumbnails_FZ"].append(thumbnails(frames))
        found["rewards_N2"].append(_count_rewards(clip.rewards_T, rewards))
        found["ends_N3"].append(_count_ends(clip))
        count = _count_columns(actions, part.columns, columns) if part.columns and actions is not None else 0
        found["wrong_actions_N"].append(count or _count_actions(actions, unchanged, counts, changes))
    fields: dict[str, Any] = {name: found[name] for name in ("places", "clip_ids", "levels", "damaged")}
    for name, kind in ARRAYS.items():
        rows = np.concatenate(found[name]) if name in PER_FRAME and found[name] else found[name]
        fields[name] = np.asarray(rows, kind).reshape(-1, *SHAPES.get(name, ()))
    fields["action_counts"], fields["action_changes"] = {part.split: counts}, {part.split: changes}
    return Scan(**fields, reward_values=rewards, column_counts=columns)


ARRAYS: dict[str, Any] = {
    "lengths_N": np.int64,
    "clip_digests_N": np.uint64,
    "action_digests_N": np.uint64,
    "unchanged_N": np.float64,
    "still_N": np.int64,
    "rewards_N2": np.float64,
    "ends_N3": np.float64,
    "wrong_actions_N": np.int64,
    "frame_digests_F": np.uint64,
    "thumbnails_FZ": np.uint8,
}
PER_FRAME = ("frame_digests_F", "thumbnails_FZ")
SHAPES = {"rewards_N2": (2,), "ends_N3": (3,), "thumbnails_FZ": (CELLS * CELLS,)}


def gather(scans: Iterable[Scan]) -> Scan:
    """The scans of all parts as one."""
    parts = list(scans)
    fields: dict[str, Any] = {
        name: np.concatenate([np.empty((0, *SHAPES.get(name, ())), kind), *(getattr(p, name) for p in parts)])
        for name, kind in ARRAYS.items()
    }
    for name in ("places", "clip_ids", "levels", "damaged"):
        fields[name] = [x for part in parts for x in getattr(part, name)]
    for name in ("reward_values", "action_counts", "action_changes", "column_counts"):
        total = fields[name] = {}
        for key, value in (item for part in parts for item in getattr(part, name).items()):
            total[key] = total[key] + value if key in total else value
    return Scan(**fields)


def read_records(part: Part) -> Iterator[tuple[int, Clip | str]]:
    """Clips with the numbers of their records, or why one cannot be read; number -1 stands for the whole part."""
    path = Path(part.folder) / part.file
    try:
        source: ArrayRecordDataSource = ArrayRecordDataSource([str(path)])
        with source:
            held = len(source)
    except Exception as error:  # array_record's C++ errors have no common type
        yield -1, "is missing" if not path.is_file() else f"is not a readable ArrayRecord file ({_line(error)})"
        return
    numbers = range(part.first, part.first + len(part.lengths))
    if held < numbers.stop:
        yield held, f"{held} records, where metadata.json says {numbers.stop} or more"
        numbers = range(part.first, held)
    step = max(1, READ_BYTES // max(1, part.lengths[0] * int(np.prod(part.frame_shape))))
    for first in range(numbers.start, numbers.stop, step):
        yield from _read(source, path, numbers[first - numbers.start : first - numbers.start + step])


def _read(source: ArrayRecordDataSource, path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Clip | str]]:
    """The same of some records; where one read of them all fails, each is tried by itself."""
    try:
        records = source.__getitems__(list(numbers))
    except Exception as error:
        if len(numbers) == 1:
            yield numbers[0], _line(error)
            return
        for number in numbers:
            yield from _read(source, path, [number])
        return
    for number, record in zip(numbers, records, strict=True):
        try:
            yield number, decode_clip(record, f"{path.name}: record {number}")
        except InputError as error:
            yield number, str(error)


def read_clips(folder: str | Path, places: Sequence[Place]) -> list[Clip]:
    """Clips of one file that a scan could read."""
    [file] = {place.file for place in places}
    source: ArrayRecordDataSource = ArrayRecordDataSource([str(Path(folder) / file)])
    with source:
        records = source.__getitems__([place.record for place in places])
    return [decode_clip(record, f"{file}: record {p.record}") for record, p in zip(records, places, strict=True)]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _fault(clip: Clip, part: Part) -> str:
    """What a clip is not by the metadata; empty if it is as that says."""
    if clip.frames_THWC is None or clip.frames_THWC.shape[1:] != part.frame_shape:
        found = None if clip.frames_THWC is None else clip.frames_THWC.shape[1:]
        return f"has frames of {found}, where metadata.json says {part.frame_shape}"
    if (part.num_actions or part.columns) and clip.actions_T is None:
        return "has no actions, where metadata.json names some"
    if clip.actions_T is not None and clip.actions_T.shape[1:] != ((len(part.columns),) if part.columns else ()):
        return f"has actions of {clip.actions_T.shape[1:]}, where metadata.json names {len(part.columns)} columns"
    return ""


def _digest(array: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8).digest(), "little")


def unchanged_pixels(frames_THWC: np.ndarray) -> np.ndarray:
    """Share of the pixels that are the same in the next frame, (T - 1,)."""
    T, H, W, C = frames_THWC.shape
    changed = (frames_THWC[1:] != frames_THWC[:-1]).reshape(T - 1, H * W, C)
    any_TN = changed[..., 0]
    for c in range(1, C):
        any_TN = any_TN | changed[..., c]
    return 1 - np.count_nonzero(any_TN, axis=1) / (H * W)


def thumbnails(frames_THWC: np.ndarray) -> np.ndarray:
    """Grey means of `CELLS` × `CELLS` cells of each frame, uint8 (T, Z); smaller frames are tiled to as many pixels."""
    T, H, W, C = frames_THWC.shape
    frames = np.pad(frames_THWC, ((0, 0), (0, max(0, CELLS - H)), (0, max(0, CELLS - W)), (0, 0)), mode="wrap")
    H, W = frames.shape[1:3]
    rows, columns = ([round(i * n / CELLS) for i in range(CELLS + 1)] for n in (H, W))
    bands = [frames[:, a:b].sum(axis=1, dtype=np.uint32) for a, b in itertools.pairwise(rows)]
    bands_TRWC = np.stack(bands, axis=1)
    cells = [bands_TRWC[:, :, a:b].sum(axis=(2, 3)) for a, b in itertools.pairwise(columns)]
    area = np.outer(np.diff(rows), np.diff(columns)) * C
    return (np.stack(cells, axis=2) / area + 0.5).astype(np.uint8).reshape(T, -1)


def _count_rewards(rewards_T: np.ndarray | None, values: dict[float, int]) -> tuple[float, float]:
    """Adds to how often each value occurs; returns how many rewards are not 0, and their sum."""
    if rewards_T is None:
        return np.nan, np.nan
    for value, count in zip(*(x.tolist() for x in np.unique(rewards_T, return_counts=True)), strict=True):
        if value in values or len(values) < MOST_REWARDS:
            values[value] = values.get(value, 0) + count
    return float(np.count_nonzero(rewards_T)), float(rewards_T.sum())


def _count_ends(clip: Clip) -> tuple[float, float, float]:
    """A clip's row of `Scan.ends_N3`."""
    died, timed_out = (np.nan if t is None else float(t.sum()) for t in (clip.terminated_T, clip.truncated_T))
    ended = died > 0 or timed_out > 0
    return died, timed_out, float(clip.success) if ended and clip.success is not None else np.nan


def _count_actions(
    actions_T: np.ndarray | None, unchanged_Tm1: np.ndarray, counts: np.ndarray, changes: np.ndarray
) -> int:
    """Adds a clip's actions, but for the last, which leads out of it; returns how many have no name."""
    if actions_T is None or not len(counts):
        return 0
    known_T = (actions_T >= 0) & (actions_T < len(counts))
    within = actions_T[:-1][known_T[:-1]]
    counts += np.bincount(within, minlength=len(counts))
    changes += np.bincount(within, weights=1 - unchanged_Tm1[known_T[:-1]], minlength=len(counts))
    return int(np.count_nonzero(~known_T))


def _count_columns(actions_TA: np.ndarray, columns: Sequence[ActionColumn], counts: dict[str, np.ndarray]) -> int:
    """Adds a clip's values of each column; returns how many have no name."""
    wrong = 0
    for column, values_T in zip(columns, actions_TA.T, strict=True):
        if column.values:
            known_T = (values_T >= 0) & (values_T < len(column.values))
            wrong += int(np.count_nonzero(~known_T))
            chosen_T = values_T[known_T].astype(np.int64)
        else:
            chosen_T = np.digitize((values_T - column.mean) / (column.scale or 1.0), BINS)
        counts[column.name] += np.bincount(chosen_T, minlength=len(counts[column.name]))
    return wrong
