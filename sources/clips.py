"""From episodes to clips to shards: what a worker of `sources/convert.py` does."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.errors import InputError
from sources.actions import Seen, Space, seen
from sources.kind import DamageError, Kind, naming
from utils.records import Clip, Shard, write_shard
from utils.video import resize


@dataclass(frozen=True)
class Source:
    """One episode to read: a file, or a folder.

    name: Path within the input folder.
    """

    name: str
    path: Path
    kind: Kind


class Form(NamedTuple):
    """What all clips of the dataset have in common, and how episodes become clips.

    actions: None where the dataset has no actions.
    actions_lead_to: Whether sources give with a frame the action that led to it, not the one that leads on.
    """

    height: int
    width: int
    resizes: bool
    fps: Fraction
    actions: Space | None
    actions_lead_to: bool
    clip_length: int
    min_clip_length: int


class Task(NamedTuple):
    """Sources that one worker turns into shards; their number does not depend on the number of workers.

    shard_bytes: Raw frames in one file of clips, at most.
    """

    folder: Path
    split: str
    number: int
    sources: tuple[Source, ...]
    form: Form
    strict: bool
    shard_bytes: int


class Converted(NamedTuple):
    """What became of a task: its shards, what was seen of actions, and what went wrong.

    skipped: The reasons for skipping sources.
    damaged: Of which sources the end was left out, and why.
    """

    shards: list[Shard]
    skipped: list[str]
    damaged: list[str]
    seen: Seen


def convert_task(task: Task) -> Converted:
    """Turns the sources of one task into shards of at most about `shard_bytes`.

    Holds one shard in memory, and one frame of its source. A source that fails half-way leaves no clips behind.
    """
    shards: list[Shard] = []
    skipped: list[str] = []
    damaged: list[str] = []
    finished: list[Clip] = []  # of sources that have been read to their end
    all_seen = Seen()

    def write(clips: list[Clip]) -> None:
        file = f"{task.split}/task-{task.number:05d}-{len(shards):05d}.array_record"
        shards.append(write_shard(task.folder, file, clips))
        clips.clear()

    clips_per_shard = max(1, task.shard_bytes // (task.form.clip_length * task.form.height * task.form.width * 3))
    for source in task.sources:
        clips: list[Clip] = []
        notes: list[str] = []
        num_own_shards, own_seen = 0, Seen()
        try:
            for clip in read_clips(source, task.form, None if task.strict else notes):
                clips.append(clip)
                own_seen = own_seen.plus(seen(clip.actions_T))
                if len(finished) + len(clips) < clips_per_shard:
                    continue
                # Until a source has been read to its end, its clips share no shard with those of others.
                if finished:
                    write(finished)
                else:
                    write(clips)
                    num_own_shards += 1
        except InputError as error:
            skipped.append(str(error))
            for _ in range(num_own_shards):
                (task.folder / shards.pop().file).unlink()
            if task.strict:
                break
        else:
            finished += clips
            damaged += notes
            all_seen = all_seen.plus(own_seen)
    if finished:
        write(finished)
    return Converted(shards, skipped, damaged, all_seen)


def read_clips(source: Source, form: Form, damaged: list[str] | None = None) -> Iterator[Clip]:
    """Cuts an episode, or those that follow one another in a file, into clips that follow one another.

    Args:
      damaged: Takes the reason why the rest of a source is left out; None raises it.

    Raises:
      InputError: The source cannot be read, has frames of another size, or is too short for a clip.
    """
    with naming(source.path):
        episode = source.kind.open(source.path, form.fps)
    actions = None
    if form.actions is not None:
        actions = _aligned(episode.actions_T, form, "actions" in episode.between)
        if actions is None:
            raise InputError(f"{source.path}: has no actions, though it should")
        form.actions.check(str(source.path), actions)
    rewards = _aligned(episode.rewards_T, form, "rewards" in episode.between)
    frames: list[np.ndarray] = []
    count = 0
    has_clips = False

    def clip() -> Clip:
        span = slice(count - len(frames), count)
        return Clip(
            frames_THWC=np.stack(frames),
            clip_id=f"{source.name}/{span.start:06d}",
            actions_T=None if actions is None else actions[span],
            rewards_T=None if rewards is None else rewards[span],
        )

    for frame in _frames(source, episode.frames, damaged):
        if frame is not None:
            if form.resizes:
                frame = resize(frame[None], form.height, form.width)[0]
            elif frame.shape[:2] != (form.height, form.width):
                raise InputError(wrong_size(source, frame.shape[:2], (form.height, form.width)))
            frames.append(frame)
            count += 1
        if len(frames) == form.clip_length or (frame is None and len(frames) >= form.min_clip_length):
            yield clip()
            has_clips = True
            frames = []
        elif frame is None:
            frames = []
    if len(frames) >= form.min_clip_length:
        yield clip()
    elif not has_clips:
        if damaged:  # not only its end is lost
            raise InputError(damaged.pop())
        raise InputError(too_short(source, count, form.min_clip_length))


def _frames(
    source: Source, frames: Iterable[np.ndarray | None], damaged: list[str] | None
) -> Iterator[np.ndarray | None]:
    """Frames up to where the source is damaged."""
    iterator, end = iter(frames), object()
    while True:
        try:
            with naming(source.path):
                frame = next(iterator, end)
        except DamageError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            return
        if frame is end:
            return
        yield frame  # type: ignore[misc]


def _aligned(values: np.ndarray | None, form: Form, are_between: bool) -> np.ndarray | None:
    """Values such that those at t belong to the step from frame t to t + 1; the last one's is 0 where it is unknown."""
    if values is None or are_between or not form.actions_lead_to:
        return values
    return np.concatenate([values[1:], np.zeros_like(values[:1])])


def too_short(source: Source, num_frames: int, min_clip_length: int) -> str:
    """Why an episode without a single clip is skipped."""
    return f"{source.path}: has {num_frames} frames, fewer than `min_clip_length` {min_clip_length}"


def wrong_size(source: Source, size: Sequence[int], expected: Sequence[int]) -> str:
    """Why an episode with frames of another size is skipped."""
    return (
        f"{source.path}: has frames of {size[0]}×{size[1]} (height × width), most sources "
        f"{expected[0]}×{expected[1]}; resize all with `height` and `width`"
    )
